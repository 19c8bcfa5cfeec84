"""Several positives a query in info_nce: the three ways to name them, against the formula."""

from functools import partial

import pytest
import torch

import neglog
from neglog import dispatch
from tests.support import contrastive_formulas as formulas
from tests.support.backends import BEST, NUMBA
from tests.support.contrastive_cases import (
    TEMPERATURES,
    TILES,
    gradients,
    learned,
    normal,
    of_learned,
    temperature_of,
)
from tests.support.contrastive_formulas import INF

WAYS = ("rows", "mask", "ids")


def ids_of(rows, keys):
    """Of queries and keys: those with no key, with one and with several."""
    return torch.arange(rows) * 5 % 7 - 3, torch.arange(keys) * 3 % 5 - 2


def named(way, rows, keys):
    """Positives as info_nce takes them, and the mask (N, M)."""
    of_query, of_key = ids_of(rows, keys)
    mask = of_query[:, None] == of_key
    if way == "ids":
        return (of_query, of_key), mask
    if way == "mask":
        return mask, mask
    most = max(1, int(mask.sum(1).max()))
    places = torch.where(mask, torch.arange(keys), keys).sort(1)[0][:, :most]
    return torch.where(places < keys, places, -1), mask


def embeddings(rows, keys, features=6, dtype=torch.float64, further=0):
    drawn = [normal(n, features, seed=s, dtype=dtype) for s, n in enumerate((rows, keys, further))]
    query, key, negatives = (x.requires_grad_() for x in drawn)
    return query, key, negatives if further else None


FORMS = {
    "keys alone": {},
    "symmetric": {"symmetric": True},
    "smoothing": {"label_smoothing": 0.3},
    "smoothing, symmetric": {"label_smoothing": 0.3, "symmetric": True},
    "further keys": {"further": 9, "hard_negative_weight": 0.7},
    "own hard negatives": {"further": "own", "own_negative_weight": 1.5, "label_smoothing": 0.2},
}


# Every way, in every form and with every temperature: each takes other code.
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients(backend, way, name, temperature):
    options, rows, keys = dict(FORMS[name]), 31, 23
    further = options.pop("further", 0)
    query, key, negatives = embeddings(rows, keys, further=rows if further == "own" else further)
    tau, (positives, mask) = temperature_of(temperature, rows), named(way, rows, keys)
    inputs = learned((query, key, negatives, tau))
    for reduction in ("none", "mean", "sum")["symmetric" in options :]:
        with dispatch.record() as ran:
            ours = neglog.info_nce(
                query, key, negatives, tau, reduction, "in_batch", positives=positives,
                options=TILES, **options,
            )  # fmt: skip
        assert set(ran) == {f"pairs:{backend}"}
        theirs = formulas.info_nce_of_several(
            query, key, negatives, tau, mask, reduction=reduction, **options
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        found, expected = (gradients(loss, inputs) for loss in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


# One row or key, and rests of blocks.
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 1), (7, 2), (31, 7)], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_sizes(backend, way, size):
    query, key, _ = embeddings(*size, dtype=torch.float32)
    positives, mask = named(way, *size)
    for symmetric in (False, True):
        options = {"reduction": "sum", "symmetric": symmetric}
        ours = neglog.info_nce(query, key, positives=positives, **options)
        theirs = formulas.info_nce_of_several(query, key, None, 0.1, mask, **options)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        grads = (gradients(loss, (query, key)) for loss in (ours, theirs))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_without_any(backend, way):
    """An empty batch, and one in which no query has a positive: 0, and gradients of 0."""
    query, key, _ = embeddings(4, 3)
    empty = torch.zeros(0, 6, requires_grad=True)
    nothing = {
        "rows": (torch.full((4, 2), -1), torch.zeros(0, 2, dtype=torch.long)),
        "mask": (torch.zeros(4, 3, dtype=torch.bool), torch.zeros(0, 3, dtype=torch.bool)),
        "ids": ((torch.zeros(4).long(), torch.ones(3).long()),
                (torch.zeros(0).long(), torch.ones(3).long())),
    }[way]  # fmt: skip
    for given, positives in zip((query, empty), nothing, strict=True):
        loss = neglog.info_nce(given, key.to(given.dtype), positives=positives, symmetric=True)
        assert loss == 0
        assert all(not g.any() for g in torch.autograd.grad(loss, (given, key)))
        rows = neglog.info_nce(given, key.to(given.dtype), None, 0.1, "none", positives=positives)
        assert rows.tolist() == [0.0] * len(given)


def test_no_column_of_rows(backend):
    """What a collate function makes of a batch in which nothing has a positive."""
    query, key, _ = embeddings(4, 3)
    loss, none = (
        neglog.info_nce(query, key, positives=rows, symmetric=True)
        for rows in (torch.zeros(4, 0, dtype=torch.long), torch.full((4, 1), -1))
    )
    assert loss == none == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, (query, key)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int16], ids=str)
def test_rows_of_any_integers(dtype):
    query, key, _ = embeddings(4, 3)
    rows = torch.tensor([[0, 2], [1, 1], [2, 0], [0, 1]])
    losses = [neglog.info_nce(query, key, positives=x) for x in (rows, rows.to(dtype))]
    torch.testing.assert_close(*losses)


# The best build in each dtype of training, Numba's in one; scores of 2, 14 and 100.
@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.01])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [*((BEST, d) for d in (torch.float32, torch.bfloat16)), *((n, torch.float32) for n in NUMBA)],
    ids=str,
)
@pytest.mark.parametrize("way", WAYS)
def test_error_is_within_torchs(backend, dtype, way, temperature):
    query, key, _ = embeddings(300, 200, 40, dtype)
    positives, mask = named(way, 300, 200)
    exact = [x.detach().double().requires_grad_() for x in (query, key)]

    def found(function, inputs, of):
        loss = function(*inputs, None, temperature, **of)
        return (loss, *torch.autograd.grad(loss, inputs))

    ours = found(neglog.info_nce, (query, key), {"positives": positives, "backend": backend})
    several = formulas.info_nce_of_several
    theirs = found(several, (query, key), {"positive": mask})
    truth = found(several, exact, {"positive": mask})

    def error(x, t):
        return float((x.detach().double() - t.detach()).norm() / t.detach().norm())

    for mine, other, t, least in zip(ours, theirs, truth, (torch.finfo(dtype).eps, 1e-6, 1e-6),
                                     strict=True):  # fmt: skip
        assert error(mine, t) <= 1.2 * error(other, t) + least


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_one_positive_that_is_sure(kernel_backend, way, symmetric):
    """Scores of 100: a difference of a log-sum-exp and a score made anew is off by 8e-6."""
    x = torch.nn.functional.normalize(normal(40, 12, dtype=torch.float32), dim=1)
    rows = torch.arange(40)
    positives = {"rows": rows[:, None], "mask": torch.eye(40, dtype=torch.bool),
                 "ids": (rows + 3, rows + 3)}[way]  # fmt: skip
    x.requires_grad_()
    options = {"positives": positives, "symmetric": symmetric}
    loss = neglog.info_nce(x, x.detach(), None, 0.01, "sum", **options)
    exact = formulas.info_nce_of_several(
        x.double(), x.detach().double(), None, 0.01, torch.eye(40, dtype=torch.bool),
        reduction="sum", symmetric=symmetric,
    )  # fmt: skip
    assert abs(loss.item() - exact.item()) < 40 * 1e-7
    assert (gradients(loss, (x,))[0] - gradients(exact, (x,))[0]).abs().max() < 1e-4


@pytest.mark.parametrize("further", [0, 31])
@pytest.mark.parametrize("way", WAYS)
def test_statistics(backend, way, further):
    """correct: the key with the highest score is a positive."""
    query, key, negatives = embeddings(31, 23, further=further)
    positives, mask = named(way, 31, 23)
    options = {"own_negative_weight": 0.5} if further else {}
    stats = neglog.info_nce(query, key, negatives, 0.3, negative_mode="in_batch", return_stats=True,
                            positives=positives, options=TILES, **options)  # fmt: skip
    scores = formulas.cosines(query, key) / 0.3
    if further:
        own = 0.5 * torch.eye(31, dtype=torch.float64)
        scores = torch.cat([scores, formulas.cosines(query, negatives) / 0.3 + own], 1)
    best = scores.argmax(1)
    is_positive = torch.cat([mask, torch.zeros(31, further, dtype=torch.bool)], 1)
    assert torch.equal(stats.correct, is_positive.gather(1, best[:, None]).squeeze(1))
    assert 0 < stats.correct.sum() < 31
    torch.testing.assert_close(stats.logsumexp, torch.logsumexp(scores, 1))
    entropy = torch.special.entr(torch.softmax(scores, 1)).sum(1).detach()
    torch.testing.assert_close(stats.entropy, entropy)
    theirs = formulas.info_nce_of_several(query, key, negatives, 0.3, mask, **options)
    torch.testing.assert_close(stats.loss, theirs)


# Each way; both directions.
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_derivatives(way, symmetric):
    query, key, _ = embeddings(5, 4, 3)
    tau = temperature_of("of each row", 5)
    loss = partial(neglog.info_nce, positives=named(way, 5, 4)[0], symmetric=symmetric)
    function, inputs = of_learned(loss, (query, key, None, tau))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("way", WAYS)
def test_compiles_whole(way):
    torch.compiler.reset()
    positives, _ = named(way, 9, 8)
    query, key, _ = embeddings(9, 8)

    def loss(query, key):
        return neglog.info_nce(query, key, positives=positives, symmetric=True)

    ours = torch.compile(loss, fullgraph=True, backend="aot_eager")(query, key)
    torch.testing.assert_close(ours, loss(query, key))
    grads = (gradients(x, (query, key)) for x in (ours, loss(query, key)))
    torch.testing.assert_close(*grads)


def test_no_number_for_each_pair():
    """Rows and ids of 5,000 x 5,000: 100 MB of scores, were they ever made."""
    x = normal(5_000, 2, dtype=torch.float32).requires_grad_()
    ids = torch.arange(5_000) // 2
    for positives in (torch.stack([ids * 2, ids * 2 + 1], 1), (ids, ids)):
        with torch.profiler.profile(profile_memory=True) as profiler:
            neglog.info_nce(
                x, x.detach(), None, 0.1, "sum", positives=positives, options=TILES
            ).backward()
        largest = max(event.self_cpu_memory_usage for event in profiler.events())
        assert 0 < largest < 10e6


def test_clip_of_several_captions(backend):
    """Images with captions each, as docs/losses.md says it: by ids, symmetric, dot products."""
    image, text, _ = embeddings(7, 21)
    of_text = torch.arange(21) // 3
    loss = neglog.info_nce(image, text, temperature=0.5, normalize=False, symmetric=True,
                           positives=(torch.arange(7), of_text))  # fmt: skip
    scores, mask = 2 * image @ text.t(), torch.arange(7)[:, None] == of_text
    expected = (formulas.of_several(scores, mask) + formulas.of_several(scores.t(), mask.t())) / 2
    torch.testing.assert_close(loss, expected)


# A mask is multiplied with all keys.
@pytest.mark.parametrize("way", ["rows", "ids"])
def test_an_infinite_key_spoils_whose_positive_it_is(backend, way):
    """Its score is -inf with every query, so it has no part in the others' losses."""
    query, key = normal(7, 5).abs(), normal(4, 5)
    key[0, 1] = -INF
    positives = {"rows": torch.tensor([[1, -1]] * 5 + [[0, 1], [-1, -1]]),
                 "ids": (torch.tensor([1, 1, 1, 1, 1, 0, 4]), torch.arange(4))}[way]  # fmt: skip
    loss = neglog.info_nce(query, key, reduction="none", positives=positives, normalize=False)
    log_p = torch.log_softmax(query @ key.t() / 0.1, 1)
    torch.testing.assert_close(loss[:5], -log_p[:5, 1])
    assert loss[5:].tolist() == [INF, 0]


def test_a_key_named_twice_counts_twice(backend):
    query, key, _ = embeddings(3, 4)
    rows = torch.tensor([[0, 0, 1], [2, -1, -1], [3, 3, -1]])
    log_p = torch.log_softmax(formulas.cosines(query, key) / 0.1, 1)
    expected = -torch.stack([log_p[0, [0, 0, 1]].mean(), log_p[1, 2], log_p[2, 3]])
    torch.testing.assert_close(
        neglog.info_nce(query, key, None, 0.1, "none", positives=rows), expected
    )


Q, K = torch.ones(3, 4), torch.ones(5, 4)
MASK = torch.ones(3, 5, dtype=torch.bool)
BAD = {
    "type": (TypeError, r"positives: expected a Tensor or a pair .*, got str", "ids", {}),
    "three": (TypeError, r"positives: expected a Tensor or a pair", (MASK,) * 3, {}),
    "mask": (RuntimeError, r"positives: expected shape \[3, 5\] of a mask, got \[3, 3\]",
             MASK[:, :3], {}),
    "mask's device": (RuntimeError, "positives: expected device cpu", MASK.to("meta"), {}),
    "floats": (RuntimeError, "positives: expected integers, got torch.float32", MASK.float(), {}),
    "rows": (RuntimeError, r"positives: expected shape \(3, P\), got \[2, 5\]",
             MASK[:2].long(), {}),
    "sparse mask": (RuntimeError, "positives: expected a dense Tensor, got layout",
                    MASK.to_sparse(), {}),
    "beyond, unsigned": (IndexError, "0 to 4, or -1, got 5",
                         torch.full((3, 2), 5, dtype=torch.uint32), {}),
    "one dimension": (RuntimeError, r"positives: expected .* got \[3\]", torch.arange(3), {}),
    "beyond": (IndexError, "positives: expected rows of positive_key, 0 to 4, or -1, got 5",
               torch.tensor([[5]] * 3), {}),
    "below": (IndexError, "or -1, got -2", torch.tensor([[-2]] * 3), {}),
    "query ids": (RuntimeError, r"positives\[0\]: expected shape \[3\], got \[5\]",
                  (torch.arange(5), torch.arange(5)), {}),
    "key ids": (RuntimeError, r"positives\[1\]: expected shape \[5\], got \[3\]",
                (torch.arange(3), torch.arange(3)), {}),
    "queue": (ValueError, "positives: expected negative_keys None or .*, got 'unpaired'", MASK,
              {"negative_keys": K}),
    "paired": (ValueError, "positives: expected negative_keys None or .*, got 'paired'", MASK,
               {"negative_keys": torch.ones(3, 2, 4), "negative_mode": "paired"}),
    "exclude": (ValueError, "exclude: expected none with positives", MASK,
                {"exclude": torch.arange(3)}),
    "unreduced": (ValueError, "reduction: expected 'mean' or 'sum' with symmetric", MASK,
                  {"symmetric": True, "reduction": "none"}),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "positives", "options"), BAD.values(), ids=BAD)
def test_bad_arguments(error, message, positives, options):
    with pytest.raises(error, match=message):
        neglog.info_nce(Q, K, positives=positives, **options)


def test_no_keys_at_all():
    with pytest.raises(RuntimeError, match=r"positive_key: expected a row at least, got \[0, 4\]"):
        neglog.info_nce(Q, K[:0], positives=MASK[:, :0])
