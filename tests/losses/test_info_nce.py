"""neglog.info_nce: its forms and statistics, against the formula and another library."""

import info_nce as info_nce_pytorch
import pytest
import torch

import neglog
from neglog import dispatch
from tests.support import contrastive_formulas as formulas
from tests.support.contrastive_cases import (
    FORMS,
    TEMPERATURES,
    TILES,
    form,
    gradients,
    learned,
    normal,
    pair,
)
from tests.support.contrastive_formulas import INF


# Every form by every backend: the formula is a third answer, and a temperature of each row takes
# other code in all three.
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", FORMS)
def test_forms_of_info_nce(backend, name, temperature):
    inputs, options = form(name, temperature)
    for reduction in ("none", "mean", "sum"):
        with dispatch.record() as ran:
            ours = neglog.info_nce(*inputs, reduction=reduction, options=TILES, **options)
        in_memory = backend == "torch" or options.get("negative_mode") == "paired"
        by_rows = name in ("in batch", "smoothing") and reduction != "none" and backend != "torch"
        op = "linear_nll" if by_rows else "pairs"
        assert ran == [f"{op}:{'torch' if in_memory else backend}"]
        theirs = formulas.info_nce(*inputs, reduction=reduction, **options)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        found, expected = (gradients(loss, learned(inputs)) for loss in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


# Every form: each has other keys in its log-sum-exps.
@pytest.mark.parametrize("name", FORMS)
def test_statistics(backend, name):
    inputs, options = form(name, "of each row")
    stats = neglog.info_nce(*inputs, return_stats=True, options=TILES, **options)
    torch.testing.assert_close(stats.loss, formulas.info_nce(*inputs, **options))
    plain = {k: v for k, v in options.items() if k not in ("symmetric", "label_smoothing")}
    scores, target = formulas.info_nce_scores(*inputs, **plain)
    torch.testing.assert_close(stats.logsumexp, torch.logsumexp(scores, 1))
    assert torch.equal(stats.correct, scores.argmax(1) == target)
    p = torch.softmax(scores, 1)
    torch.testing.assert_close(stats.entropy, torch.special.entr(p).sum(1).detach())
    assert not stats.correct.requires_grad
    assert not stats.entropy.requires_grad
    grads = (gradients(lse, learned(inputs))
             for lse in (stats.logsumexp, torch.logsumexp(scores, 1)))  # fmt: skip
    torch.testing.assert_close(*grads)


# Products of one block of features, and of several.
@pytest.mark.parametrize("features", [24, 384])
def test_the_best_key_is_not_beaten_by_its_own_rounding(backend, features):
    query = normal(700, features, dtype=torch.float32)
    stats = neglog.info_nce(query, query + 0.1 * normal(700, features, dtype=query.dtype, seed=2),
                            temperature=0.01, return_stats=True)  # fmt: skip
    assert stats.correct.all()


# All that the other library has.
@pytest.mark.parametrize("mode", [None, "unpaired", "paired"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_info_nce_pytorch(backend, mode, reduction):
    query, key = pair(dtype=torch.float32)
    shape = {"unpaired": (150, 24), "paired": (300, 5, 24), None: (1,)}[mode]
    negatives = normal(*shape, dtype=torch.float32).requires_grad_() if mode else None
    inputs = learned((query, key, negatives))
    losses = [
        function(query, key, negatives, 0.07, reduction, mode or "unpaired")
        for function in (neglog.info_nce, info_nce_pytorch.info_nce)
    ]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*(gradients(x, inputs) for x in losses), rtol=1e-5, atol=1e-5)


# Each source of negatives; smoothing spreads over keys, of which there are none.
@pytest.mark.parametrize("mode", ["unpaired", "paired", "in_batch"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_no_negatives(backend, mode, smoothing):
    query, key = pair(7, 5)
    negatives = torch.zeros((7, 0, 5) if mode == "paired" else (0, 5), dtype=query.dtype)
    inputs = (query, key, negatives, torch.tensor(0.1, dtype=query.dtype, requires_grad=True))
    options = {"negative_mode": mode, "label_smoothing": smoothing}
    losses = [f(*inputs, **options) for f in (neglog.info_nce, formulas.info_nce)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(gradients(x, learned(inputs)) for x in losses))


# Each source of negatives.
@pytest.mark.parametrize("mode", ["unpaired", "paired", "in_batch"])
def test_all_negatives_are_padding(backend, mode):
    name = {"unpaired": "queue", "paired": "paired", "in_batch": "in batch and further"}[mode]
    inputs, options = form(name)
    losses = [
        f(*inputs, hard_negative_weight=-INF, **options)
        for f in (neglog.info_nce, formulas.info_nce)
    ]
    torch.testing.assert_close(*losses)
    found, expected = (gradients(x, learned(inputs)) for x in losses)
    torch.testing.assert_close(found, expected)
    assert not found[2].any()


def test_all_others_are_of_one_group(backend):
    query, key = pair(40)
    loss = neglog.info_nce(query, key, exclude=torch.zeros(40, dtype=torch.int32), symmetric=True)
    torch.testing.assert_close(loss, torch.zeros_like(loss))
    assert all(not g.any() for g in gradients(loss, (query, key)))


# float64 is no dtype of training; the others have other smallest norms.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zero_vectors(backend, dtype):
    query, key = pair(300, dtype=dtype)
    with torch.no_grad():
        query[::4] = 0
        key[::6] = 0
    tau = torch.tensor(0.1, requires_grad=True)
    loss = neglog.info_nce(query, key, None, tau, symmetric=True)
    expected = formulas.info_nce(query.double(), key.double(), None, tau, symmetric=True)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (tau, key))[:1])


def test_norms_too_large_for_float16(backend):
    query, key = (x.detach() * 1000 for x in pair(300, dtype=torch.float16))
    assert not (query * query).isfinite().all()
    loss = neglog.info_nce(query.requires_grad_(), key.requires_grad_())
    expected = formulas.info_nce(query.double(), key.double())
    torch.testing.assert_close(loss.double(), expected, rtol=2e-3, atol=2e-3)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (query, key)))


def test_not_contiguous(backend):
    query, key = pair(48, 60)
    found = neglog.info_nce(query.t(), key.t(), symmetric=True)
    torch.testing.assert_close(found, formulas.info_nce(query.t(), key.t(), symmetric=True))
    torch.testing.assert_close(
        gradients(found, (query, key)),
        gradients(formulas.info_nce(query.t(), key.t(), symmetric=True), (query, key)),
    )


# Some of the target, half and all of it; each source of negatives.
@pytest.mark.parametrize("smoothing", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("mode", ["in_batch", "unpaired", "paired"])
def test_smoothing_leaves_padding_out(backend, mode, smoothing):
    query, key = pair(6)
    keys = torch.randn(6, 3, query.shape[1], dtype=query.dtype)
    keys = keys if mode == "paired" else keys[0]
    weight = torch.tensor([0.0, -torch.inf, 1.0], dtype=query.dtype)
    temperature = torch.tensor(0.1, dtype=query.dtype, requires_grad=True)
    found = []
    for kept in ([0, 1, 2], [0, 2]):
        loss = neglog.info_nce(
            query, key, keys[..., kept, :], temperature, negative_mode=mode,
            hard_negative_weight=weight[kept], label_smoothing=smoothing,
        )  # fmt: skip
        found.append((loss, *torch.autograd.grad(loss, (query, key, temperature))))
    torch.testing.assert_close(*found)


# Each source of negatives.
@pytest.mark.parametrize("mode", ["in_batch", "unpaired", "paired"])
def test_statistics_of_nothing(backend, mode):
    x = torch.zeros(0, 4)
    negatives = torch.zeros(0, 2, 4) if mode == "paired" else torch.zeros(2, 4)
    stats = neglog.info_nce(x, x, negatives, negative_mode=mode, return_stats=True)
    assert stats.loss.isnan()
    assert [part.shape for part in stats[1:]] == [(0,)] * 3


# By each path that a temperature takes.
@pytest.mark.parametrize("value", [2, torch.tensor(2), torch.tensor([2] * 9)], ids=["n", "()", "N"])
def test_an_integer_for_the_temperature(value):
    query, key = pair(9, 5)
    for options in ({}, {"symmetric": True}):
        expected = neglog.info_nce(query, key, temperature=2.0, **options)
        found = neglog.info_nce(query, key, temperature=value, **options)
        torch.testing.assert_close(found, expected)


# A number is a scale of scores; a tensor scales the queries, and has a gradient.
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_dot_products_as_classes(backend, temperature):
    """Of rows alone, in more tiles than are kept, keys are classes; the scale goes into them."""
    inputs, options = form("in batch", temperature, rows=300)
    options = {**options, "normalize": False}
    with dispatch.record() as ran:
        ours = neglog.info_nce(*inputs, options=TILES, **options)
    assert backend == "torch" or ran == [f"linear_nll:{backend}"]
    theirs = formulas.info_nce(*inputs, **options)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(gradients(x, learned(inputs)) for x in (ours, theirs)))
