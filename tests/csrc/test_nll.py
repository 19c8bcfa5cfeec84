"""The CUDA kernels of nll: on a GPU and, emulated, on the CPU."""

import pytest
import torch

from neglog import reference
from tests.support.cuda_devices import (
    GRADIENT,
    LOSS,
    MEAN,
    NONE,
    OPTIONS,
    SUM,
    normal,
    off,
    real_of,
)

INF, NAN = float("inf"), float("nan")
SHAPES = [(1, 1), (2, 7), (7, 31), (5, 257), (3, 2049), (2, 9001)]


UPSTREAM = ("grad_loss", "grad_lse", "grad_entropy")


def problem(shape, dtype, probabilities, device, seed=0):
    """Logits at a row stride that no vector divides, a target, a class weight."""
    rows, vocab = shape
    logits = (normal(rows, vocab + 3, seed=seed) * 3).to(dtype)
    weight = (normal(vocab, seed=seed + 1).abs() + 0.5).to(real_of(dtype))
    if probabilities:
        target = normal(rows, vocab, seed=seed + 2).softmax(1).to(dtype)
    else:
        target = normal(rows, seed=seed + 2).abs().mul(1e6).long() % vocab
        target[1::5] = -100
    return logits.to(device)[:, 2:-1], target.to(device), weight.to(device)


def weighted_problem(shape, dtype, probabilities, device):
    """A problem with a weight of each row, not adjacent in memory; one is negative. Of rows that
    weigh 0 the target is none, and of one of them the logits are NaN."""
    logits, target, weight = problem(shape, dtype, probabilities, device)
    token_weight = torch.tensor([0.5, 0.0, -1.5, 1.0, 3.0, -0.0, 0.25], dtype=real_of(dtype))
    token_weight = token_weight.to(device).repeat_interleave(2)[::2]
    logits[1] = NAN
    target[token_weight == 0] = NAN if probabilities else shape[1]
    return logits, target, weight, token_weight


def truth(logits, target, weight, options, token_weight=None, **more):
    smoothing, scale, softcap, z_loss = options
    target = target.cpu()
    return reference.nll(
        logits.double().cpu().numpy(),
        target.double().numpy() if target.dim() == 2 else target.numpy(),
        weight=None if weight is None else weight.double().cpu().numpy(),
        token_weight=None if token_weight is None else token_weight.double().cpu().numpy(),
        label_smoothing=smoothing, logit_scale=scale, softcap=softcap or None, z_loss=z_loss,
        **more,
    )  # fmt: skip


# Each dtype loads other vectors. Less than one, a rest, a warp's, a block's, and several loads of a
# block's threads; the options call every function of row.cuh; each kind of target is other code.
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nll_against_the_oracle(device, dtype, shape, options, probabilities):
    logits, target, weight = problem(shape, dtype, probabilities, device.name)
    values = (MEAN, -100, *options)
    expected = truth(logits, target, weight, options)
    loss, lse, low, total, correct, entropy, argmax = device.ops.nll(
        logits, target, weight, None, None, *values, True, ""
    )
    assert off(loss, expected.loss) <= LOSS[dtype]
    assert off(lse.double() + low.double(), expected.lse) <= LOSS[dtype]
    assert off(entropy, expected.entropy) <= 10 * LOSS[dtype]
    assert correct.tolist() == expected.correct.tolist()
    assert argmax.tolist() == expected.argmax.tolist()
    upstream = torch.ones((), dtype=loss.dtype, device=device.name)
    gradient = device.ops.nll_backward(
        upstream, None, None, logits, target, weight, None, lse, low, None, total, *values, ""
    )
    assert off(gradient, expected.grad) <= GRADIENT[dtype]


# More than one block sums: a cluster shares them out.
@pytest.mark.parametrize("reduction", [MEAN, SUM])
@pytest.mark.parametrize("in_place", [False, True])
def test_sums_over_many_rows(device, dtype, reduction, in_place):
    logits, target, weight = problem((9001, 2), dtype, False, device.name)
    expected = truth(
        logits, target, weight, OPTIONS["plain"], reduction=("none", "mean", "sum")[reduction]
    )
    op = device.ops.nll_ if in_place else device.ops.nll
    made = op(logits, target, weight, None, None, reduction, -100, *OPTIONS["plain"], False, "")
    assert off(made[0], expected.loss) <= LOSS[dtype]
    assert off(made[2 if in_place else 3], expected.total_weight) <= LOSS[dtype]


# A mean is divided in the forward, in float16 in the backward; the others never.
@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_nll_in_place_and_its_upstream(device, dtype, options, reduction):
    """Nothing is written beside the logits, in front of them, behind or between."""
    given, target, weight = problem((7, 2049), dtype, False, device.name)
    memory = torch.full((9, 2060), 7.0, dtype=dtype, device=device.name)
    logits = memory[1:-1, 5:-6]
    logits.copy_(given)
    name = ("none", "mean", "sum")[reduction]
    expected = truth(given, target, weight, options, reduction=name)
    loss, lse, total, *_ = device.ops.nll_(
        logits, target, weight, None, None, reduction, -100, *options, False, ""
    )
    late = dtype == torch.float16 and reduction == MEAN  # divided in the backward
    assert off(loss, expected.loss) <= LOSS[dtype]
    assert off(logits / total if late else logits, expected.grad) <= GRADIENT[dtype]
    before = logits.clone()
    device.ops.nll_scale_(logits, torch.tensor(1.0, dtype=lse.dtype, device=device.name))
    assert torch.equal(logits, before)
    factor = torch.linspace(-1, 2, 7, dtype=lse.dtype, device=device.name)
    device.ops.nll_scale_(logits, factor)
    assert torch.equal(logits, (before * factor[:, None]).to(dtype))
    logits.fill_(7.0)
    assert bool((memory == 7.0).all())


# Bytes of a row that is held by one block, and by clusters of two, four and eight.
ON_CHIP = {"one": 33 << 10, "two": 100 << 10, "four": 250 << 10, "eight": 513 << 10}


# Rows at a vector's boundary and past it; blocks in order and in reverse, as a GPU has none.
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("row_bytes", ON_CHIP.values(), ids=ON_CHIP.keys())
def test_nll_in_place_on_chip(device, dtype, row_bytes, reverse, aligned, monkeypatch):
    """Rows that stay in shared memory, at every alignment; softcap and z_loss, ignored rows, rows
    of -inf; nothing beside them is written."""
    if reverse:
        monkeypatch.setenv("NEGLOG_REVERSED", "1")
    vocab = row_bytes // dtype.itemsize + 5
    given, target, weight = problem((4, vocab), dtype, False, device.name)
    given[2, ::2] = -INF
    target[:] = torch.tensor([vocab - 1, -100, 1, vocab // 2])
    memory = torch.full((4, vocab + 40), 7.0, dtype=dtype, device=device.name)
    start = 16 // dtype.itemsize if aligned else 3
    logits = memory[:, start : start + vocab]
    logits.copy_(given)
    options = (0.0, *OPTIONS["all"][1:])
    expected = truth(given, target, weight, options, reduction="sum")
    loss, lse, *_ = device.ops.nll_(
        logits, target, weight, None, None, SUM, -100, *options, False, ""
    )
    assert off(loss, expected.loss) <= 10 * LOSS[dtype]
    assert off(lse[[0, 2, 3]], expected.lse[[0, 2, 3]]) <= LOSS[dtype]
    assert off(logits, expected.grad) <= GRADIENT[dtype]
    assert not logits[1].any()
    logits.fill_(7.0)
    assert bool((memory == 7.0).all())


def test_nll_of_columns_that_are_not_adjacent(device):
    given, target, weight = problem((5, 257), torch.float32, False, device.name)
    logits = given.t().contiguous().t()
    options = OPTIONS["all"]
    expected = truth(given, target, weight, options)
    device.ops.nll_(logits, target, weight, None, None, MEAN, -100, *options, False, "")
    assert off(logits, expected.grad) <= GRADIENT[torch.float32]
    device.ops.nll_scale_(logits, torch.tensor(2.0, device=device.name))
    assert off(logits, 2 * expected.grad) <= GRADIENT[torch.float32]


@pytest.mark.parametrize("probabilities", [False, True])
def test_nll_with_an_upstream_for_each_row_its_lse_and_entropy(device, dtype, probabilities):
    logits, target, weight = problem((7, 257), dtype, probabilities, device.name)
    options = OPTIONS["all"]
    _, lse, low, total, _, entropy, _ = device.ops.nll(
        logits, target, weight, None, None, NONE, -100, *options, True, ""
    )
    grads = normal(3, 7).to(lse.dtype).to(device.name)
    by_row = {name: g.double().cpu().numpy() for name, g in zip(UPSTREAM, grads, strict=True)}
    expected = truth(
        logits, target, weight, options, reduction="none", **by_row,
    )  # fmt: skip
    kept = (lse, low, entropy, total)
    gradient = device.ops.nll_backward(
        *grads, logits, target, weight, None, *kept, NONE, -100, *options, ""
    )
    assert off(gradient, expected.grad) <= GRADIENT[dtype]


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
def test_nll_with_weights_of_rows(device, dtype, reduction, options, probabilities):
    logits, target, *weights = weighted_problem((7, 257), dtype, probabilities, device.name)
    values = (reduction, -100, *options)
    loss, lse, low, total, correct, entropy, argmax = device.ops.nll(
        logits, target, *weights, None, *values, True, ""
    )
    rows = loss.numel()
    grads = normal(3, 7).to(lse.dtype).to(device.name)
    grads = (grads[0, :rows].view(loss.shape), *grads[1:])
    by_row = {name: g.double().cpu().numpy() for name, g in zip(UPSTREAM, grads, strict=True)}
    name = ("none", "mean", "sum")[reduction]
    expected = truth(
        logits, target, weights[0], options, weights[1], reduction=name, **by_row,
    )  # fmt: skip
    assert off(loss, expected.loss) <= LOSS[dtype]
    assert off(lse.double() + low.double(), expected.lse) <= LOSS[dtype]
    assert off(total, expected.total_weight) <= LOSS[dtype]
    assert correct.tolist() == expected.correct.tolist()
    assert argmax.tolist() == expected.argmax.tolist()
    kept = (logits, target, *weights, lse, low, entropy, total)
    gradient = device.ops.nll_backward(*grads, *kept, *values, "")
    assert off(gradient, expected.grad) <= GRADIENT[dtype]
    alone = device.ops.nll_backward(grads[0], None, None, *kept, *values, "")
    assert not alone[1].any()
    assert not alone[5].any()


# Short rows, and rows that are held by one block and by a cluster of two.
@pytest.mark.parametrize("row_bytes", [1 << 10, ON_CHIP["one"], ON_CHIP["two"]], ids=str)
@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
def test_nll_in_place_with_weights_of_rows(device, dtype, reduction, row_bytes):
    shape = (7, row_bytes // dtype.itemsize)
    given, target, *weights = weighted_problem(shape, dtype, False, device.name)
    options = OPTIONS["scaled"]
    name = ("none", "mean", "sum")[reduction]
    expected = truth(given, target, weights[0], options, weights[1], reduction=name)
    logits = given.contiguous()
    loss, _, total, *_ = device.ops.nll_(
        logits, target, *weights, None, reduction, -100, *options, False, ""
    )
    late = dtype == torch.float16 and reduction == MEAN  # divided in the backward
    assert off(loss, expected.loss) <= 10 * LOSS[dtype]
    assert off(logits / total if late else logits, expected.grad) <= GRADIENT[dtype]
    assert not logits[1].any()
    assert not logits[5].any()


@pytest.mark.parametrize("probabilities", [False, True])
def test_nll_with_weights_of_one_has_the_bits_of_none(device, dtype, probabilities):
    logits, target, weight = problem((7, 257), dtype, probabilities, device.name)
    ones = torch.ones((), dtype=real_of(dtype), device=device.name).expand(7)
    values = (MEAN, -100, *OPTIONS["all"])
    found = []
    for token_weight in (None, ones):
        given = (logits, target, weight, token_weight)
        outputs = device.ops.nll(*given, None, *values, True, "")
        loss, lse, low, total, *_ = outputs
        gradient = device.ops.nll_backward(
            torch.ones_like(loss), None, None, *given, lse, low, None, total, *values, ""
        )
        found.append((*outputs, gradient))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


def test_nll_refuses_weights_of_rows_that_do_not_fit(device):
    logits, target, weight = problem((7, 31), torch.float32, False, device.name)
    ones = torch.ones(7, device=device.name)
    for wrong in (ones[:6], ones.double(), ones[0], ones[:, None]):
        with pytest.raises(RuntimeError, match="token_weight: expected"):
            device.ops.nll(
                logits, target, weight, wrong, None, MEAN, -100, *OPTIONS["plain"], False, ""
            )


# Within one vector and over several.
@pytest.mark.parametrize("vocab", [5, 300])
def test_nll_of_extremes(device, dtype, vocab):
    rows = [[-INF], [INF], [NAN], [1e4], [-1e4], [1e4, -1e4], [-INF, 0.0], [INF, -INF], [NAN, INF]]
    logits = torch.zeros(len(rows), vocab, dtype=torch.float64)
    for row, start in zip(logits, rows, strict=True):
        row[: len(start)] = torch.tensor(start)
    logits = torch.cat([logits, torch.full((1, vocab), -INF)]).to(dtype).to(device.name)
    target = torch.full((len(logits),), vocab - 1, device=device.name)
    options = OPTIONS["plain"]
    expected = truth(logits, target, None, options, reduction="none")
    loss, lse, low, total, _, entropy, argmax = device.ops.nll(
        logits, target, None, None, None, NONE, -100, *options, True, ""
    )
    assert off(loss, expected.loss) <= LOSS[dtype]
    assert off(entropy, expected.entropy) <= LOSS[dtype]
    assert argmax.tolist() == logits.argmax(1).tolist()
    ones = torch.ones(len(logits), dtype=lse.dtype, device=device.name)
    kept = (logits, target, None, None, lse, low, entropy, total)
    for grads in ((ones, None, None), (ones, ones, ones)):
        upstream = {n: float(g is not None) for n, g in zip(UPSTREAM, grads, strict=True)}
        expected = truth(logits, target, None, options, reduction="none", **upstream)
        gradient = device.ops.nll_backward(*grads, *kept, NONE, -100, *options, "")
        assert off(gradient, expected.grad) <= GRADIENT[dtype]


# As kernels/cython has it: beyond the range of what is computed in there is no cap.
@pytest.mark.parametrize("softcap", [1e300, 1e-300])
def test_nll_of_softcaps_beyond_the_range(device, dtype, softcap):
    logits, target, _ = problem((7, 31), dtype, False, device.name)
    logits[0, :2] = 0
    options = (0.0, 1.0, softcap, 0.0)
    expected = truth(logits, target, None, options, reduction="none")
    given = (NONE, -100, *options)
    loss, lse, low, total, *_ = device.ops.nll(logits, target, None, None, None, *given, False, "")
    assert off(loss, expected.loss) <= LOSS[dtype]
    kept = (logits, target, None, None, lse, low, None, total)
    gradient = device.ops.nll_backward(torch.ones_like(lse), None, None, *kept, *given, "")
    assert off(gradient, expected.grad) <= GRADIENT[dtype]


def test_nll_of_an_ignored_row_whose_lse_is_no_number(device, dtype):
    """Its gradient is 0, and softmax where the log-sum-exp is a number."""
    rows = [[NAN, 0.0], [INF, 0.0], [-INF, -INF], [-INF, 1.0]]
    logits = torch.tensor(rows, dtype=dtype, device=device.name)
    target = torch.full((4,), -100, device=device.name)
    given = (NONE, -100, *OPTIONS["plain"])
    _, lse, low, total, _, entropy, _ = device.ops.nll(
        logits, target, None, None, None, *given, True, ""
    )
    ones = torch.ones_like(lse)
    kept = (logits, target, None, None, lse, low, entropy, total)
    gradient = device.ops.nll_backward(ones, ones, ones, *kept, *given, "")
    assert gradient.tolist() == [[0, 0], [0, 0], [0, 0], [0, 1]]


def test_nll_of_nothing(device):
    for rows, vocab in ((0, 5), (3, 0)):
        logits = torch.empty(rows, vocab, device=device.name)
        target = torch.full((rows,), -100, device=device.name)
        loss = device.ops.nll(
            logits, target, None, None, None, MEAN, -100, *OPTIONS["plain"], False, ""
        )[0]
        assert loss.isnan()


@pytest.mark.parametrize("probabilities", [False, True])
def test_nll_of_no_classes(device, probabilities):
    """Rows without columns, whose memory has no address: nothing is read, nothing written."""
    logits = torch.empty(4, 0, device=device.name)
    target = torch.empty(4, 0) if probabilities else torch.full((4,), -100)
    target, options = target.to(device.name), OPTIONS["plain"]
    for reduction in (NONE, MEAN, SUM):
        given = (logits, target, None, None, None, reduction, -100, *options)
        loss, lse, low, total, *_ = device.ops.nll(*given, True, "")
        again, *_ = device.ops.nll_(*given, False, "")
        torch.testing.assert_close(again, loss, equal_nan=True)
        kept = (*given[:4], lse, low, None, total)
        grad = device.ops.nll_backward(torch.ones_like(loss), None, None, *kept, *given[5:], "")
        assert grad.shape == (4, 0)


def test_nll_has_the_same_bits_in_any_order(device, dtype, monkeypatch):
    logits, target, weight = problem((7, 2049), dtype, False, device.name)
    found = []
    for reverse in (False, True):
        if reverse:
            monkeypatch.setenv("NEGLOG_REVERSED", "1")
        copy = logits.clone()
        outputs = device.ops.nll_(
            copy, target, weight, None, None, MEAN, -100, *OPTIONS["all"], True, ""
        )
        found.append((*outputs, copy))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


# linear_nll
