"""What is said where an argument of a contrastive loss is wrong.

Arguments are checked before a backend is chosen, so each case is run once.
"""

import pytest
import torch

import neglog

Q, K, NEG = torch.ones(3, 4), torch.ones(3, 4), torch.ones(5, 4)
OWN = torch.ones(3, 5, 4)
IDS = torch.arange(3)
WEIGHTS = torch.tensor([0.0, -torch.inf, torch.nan, 1.0, 2.0])
PAIRED = {"negative_mode": "paired"}
IN_BATCH = {"negative_mode": "in_batch"}
BAD = {
    "list": (TypeError, "query: expected a Tensor, got list", ([1.0], K), {}),
    "one dimension": (RuntimeError, r"query: expected shape \(N, D\), got \[4\]", (Q[0], K), {}),
    "three dimensions": (RuntimeError, r"positive_key: expected shape \(N, D\), got \[3, 5, 4\]",
                         (Q, OWN), {}),
    "integers": (RuntimeError, "query: expected dtype float32, .* or float16, got torch.int64",
                 (Q.long(), K), {}),
    "float8": (RuntimeError, "query: expected dtype float32, .*, got torch.float8_e4m3fn",
               (Q.to(torch.float8_e4m3fn), K.to(torch.float8_e4m3fn)), {}),
    "dtypes": (RuntimeError, "positive_key: expected dtype torch.float32, got torch.float64",
               (Q, K.double()), {}),
    "rows": (RuntimeError, r"positive_key: expected 3 rows, those of query, got \[2, 4\]",
             (Q, K[:2]), {}),
    "features": (RuntimeError,
                 r"positive_key: expected 4 features, those of query, got \[3, 2\]",
                 (Q, K[:, :2]), {}),
    "device": (RuntimeError, "positive_key: expected device cpu, got meta", (Q, K.to("meta")), {}),
    "negatives' features": (RuntimeError, r"negative_keys: expected 4 features.* got \[5, 2\]",
                            (Q, K, NEG[:, :2]), {}),
    "negatives' dimensions": (RuntimeError, r"negative_keys: expected shape \(N, D\)",
                              (Q, K, OWN), {}),
    "negatives' dtype": (RuntimeError, "negative_keys: expected dtype torch.float32",
                         (Q, K, OWN.double()), PAIRED),
    "negatives": (TypeError, "negative_keys: expected a Tensor, got list", (Q, K, [1]), {}),
    "paired negatives": (TypeError, "negative_keys: expected a Tensor, got list",
                         (Q, K, [1]), PAIRED),
    "paired dimensions": (RuntimeError,
                          r"negative_keys: expected shape \(3, M, 4\) for 'paired', got \[5, 4\]",
                          (Q, K, NEG), PAIRED),
    "paired rows": (RuntimeError, r"negative_keys: expected shape \(3, M, 4\).*got \[2, 5, 4\]",
                    (Q, K, OWN[:2]), PAIRED),
    "paired features": (RuntimeError, r"negative_keys: expected shape \(3, M, 4\).*got \[3, 5, 2\]",
                        (Q, K, OWN[..., :2]), PAIRED),
    "mode": (ValueError, r"negative_mode: expected one of \('unpaired', .*got 'queue'",
             (Q, K, NEG), {"negative_mode": "queue"}),
    "mode without negatives": (ValueError, "negative_mode: expected", (Q, K),
                               {"negative_mode": "queue"}),
    "symmetric": (ValueError, "symmetric: expected False with negative_keys", (Q, K, NEG),
                  {"symmetric": True}),
    "reduction": (ValueError, "reduction: expected 'none', 'mean' or 'sum', got 'avg'", (Q, K),
                  {"reduction": "avg"}),
    "smoothing": (RuntimeError, "label_smoothing: expected 0 <= value <= 1, got 2", (Q, K),
                  {"label_smoothing": 2}),
    "weight shape": (RuntimeError, r"hard_negative_weight: expected shape \[\] or \[5\], got \[4\]",
                     (Q, K, NEG), {"hard_negative_weight": torch.ones(4)}),
    "own weights": (RuntimeError, r"hard_negative_weight: expected .* or \[3, 5\], got \[5, 3\]",
                    (Q, K, OWN), {**PAIRED, "hard_negative_weight": torch.ones(5, 3)}),
    "weight gradient": (ValueError, "hard_negative_weight: expected no gradient", (Q, K, NEG),
                        {"hard_negative_weight": torch.ones(5, requires_grad=True)}),
    "weight type": (TypeError, "hard_negative_weight: expected a number or a Tensor, got str",
                    (Q, K, NEG), {"hard_negative_weight": "1"}),
    "exclude shape": (RuntimeError, r"exclude: expected shape \[3\], got \[2\]", (Q, K),
                      {"exclude": IDS[:2]}),
    "exclude dtype": (RuntimeError, "exclude: expected integers, got torch.float32", (Q, K),
                      {"exclude": IDS.float()}),
    "exclude device": (RuntimeError, "exclude: expected device cpu, got meta", (Q, K),
                       {"exclude": IDS.to("meta")}),
    "exclude type": (TypeError, "exclude: expected a Tensor, got list", (Q, K),
                     {"exclude": [1, 2, 3]}),
    "smoothing's type": (TypeError, "label_smoothing: expected a float, got str", (Q, K),
                         {"label_smoothing": "a"}),
    "temperature too small": (ValueError, "temperature: expected a number above 0, got 1e-320",
                              (Q, K), {"temperature": 1e-320}),
    "temperature inf": (ValueError, "temperature: expected numbers above 0, got inf", (Q, K),
                        {"temperature": torch.tensor(torch.inf)}),
    "weight NaN": (ValueError, "hard_negative_weight: expected numbers below inf, got nan",
                   (Q, K, K), {"hard_negative_weight": float("nan")}),
    "weight complex": (RuntimeError, "hard_negative_weight: expected a real dtype", (Q, K, K),
                       {"hard_negative_weight": torch.tensor(1j)}),
    "ids without exclude": (ValueError, "negative_ids: expected none without exclude",
                            (Q, K, NEG), {"negative_ids": torch.arange(5)}),
    "ids without negatives": (ValueError, "negative_ids: expected none without negative_keys",
                              (Q, K), {"negative_ids": IDS, "exclude": IDS}),
    "ids' shape": (RuntimeError, r"negative_ids: expected shape \[5\], got \[3\]", (Q, K, NEG),
                   {"negative_ids": IDS, "exclude": IDS}),
    "paired ids' shape": (RuntimeError, r"negative_ids: expected shape \[5\] or \[3, 5\], got",
                          (Q, K, OWN), {"negative_ids": IDS, "exclude": IDS, **PAIRED}),
    "ids' dtype": (RuntimeError, "negative_ids: expected integers, got torch.float32", (Q, K, NEG),
                   {"negative_ids": torch.ones(5), "exclude": IDS}),
    "own weight, queue": (ValueError, "own_negative_weight: expected 0 without .*'in_batch', got 1",
                          (Q, K, K), {"own_negative_weight": 1}),
    "own weight alone": (ValueError, "own_negative_weight: expected 0 without negative_keys",
                         (Q, K), {"own_negative_weight": 1.0}),
    "own weight, rows": (RuntimeError, r"negative_keys: expected 3 rows, one .* got \[5, 4\]",
                         (Q, K, NEG), {"own_negative_weight": 1, "negative_mode": "in_batch"}),
    "own weight's value": (ValueError, "own_negative_weight: expected a finite number, got nan",
                           (Q, K, K), {"own_negative_weight": float("nan")}),
    "own weight's gradient": (ValueError, "own_negative_weight: expected no gradient", (Q, K, K),
                              {"own_negative_weight": torch.ones((), requires_grad=True)}),
    "weights below inf": (ValueError, "hard_negative_weight: expected numbers below inf, got nan",
                          (Q, K, NEG), {"hard_negative_weight": WEIGHTS}),
    "weight inf": (ValueError, "hard_negative_weight: expected numbers below inf, got inf",
                   (Q, K, OWN), {**PAIRED, "hard_negative_weight": torch.full((), torch.inf)}),
    "weight alone": (ValueError, "hard_negative_weight: expected 0 without negative_keys, got 1.0",
                     (Q, K), {"hard_negative_weight": 1.0}),
    "weights alone": (ValueError, "hard_negative_weight: expected 0 without .*, got a Tensor",
                      (Q, K), {"hard_negative_weight": torch.zeros(3)}),
    "own weight NaN": (ValueError, "own_negative_weight: expected a finite number, got nan",
                       (Q, K, K), {**IN_BATCH, "own_negative_weight": torch.tensor(torch.nan)}),
    "own weight -inf": (ValueError, "own_negative_weight: expected a finite number, got -inf",
                        (Q, K, K), {**IN_BATCH, "own_negative_weight": -torch.inf}),
    "own weight -inf in a tensor": (ValueError, "own_negative_weight: expected a finite .* -inf",
                                    (Q, K, K),
                                    {**IN_BATCH, "own_negative_weight": torch.tensor(-torch.inf)}),
    "sparse": (RuntimeError, "positive_key: expected a dense Tensor, got layout torch.sparse_coo",
               (Q, K.to_sparse()), {}),
    "sparse ids": (RuntimeError, "exclude: expected a dense Tensor, got layout torch.sparse_coo",
                   (Q, K), {"exclude": IDS.to_sparse()}),
    "exclude, smoothing": (ValueError, "exclude: expected none with label_smoothing", (Q, K),
                           {"exclude": IDS, "label_smoothing": 0.1}),
    "exclude, queue": (ValueError, "exclude: expected .*'unpaired' .*without negative_ids",
                       (Q, K, NEG), {"exclude": IDS}),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "arguments", "options"), BAD.values(), ids=BAD.keys())
def test_info_nce(error, message, arguments, options):
    with pytest.raises(error, match=message):
        neglog.info_nce(*arguments, **options)


CALLS = {
    "info_nce": lambda **options: neglog.info_nce(Q, K, **options),
    "nt_xent": lambda **options: neglog.nt_xent(Q, K, **options),
    "dcl": lambda **options: neglog.dcl(Q, K, **options),
    "sup_con": lambda **options: neglog.sup_con(Q, IDS, **options),
    "clip_loss": lambda **options: neglog.clip_loss(Q, K, 1.0, **options),
    "siglip_loss": lambda **options: neglog.siglip_loss(Q, K, 1.0, 0.0, **options),
}
TEMPERATURES = {
    "zero": (ValueError, "temperature: expected a number above 0, got 0", 0),
    "negative": (ValueError, "temperature: expected a number above 0, got -1.5", -1.5),
    "nan": (ValueError, "temperature: expected a number above 0, got nan", float("nan")),
    "text": (TypeError, "temperature: expected a number above 0, got str", "1"),
    "tensor": (ValueError, "temperature: expected numbers above 0, got -1", torch.tensor(-1.0)),
    "zero tensor": (ValueError, "temperature: expected numbers above 0, got 0", torch.zeros(1)),
    "shape": (RuntimeError, r"temperature: expected shape .*, got \[2\]", torch.ones(2)),
    "bool": (RuntimeError, "temperature: expected a real dtype", torch.tensor(True)),
    "integers": (ValueError, "temperature: expected numbers above 0, got 0", torch.tensor(0)),
}


# Each loss that takes one asks for itself.
@pytest.mark.parametrize(("error", "message", "value"), TEMPERATURES.values(), ids=TEMPERATURES)
@pytest.mark.parametrize("name", ["info_nce", "nt_xent", "dcl", "sup_con"])
def test_temperature(name, error, message, value):
    with pytest.raises(error, match=message):
        CALLS[name](temperature=value)


def test_numbers_on_the_meta_device():
    one = torch.ones((), device="meta")
    for function, arguments, named in (
        (neglog.info_nce, (Q, K), "temperature"),
        (neglog.nt_xent, (Q, K), "temperature"),
        (neglog.clip_loss, (Q, K), "logit_scale"),
        (neglog.siglip_loss, (Q, K, 1.0), "logit_bias"),
    ):
        with pytest.raises(RuntimeError, match=f"{named}: expected device cpu, got meta"):
            function(*arguments, **{named: one})


def test_temperature_of_each_row():
    with pytest.raises(ValueError, match="temperature: expected numbers above 0, got 0"):
        neglog.info_nce(Q, K, temperature=torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(RuntimeError, match=r"temperature: expected shape \[\], got \[3\]"):
        neglog.nt_xent(Q, K, torch.ones(3))


# Each loss that has one asks for itself; "no" is true.
@pytest.mark.parametrize("name", ["info_nce", "nt_xent", "dcl", "sup_con"])
def test_normalize_is_a_bool(name):
    with pytest.raises(TypeError, match="normalize: expected a bool, got str"):
        CALLS[name](normalize="no")


@pytest.mark.parametrize("flag", ["symmetric", "return_stats"])
def test_flags_of_info_nce_are_bools(flag):
    with pytest.raises(TypeError, match=f"{flag}: expected a bool, got int"):
        CALLS["info_nce"](**{flag: 1})


EXCLUDING = ["info_nce", "clip_loss", "siglip_loss", "nt_xent", "dcl"]


@pytest.mark.parametrize("name", EXCLUDING)
def test_exclude(name):
    for error, message, ids in (
        (RuntimeError, r"exclude: expected shape \[3\], got \[2\]", IDS[:2]),
        (RuntimeError, "exclude: expected integers, got torch.float32", IDS.float()),
        (TypeError, "exclude: expected a Tensor, got list", [1, 2, 3]),
    ):
        with pytest.raises(error, match=message):
            CALLS[name](exclude=ids)


@pytest.mark.parametrize("group", ["world", True, 3])
@pytest.mark.parametrize("name", ["clip_loss", "siglip_loss"])
def test_group(name, group):
    kind = type(group).__name__
    with pytest.raises(TypeError, match=f"group: expected a ProcessGroup .* or None, got {kind}"):
        CALLS[name](group=group)


# As int64 its largest number would be the id -1.
def test_ids_of_uint64_are_refused():
    ids = torch.tensor([0, 1, 2**64 - 1], dtype=torch.uint64)
    further = {"negative_keys": Q, "exclude": IDS, "negative_ids": ids}
    queue = neglog.nn.Queue(5, 4, with_ids=True)
    for name, call in {
        "exclude": lambda: neglog.info_nce(Q, K, exclude=ids),
        "negative_ids": lambda: neglog.info_nce(Q, K, **further),
        "positives": lambda: neglog.info_nce(Q, K, positives=ids[:, None]),
        r"positives\[1\]": lambda: neglog.info_nce(Q, K, positives=(IDS, ids)),
        "labels": lambda: neglog.sup_con(Q, ids),
        "ids": lambda: queue.push(Q, ids),
    }.items():
        with pytest.raises(RuntimeError, match=f"^{name}: expected integers that int64 holds"):
            call()


# What float() takes, and what a comparison with it would let pass; a tensor where it can be read.
@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_scale_and_bias_are_finite(value, kind):
    value = kind(value)
    with pytest.raises(ValueError, match="logit_scale: expected a finite number, got"):
        neglog.clip_loss(Q, K, value)
    with pytest.raises(ValueError, match="logit_bias: expected a finite number, got"):
        neglog.siglip_loss(Q, K, 1.0, value)


OPTIONS = {
    "unknown": (TypeError, "options: expected None or {'workspace_mb': number}", {"chunk": 3}),
    "number": (TypeError, "options: expected None or {'workspace_mb': number}, got 3", 3),
    "zero": (ValueError, "workspace_mb: expected a number above 0, got 0", {"workspace_mb": 0}),
    "nan": (ValueError, "workspace_mb: expected", {"workspace_mb": float("nan")}),
    "endless": (ValueError, "workspace_mb: expected", {"workspace_mb": float("inf")}),
    "text": (TypeError, "workspace_mb: expected a number above 0, got str", {"workspace_mb": "8"}),
}


# Each loss that has tiles asks for itself.
@pytest.mark.parametrize(("error", "message", "options"), OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("name", CALLS)
def test_options(name, error, message, options):
    with pytest.raises(error, match=message):
        CALLS[name](options=options)


# Less than a byte is above 0 too. 600 rows: by this loss's tiles, were any made of none.
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_smallest_workspace(symmetric):
    x = torch.randn(600, 4)
    found = neglog.info_nce(x, x, symmetric=symmetric, options={"workspace_mb": 1e-9})
    torch.testing.assert_close(found, neglog.info_nce(x, x, symmetric=symmetric))


@pytest.mark.parametrize("name", CALLS)
def test_backend(name):
    with pytest.raises(ValueError, match="unknown backend: 'gpu'"):
        CALLS[name](backend="gpu")


@pytest.mark.parametrize("name", ["nt_xent", "dcl", "sup_con"])
def test_reduction(name):
    with pytest.raises(ValueError, match="reduction: expected 'none', 'mean' or 'sum', got 'avg'"):
        CALLS[name](reduction="avg")


OTHERS = {
    "clip rows": (RuntimeError, "text_features: expected 3 rows, those of image_features",
                  lambda: neglog.clip_loss(Q, K[:2], 1.0)),
    "siglip integers": (RuntimeError, "image_features: expected dtype float32, float64",
                        lambda: neglog.siglip_loss(Q.int(), K.int(), 1.0, 0.0)),
    "scale shape": (RuntimeError, r"logit_scale: expected shape \[\], got \[3\]",
                    lambda: neglog.clip_loss(Q, K, torch.ones(3))),
    "scale type": (TypeError, "logit_scale: expected a number or a Tensor, got NoneType",
                   lambda: neglog.siglip_loss(Q, K, None, 0.0)),
    "bias shape": (RuntimeError, r"logit_bias: expected shape \[\], got \[1, 1\]",
                   lambda: neglog.siglip_loss(Q, K, 1.0, torch.ones(1, 1))),
    "clip bias": (TypeError, "logit_bias: expected a number or a Tensor, got str",
                  lambda: neglog.clip_loss(Q, K, 1.0, "0")),
    "views": (RuntimeError, r"z_j: expected 4 features, those of z_i, got \[3, 2\]",
              lambda: neglog.nt_xent(Q, K[:, :2])),
    "views' rows": (RuntimeError, r"z_j: expected 3 rows", lambda: neglog.dcl(Q, K[:2])),
    "labels": (RuntimeError, r"labels: expected shape \[3\], got \[2\]",
               lambda: neglog.sup_con(Q, IDS[:2])),
    "labels' dtype": (RuntimeError, "labels: expected integers, got torch.float32",
                      lambda: neglog.sup_con(Q, IDS.float())),
    "labels' type": (TypeError, "labels: expected a Tensor, or a list, .*, got str",
                     lambda: neglog.sup_con(Q, "abc")),
    "labels' number": (RuntimeError, r"labels: expected shape \[3\], got \[2\]",
                       lambda: neglog.sup_con(Q, ["a", "b"])),
    "labels' values": (TypeError, "labels: expected hashable values, .*, got one of .*'list'",
                       lambda: neglog.sup_con(Q, [1, 1, [2]])),
    "a column of labels": (RuntimeError, r"labels: expected shape \[3\], got \[3, 1\]",
                           lambda: neglog.sup_con(Q, IDS[:, None].numpy())),
    "labels among tensors": (TypeError, r"labels: .* Tensors of shape \[\] alone, got one of",
                             lambda: neglog.sup_con(Q, [1, torch.tensor(1), 2])),
    "tensors inside labels": (TypeError, r"labels: .* got one of a Tensor of shape \[\]",
                              lambda: neglog.sup_con(Q, [("a", torch.tensor(1))] * 3)),
    "labels of one number": (TypeError, r"labels: .* got one of a Tensor of shape \[1\]",
                             lambda: neglog.sup_con(Q, list(IDS[:, None]))),
    "labels of floats": (RuntimeError, "labels: expected integers, got torch.float32",
                         lambda: neglog.sup_con(Q, list(IDS.float()))),
    "scale's dtype": (RuntimeError, "logit_scale: expected a real dtype, got torch.complex64",
                      lambda: neglog.clip_loss(Q, K, torch.tensor(1j))),
    "no labels": (TypeError, r"labels: expected .* None with \[3, 4\]", lambda: neglog.sup_con(Q)),
    "features": (RuntimeError, r"features: expected shape \(N, D\), got \[1, 3, 5, 4\]",
                 lambda: neglog.sup_con(OWN[None], IDS)),
    "views' labels": (RuntimeError, r"labels: expected shape \[3\], got \[15\]",
                      lambda: neglog.sup_con(OWN, torch.arange(15))),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), OTHERS.values(), ids=OTHERS.keys())
def test_other_losses(error, message, call):
    with pytest.raises(error, match=message):
        call()
