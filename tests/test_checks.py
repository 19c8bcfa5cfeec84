"""What is said where an argument of a loss over classes is wrong, and what is accepted.

Both at 3 rows and at 30,000: what a call accepts and raises does not depend on its size. Arguments
are checked before a backend is chosen, except for the range of targets, which the kernels check.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import neglog

# One that fits in a cache line, and one of many threads and tiles.
ROWS = (3, 30_000)


def names(table):
    return [pytest.param(name, rows, id=f"{name}-{rows}") for name in table(3) for rows in ROWS]


def refuses(function, case, rows, **options):
    """That a case's error is raised, with its message."""
    error, message, arguments, more = case
    with pytest.raises(error, match=message.replace("<rows>", str(rows))):
        function(*arguments, **options, **more)


def with_last(target, value):
    """A target out of range in its last row, which the last thread reads."""
    target = target.clone()
    target.view(-1)[-1] = value
    return target


def bad_cross_entropy(rows):
    X, T = torch.zeros(rows, 5), torch.arange(rows) % 5
    return {
        "batch": (ValueError, r"target: expected shape \[<rows>\].*got \[4\]",
                  (X, T.new_zeros(4)), {}),
        "multi-target": (RuntimeError, r"target: expected shape \[<rows>\]", (X, T[:, None]), {}),
        "K-dim": (RuntimeError, r"target: expected shape \[2, 3\].*got \[2, 4\]",
                  (torch.zeros(2, 5, 3), torch.zeros(2, 4, dtype=torch.int64)), {}),
        "scalar": (IndexError, r"input: expected shape", (torch.zeros(()), torch.tensor([1])), {}),
        "index dtype": (RuntimeError, r"target: expected dtype torch.int64 .*got torch.int32",
                        (X, T.int()), {}),
        "integer probabilities": (RuntimeError, r"target: expected a floating-point dtype",
                                  (X, X.long()), {}),
        "input dtype": (NotImplementedError, r"input: expected a floating-point dtype",
                        (X.long(), T), {}),
        "weight length": (RuntimeError, r"weight: expected shape \[5\], got \[4\]",
                          (X, T, torch.ones(4)), {}),
        "weight dtype": (RuntimeError, r"weight: expected dtype torch.float32, got torch.float64",
                         (X, T, torch.ones(5).double()), {}),
        "smoothing": (RuntimeError, r"label_smoothing: expected 0 <= value <= 1, got 1.5",
                      (X, T), {"label_smoothing": 1.5}),
        "smoothing of text": (TypeError, r"label_smoothing: expected a float, got str",
                              (X, T), {"label_smoothing": "0.1"}),
        "ignore_index": (TypeError, r"ignore_index: expected an int, got float",
                         (X, T), {"ignore_index": 1.5}),
        "classes last": (RuntimeError, r"classes are dimension 1, .* input.movedim\(-1, 1\)",
                         (torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)), {}),
        "one row": (ValueError, r"target: expected shape \[\]", (X[0], T[:2]), {}),
        "reduction": (ValueError, r"reduction: expected 'none', 'mean' or 'sum', got 'avg'",
                      (X, T), {"reduction": "avg"}),
        "list of reductions": (ValueError, r"reduction: expected .*, got \['mean'\]",
                               (X, T), {"reduction": ["mean"]}),
        "ignored probabilities": (RuntimeError, r"ignore_index: expected none", (X, X),
                                  {"ignore_index": 1}),
        "list input": (TypeError, r"input: expected a Tensor, got list", ([1.0], T), {}),
        "list target": (TypeError, r"target: expected a Tensor, got list", (X, [1]), {}),
        "target device": (RuntimeError, r"target: expected device cpu, got meta",
                          (X, T.to("meta")), {}),
        "list weight": (TypeError, r"weight: expected a Tensor or None, got list",
                        (X, T, [1.0] * 5), {}),
        "weight device": (RuntimeError, r"weight: expected device cpu, got meta",
                          (X, T, torch.ones(5, device="meta")), {}),
        "backend": (ValueError, r"(?s)backend: unknown backend: 'gpu'.*cython: available",
                    (X, T), {"backend": "gpu"}),
    }  # fmt: skip


@pytest.mark.parametrize(("name", "rows"), names(bad_cross_entropy))
def test_cross_entropy(name, rows):
    case = bad_cross_entropy(rows)[name]
    refuses(neglog.cross_entropy, case, rows)
    error, _, arguments, options = case
    if name != "backend":
        with pytest.raises(error):  # torch's own error is of the same type
            F.cross_entropy(*arguments, **options)


OURS = {
    "smoothing below 0": (RuntimeError, r"label_smoothing: expected 0 <= value <= 1, got -0.1",
                          {"label_smoothing": -0.1}),
    "smoothing NaN": (RuntimeError, r"label_smoothing: expected 0 <= value <= 1, got nan",
                      {"label_smoothing": float("nan")}),
    "softcap": (ValueError, r"softcap: expected a finite number above 0", {"softcap": 0.0}),
    "softcap inf": (ValueError, r"softcap: expected a finite number above 0 or None, got inf",
                    {"softcap": float("inf")}),
    "softcap beyond float64": (ValueError, r"softcap: .* got an int of 1329 bits",
                               {"softcap": 10**400}),
    "scale beyond float64": (ValueError, r"logit_scale: .* got an int of 16610 bits",
                             {"logit_scale": 10**5000}),
    "scale complex": (RuntimeError, r"logit_scale: expected a real dtype, got torch.complex64",
                      {"logit_scale": torch.tensor(2j)}),
    "index beyond int64": (ValueError, r"ignore_index: .* got an int of 16610 bits",
                           {"ignore_index": 10**5000}),
    "scale beyond float32": (ValueError, r"logit_scale: expected a finite number of torch.float32",
                             {"logit_scale": 1e39}),
    "z_loss beyond float32": (ValueError, r"z_loss: expected a finite number of torch.float32",
                              {"z_loss": 1e300}),
    "softcap text": (TypeError, r"softcap: expected a number, got str", {"softcap": "3"}),
    "logit_scale": (TypeError, r"logit_scale: expected a number, got NoneType",
                    {"logit_scale": None}),
    "z_loss": (ValueError, r"z_loss: expected a number from 0, got -1", {"z_loss": -1}),
    "z_loss with gradient": (ValueError, r"z_loss: expected a number without gradient",
                             {"z_loss": torch.ones((), requires_grad=True)}),
    "num_items with gradient": (ValueError, r"num_items: expected a number without gradient",
                                {"num_items": torch.ones((), requires_grad=True)}),
    "num_items none": (ValueError, r"num_items: expected reduction 'mean' or 'sum'",
                       {"num_items": 3, "reduction": "none"}),
    "num_items below 0": (ValueError, r"num_items: expected a number from 0, got -1",
                          {"num_items": torch.tensor(-1)}),
    "num_items shape": (ValueError, r"num_items: expected one number, got shape \[2\]",
                        {"num_items": torch.ones(2)}),
}  # fmt: skip


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("error", "message", "options"), OURS.values(), ids=OURS.keys())
def test_what_torch_has_not(error, message, options, rows):
    with pytest.raises(error, match=message):
        neglog.cross_entropy(torch.zeros(rows, 5), torch.arange(rows) % 5, **options)


def bad_masked(rows):
    X, T = torch.zeros(rows, 3, 5), torch.zeros(rows, 3, dtype=torch.int64)
    M = torch.ones(rows, 3) > 0
    return {
        "mask dtype": (RuntimeError, r"mask: expected dtype torch.bool, got torch.int64",
                       (X, T, T), {}),
        "mask shape": (RuntimeError, r"mask: expected shape \[<rows>, 3\] or .* got \[2\]",
                       (X, T, M[:2, 0]), {}),
        "mask list": (TypeError, r"mask: expected a Tensor, got list", (X, T, [True]), {}),
        "mask device": (RuntimeError, r"mask: expected device cpu, got meta",
                        (X, T, M.to("meta")), {}),
        "target shape": (RuntimeError, r"target: expected shape \[<rows>, 3\]", (X, T[0], M), {}),
        "target dtype": (RuntimeError, r"target: expected dtype torch.int64", (X, T.int(), M), {}),
        "target device": (RuntimeError, r"target: expected device cpu, got meta",
                          (X, T.to("meta"), M), {}),
        "scalar": (IndexError, r"input: expected shape \(..., C\), got a scalar",
                   (X[0, 0, 0], T, M), {}),
        "smoothing": (RuntimeError, r"label_smoothing", (X, T, M, None, "mean", 2.0), {}),
        "reduction": (ValueError, r"reduction: expected", (X, T, M, None, "avg"), {}),
    }  # fmt: skip


@pytest.mark.parametrize(("name", "rows"), names(bad_masked))
def test_masked_cross_entropy(name, rows):
    refuses(neglog.masked_cross_entropy, bad_masked(rows)[name], rows)


def bad_linear(rows):
    X, W, T = torch.zeros(rows, 4), torch.zeros(5, 4), torch.arange(rows) % 5
    return {
        "in_features": (RuntimeError, r"linear_weight: expected in_features 4",
                        (X, W[:, 1:], T), {}),
        "weight shape": (RuntimeError, r"linear_weight: expected shape", (X, W[0], T), {}),
        "bias": (RuntimeError, r"linear_bias: expected shape \[5\], got \[4\]", (X, W, T),
                 {"linear_bias": torch.zeros(4)}),
        "dtype": (RuntimeError, r"linear_weight: expected dtype torch.float32",
                  (X, W.double(), T), {}),
        "target": (ValueError, r"target: expected shape \[<rows>\]", (X, W, T[:2]), {}),
        "target shape": (RuntimeError, r"target: expected shape \[<rows>\]",
                         (X, W, T[:, None]), {}),
        "shifted twice": (ValueError, r"with shift=True pass the targets of all positions",
                          (X, W, T[1:]), {"shift": True}),
        "integers": (NotImplementedError, r"input: expected a floating-point dtype, got torch.int",
                     (T[:, None], T[:, None], T), {}),
        "shift": (TypeError, r"shift: expected a bool, got str", (X, W, T), {"shift": "no"}),
        "z_loss": (ValueError, r"z_loss: expected a finite number.*, got nan", (X, W, T),
                   {"z_loss": torch.nan}),
        "num_items": (ValueError, r"num_items: expected a number from 0, got -1", (X, W, T),
                      {"num_items": -1}),
        "target dtype": (RuntimeError, r"target: expected dtype torch.int64", (X, W, T.int()), {}),
        "class weight": (RuntimeError, r"weight: expected shape \[5\]", (X, W, T),
                         {"weight": torch.ones(4)}),
        "mask dtype": (RuntimeError, r"mask: expected dtype torch.bool", (X, W, T), {"mask": T}),
        "mask shape": (RuntimeError, r"mask: expected shape \[<rows>\]",
                       (X, W, T), {"mask": T[:2] > 0}),
        "options": (TypeError, r"options: expected None", (X, W, T), {"options": {"chunk": 3}}),
        "workspace": (ValueError, r"workspace_mb: expected a number above 0", (X, W, T),
                      {"options": {"workspace_mb": 0}}),
        "filter": (ValueError, r"filter_eps: expected 'auto' or 0 <= number < 1, got -1", (X, W, T),
                   {"options": {"filter_eps": -1}}),
        "smoothing": (RuntimeError, r"label_smoothing: expected", (X, W, T),
                      {"label_smoothing": 2.0}),
        "reduction": (ValueError, r"reduction: expected", (X, W, T), {"reduction": "avg"}),
        "ignored probabilities": (RuntimeError, r"ignore_index: expected none",
                                  (X, W, torch.zeros(rows, 5)), {"ignore_index": 1}),
        "weight device": (RuntimeError, r"linear_weight: expected device cpu, got meta",
                          (X, W.to("meta"), T), {}),
        "scalar": (RuntimeError, r"input: expected shape \(..., in_features\), got a scalar",
                   (X[0, 0], W, T), {}),
        "K-dim input": (RuntimeError, r"input: expected shape \(N, in_features\) with a K-dim",
                        (X[None], W[:, None], T[:, None]), {}),
        "shift of one vector": (RuntimeError, r"shift: expected an input of shape \(..., T, in",
                                (X[0], W, T[0]), {"shift": True}),
        "mask list": (TypeError, r"mask: expected a Tensor or None, got list",
                      (X, W, T), {"mask": [True]}),
        "mask device": (RuntimeError, r"mask: expected device cpu, got meta",
                        (X, W, T), {"mask": (T > 0).to("meta")}),
        "K-dim mask": (RuntimeError, r"mask: expected none", (X, W[:, None], T[:, None]),
                       {"mask": T[:, None] > 0}),
        "list": (TypeError, r"input: expected a Tensor, got list", ([1.0], W, T), {}),
    }  # fmt: skip


@pytest.mark.parametrize(("name", "rows"), names(bad_linear))
def test_linear_cross_entropy(name, rows):
    refuses(neglog.linear_cross_entropy, bad_linear(rows)[name], rows)


# What a backend itself finds or takes


def calls(rows):
    """Each loss over classes as a function of a target of `rows`, and of other arguments."""
    X, W, M = torch.zeros(rows, 5), torch.zeros(5, 4), torch.ones(rows, dtype=torch.bool)
    return {
        "cross_entropy": lambda t, x=X, **k: neglog.cross_entropy(x, t, **k),
        "masked_cross_entropy": lambda t, x=X, **k: neglog.masked_cross_entropy(x, t, M, **k),
        "linear_cross_entropy": lambda t, x=X, **k: neglog.linear_cross_entropy(
            torch.zeros(rows, 4, dtype=x.dtype), W.to(x.dtype), t, **k
        ),
    }


LOSSES = tuple(calls(3))


# Without a value that torch has not, and with one: the torch backend takes two paths.
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}], ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("value", [5, -7])
@pytest.mark.parametrize("name", LOSSES)
def test_the_range_of_targets(backend, name, value, rows, options):
    target = with_last(torch.arange(rows) % 5, value)
    message = rf"target {value} at row {rows - 1} is out of range: expected 0 <= target < 5"
    with pytest.raises(IndexError, match=message):
        calls(rows)[name](target, **options)


@pytest.mark.parametrize("argument", ["num_items", "logit_scale", "z_loss", "softcap"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_number_on_the_meta_device(name, argument):
    with pytest.raises(RuntimeError, match=f"{argument}: expected device cpu, got meta"):
        calls(3)[name](torch.arange(3), **{argument: torch.ones((), device="meta")})


# None and 0 too, which would stand for False.
@pytest.mark.parametrize("value", ["no", None, 0, 1], ids=repr)
@pytest.mark.parametrize(
    ("name", "flag"),
    [
        *((name, "return_stats") for name in LOSSES),
        *((name, "inplace_backward") for name in LOSSES if not name.startswith("linear")),
    ],
)
def test_a_flag_is_a_bool(name, flag, value):
    with pytest.raises(TypeError, match=f"^{flag}: expected a bool, got {type(value).__name__}"):
        calls(3)[name](torch.arange(3), **{flag: value})


X, T = torch.zeros(3, 5), torch.arange(3)
DENSE = {
    neglog.cross_entropy: {"input": X, "target": T, "weight": torch.ones(5)},
    neglog.masked_cross_entropy: {
        "input": X, "target": T, "mask": T >= 0, "weight": torch.ones(5)
    },
    neglog.linear_cross_entropy: {
        "input": X, "linear_weight": torch.ones(5, 5), "target": T, "linear_bias": torch.ones(5),
        "mask": T >= 0, "weight": torch.ones(5),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "name"), [(f, name) for f, given in DENSE.items() for name in given]
)
def test_a_tensor_that_is_not_strided(function, name):
    given = DENSE[function]
    others = [given[name].to_sparse()]
    if given[name].is_floating_point() and torch.backends.mkldnn.is_available():
        others.append(given[name].to_mkldnn())
    for other in others:
        with pytest.raises(RuntimeError, match=f"^{name}: expected a dense Tensor, got layout"):
            function(**given | {name: other})


# Types that torch takes, and those that only neglog's options have.
ACCEPTED = {
    "uint8": lambda t: (t.to(torch.uint8), {}),
    "probabilities": lambda t: (F.one_hot(t, 5).float(), {}),
    "an int for a float": lambda t: (t, {"label_smoothing": 0, "z_loss": 1, "softcap": 3}),
    "a tensor for a number": lambda t: (t, {"logit_scale": torch.tensor(0.5)}),
    "num_items as an int": lambda t: (t, {"num_items": 7}),
    "num_items beyond int64": lambda t: (t, {"num_items": 2**70}),
    "num_items as a tensor": lambda t: (t, {"num_items": torch.tensor([7])}),
}


# By every backend: what a type is turned into, each does below the checks.
@pytest.mark.parametrize("accepted", ACCEPTED.values(), ids=ACCEPTED.keys())
@pytest.mark.parametrize("name", LOSSES)
def test_what_is_accepted(backend, name, accepted):
    """All logits are 0, so each row has one loss, and a mean does not tell how many there are."""
    means = []
    for rows in ROWS:
        target, options = accepted(torch.arange(rows) % 5)
        loss = calls(rows)[name](target, **options)
        assert (loss.shape, loss.dtype) == ((), torch.float32)
        means.append(loss * float(options.get("num_items", rows)) / rows)
    torch.testing.assert_close(means[0].reshape(()), means[1].reshape(()))


# What holds one number: scalars of NumPy, arrays and tensors without dimensions, and for an int a
# tensor of one dimension.
NUMBERS = {
    "ignore_index": [np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor([3])],
    "label_smoothing": [
        np.float32(0.25), np.float64(0.25), np.int64(1), np.bool_(True), True, 1,
        torch.tensor(0.25), torch.tensor(1), torch.tensor(True),
    ],
}  # fmt: skip
EACH_NUMBER = [
    pytest.param(name, value, id=f"{name}-{value!r}")
    for name, values in NUMBERS.items()
    for value in values
]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("option", "value"), EACH_NUMBER)
def test_numbers_of_numpy_and_torch_are_taken_as_torch_takes_them(option, value, rows):
    x, target = torch.eye(5).repeat(rows, 1)[:rows], torch.arange(rows) % 5
    expected = F.cross_entropy(x, target, **{option: value})
    given = {option: value}
    losses = [
        neglog.cross_entropy(x, target, **given),
        neglog.nn.CrossEntropyLoss(**given)(x, target),
        neglog.linear_cross_entropy(x, torch.eye(5), target, **given),
    ]
    if option == "label_smoothing":
        losses.append(neglog.masked_cross_entropy(x, target, target >= 0, **given))
    for loss in losses:
        torch.testing.assert_close(loss, expected)


def test_numbers_of_numpy_and_torch_smooth_info_nce():
    x = torch.eye(5)
    expected = neglog.info_nce(x, x, label_smoothing=0.25)
    for value in (np.float32(0.25), torch.tensor(0.25)):
        assert torch.equal(neglog.info_nce(x, x, label_smoothing=value), expected)


# Those that torch takes as constants of one graph, and some that it breaks the graph for.
@pytest.mark.parametrize(
    ("option", "value", "whole"),
    [
        ("ignore_index", np.int64(3), True),
        ("ignore_index", torch.tensor(3), True),
        ("label_smoothing", np.float64(0.25), True),
        ("ignore_index", torch.tensor([3]), False),
        ("label_smoothing", np.float32(0.25), False),
        ("label_smoothing", torch.tensor(0.25), False),
    ],
    ids=repr,
)
def test_numbers_of_numpy_and_torch_are_taken_when_compiled(option, value, whole):
    x, target = torch.eye(5), torch.arange(5)

    @torch.compile(backend="eager", fullgraph=whole)
    def loss(x, target):
        return neglog.cross_entropy(x, target, **{option: value})

    torch.testing.assert_close(loss(x, target), F.cross_entropy(x, target, **{option: value}))


NO_NUMBERS = {
    "ignore_index": [True, np.bool_(True), torch.tensor(True), 3.0, np.float32(3),
                     torch.tensor(3.0), np.array([3]), torch.tensor([3, 3]), None],
    "label_smoothing": ["0.1", None, 1j, np.array([0.1]), torch.tensor([0.1, 0.1]),
                        torch.tensor(0.1, requires_grad=True)],
}  # fmt: skip


@pytest.mark.parametrize("option", NO_NUMBERS)
def test_what_torch_reads_no_number_from_is_refused(option):
    x, target = torch.zeros(3, 5), torch.arange(3)
    for value in NO_NUMBERS[option]:
        with pytest.raises((TypeError, RuntimeError)):  # RuntimeError of a bool in a tensor
            F.cross_entropy(x, target, **{option: value})
        with pytest.raises(TypeError, match=rf"{option}: expected (an int|a float), got "):
            neglog.cross_entropy(x, target, **{option: value})
    with pytest.raises(ValueError, match="ignore_index: expected an int of 64 bits"):
        neglog.cross_entropy(x, target, ignore_index=2**63)


# Each dtype that a kernel takes, and one that only torch's formula could.
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_the_dtype_of_the_loss(compiled_or_torch, name, dtype):
    for rows in ROWS:
        x, target = torch.zeros(rows, 5, dtype=dtype), torch.arange(rows) % 5
        assert calls(rows)[name](target, x).dtype == dtype
        stats = calls(rows)[name](target, x, return_stats=True)
        assert stats.logsumexp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
