"""nll as eager calls take it: a gradient is formed in the forward, and handed over if it fits.

What is handed over must be, bit for bit, what two passes give; and where the backward is none of
the usual, it must not be handed over at all.
"""

import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F

import neglog
from neglog import dispatch, settings
from neglog.ops.nll import cpu, remembered, schema
from neglog.ops.nll.eager import nll
from neglog.ops.nll.schema import MEAN, NONE, SUM, Options
from tests.support.backends import BEST, KERNELS
from tests.support.nll_tensors import in_checkpoint, large

PLAIN = Options(MEAN, -100, 0.0, 1.0, 0.0, 0.0)
ALL = Options(SUM, -100, 0.2, 0.7, 5.0, 0.1)
# One thread, and several with kept memory for the gradient.
SHAPES = [(6, 40), (1100, 1000)]
# What a loss may be multiplied with. 0 and -0 are equal, and the zeros of their gradients are not.
UPSTREAMS = [1.0, 1 / 3, 65536.0, 0.0, -0.0, math.inf, math.nan]


@pytest.fixture(autouse=True)
def nothing_remembered():
    remembered.forget()


def tensors(shape=(6, 40), dtype=torch.float32):
    logits, target = large(dtype, shape[0] + 7, shape[1])
    return logits.detach()[7:].clone().requires_grad_(), target[7:]


def loss_of(logits, target, options=PLAIN, weights=(None, None), backend=""):
    return nll(logits, target, *weights, None, options, False, backend).loss


def by_two_passes(logits, target, options=PLAIN, weights=(None, None), backend="", upstream=1.0):
    """Loss and gradient by a forward and a backward."""
    given = (logits.detach(), target, *weights)
    out = cpu.forward(schema.forward.Arguments(*given, None, *options, True, backend))
    upstream = torch.tensor(upstream, dtype=out.lses.dtype)
    lses = cpu.lse_and_low(out.lses, len(target), out.lses.dtype)
    kept = (*given, *lses, None, out.total_weight())
    arguments = schema.backward.Arguments(upstream, None, None, *kept, *options, backend)
    return out.loss(options.reduction), cpu.backward(arguments, out.divisor)


def gradient(loss, logits, upstream=1.0, **how):
    return torch.autograd.grad(loss, logits, torch.tensor(upstream, dtype=loss.dtype), **how)[0]


def equal(found, expected):
    """Bit for bit: also the signs of zeros."""
    assert found.dtype == expected.dtype
    assert torch.equal(
        found.contiguous().flatten().view(torch.uint8),
        expected.contiguous().flatten().view(torch.uint8),
    )


# Each dtype has a kernel of its own; the options call all of it; a weight and probabilities are
# read by other code. One number, one block and a part, several blocks.
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *((BEST, dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16)),
        *((name, torch.float32) for name in KERNELS),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [PLAIN, ALL, ALL._replace(reduction=MEAN)], ids=str)
@pytest.mark.parametrize("kind", ["indices", "weights", "probabilities"])
@pytest.mark.parametrize("shape", [(1, 1), (6, 40), (31, 5000)], ids=str)
def test_the_bits_are_those_of_two_passes(backend, dtype, options, kind, shape):
    logits, target = tensors(shape, dtype)
    target[0] = -100 if shape[0] > 1 else 0
    if kind == "probabilities":
        target = torch.softmax(logits.detach().float().flip(1), 1).to(dtype)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    weights = (None, None)
    if kind == "weights":
        weights = tuple(torch.linspace(0.5, 2, size, dtype=real) for size in reversed(shape))
    given = (logits, target, options, weights, backend)
    for upstream in UPSTREAMS:
        expected_loss, expected = by_two_passes(*given, upstream)
        gradient(loss_of(*given), logits, upstream)
        loss = loss_of(*given)
        equal(loss.detach(), expected_loss)
        equal(gradient(loss, logits, upstream), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_what_is_formed_is_for_the_last_upstream(kernel_backend, shape, upstream):
    logits, target = tensors(shape)
    for step in range(4):
        loss = loss_of(logits, target, backend=kernel_backend)
        formed = loss.grad_fn.formed
        before = None if formed is None else formed.clone()
        with dispatch.record() as ran:
            found = gradient(loss, logits, upstream)
        assert ran == [f"nll_backward:{kernel_backend}"]
        expected = by_two_passes(logits, target, backend=kernel_backend, upstream=upstream)[1]
        equal(found, expected)
        remembers = upstream == 1.0 or (step and upstream and not math.isnan(upstream))
        assert (formed is not None) == bool(remembers or step < settings.PATIENCE["remembered"])
        if formed is not None:  # by a second pass, if another was expected, in the same memory
            assert found.data_ptr() == formed.data_ptr()
            if remembers:
                equal(before, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_second_backward(kernel_backend, shape):
    logits, target = tensors(shape)
    loss = loss_of(logits, target, backend=kernel_backend)
    found = [gradient(loss, logits, up, retain_graph=True) for up in (1.0, 1.0, 3.0, 1.0)]
    for one, upstream in zip(found, (1.0, 1.0, 3.0, 1.0), strict=True):
        given = {"backend": kernel_backend, "upstream": upstream}
        equal(one, by_two_passes(logits, target, **given)[1])
    assert len({one.data_ptr() for one in found}) == 4
    gradient(loss, logits)
    with pytest.raises(RuntimeError, match="second time"):
        gradient(loss, logits)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_handed_over_is_the_users_alone(kernel_backend, shape):
    """They may change it: no backward after it, and no logits, may change with it."""
    logits, target = tensors(shape)
    before = logits.detach().clone()
    loss = loss_of(logits, target, backend=kernel_backend)
    address = loss.grad_fn.formed.data_ptr()
    first = gradient(loss, logits, retain_graph=True)
    assert first.data_ptr() == address
    assert loss.grad_fn.formed is None
    first.fill_(7.0)
    equal(gradient(loss, logits), by_two_passes(logits, target, backend=kernel_backend)[1])
    equal(logits.detach(), before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_a_leaf_are_added(kernel_backend, shape):
    logits, target = tensors(shape)
    expected = by_two_passes(logits, target, backend=kernel_backend)[1]
    for _ in range(2):
        loss_of(logits, target, backend=kernel_backend).backward()
    equal(logits.grad, 2 * expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_create_graph(kernel_backend, shape):
    logits, target = tensors(shape, torch.float64)
    loss = loss_of(logits, target, backend=kernel_backend)
    (first,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert first.requires_grad
    equal(first.detach(), by_two_passes(logits, target, backend=kernel_backend)[1])
    own = torch.autograd.grad(F.cross_entropy(logits, target), logits, create_graph=True)[0]
    seconds = [torch.autograd.grad(x.square().sum(), logits)[0] for x in (first, own)]
    torch.testing.assert_close(*seconds)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_batch_of_upstreams(kernel_backend, shape):
    logits, target = tensors(shape)
    loss = loss_of(logits, target, backend=kernel_backend)
    upstreams = torch.tensor([1.0, 0.5, -2.0])
    (found,) = torch.autograd.grad(loss, logits, upstreams, is_grads_batched=True)
    for one, upstream in zip(found, upstreams.tolist(), strict=True):
        equal(one, by_two_passes(logits, target, backend=kernel_backend, upstream=upstream)[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hooks_of_tensors_see_and_change_what_flows(kernel_backend, shape):
    logits, target = tensors(shape)
    for _ in range(3):  # the last time what the hook makes of 1 was expected
        x = logits * 1
        loss = loss_of(x, target, backend=kernel_backend)
        loss.register_hook(lambda upstream: 3 * upstream)
        x.register_hook(lambda grad: 2 * grad)
        given = {"backend": kernel_backend, "upstream": 3.0}
        equal(gradient(loss, logits), 2 * by_two_passes(logits, target, **given)[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("changed", ["logits", "target", "weight", "token_weight"])
def test_what_was_changed_in_place_before_the_backward_is_an_error(kernel_backend, shape, changed):
    logits, target = tensors(shape)
    weights = {"weight": torch.ones(shape[1]), "token_weight": torch.ones(shape[0])}
    given = {"logits": logits * 1, "target": target, **weights}
    loss = loss_of(given["logits"], target, PLAIN, tuple(weights.values()), kernel_backend)
    assert loss.grad_fn.formed is not None
    given[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(loss, logits)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_target_that_wants_a_gradient(kernel_backend, shape):
    logits, _ = tensors(shape, torch.float64)
    target = torch.softmax(logits.detach().flip(1), 1).requires_grad_()
    loss = loss_of(logits, target, backend=kernel_backend)
    assert loss.grad_fn.formed is None
    torch.testing.assert_close(
        torch.autograd.grad(loss, (logits, target)),
        torch.autograd.grad(F.cross_entropy(logits, target), (logits, target)),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_and_an_upstream_of_the_log_sum_exps(kernel_backend, shape):
    """The gradient is formed for an upstream of the loss alone."""
    logits, target = tensors(shape)
    for weight, formed in ((0.0, True), (0.5, True), (0.5, True), (0.5, False)):
        made = nll(logits, target, None, None, None, PLAIN, True, kernel_backend)
        assert (made.loss.grad_fn.formed is not None) == formed
        total = made.loss + weight * made.lse.sum() if weight else made.loss
        found = gradient(total, logits)
        own = F.cross_entropy(logits, target) + weight * torch.logsumexp(logits, 1).sum()
        torch.testing.assert_close(found, gradient(own, logits))
        if not weight:
            equal(found, by_two_passes(logits, target, backend=kernel_backend)[1])


def test_nothing_is_formed_that_nobody_wants():
    logits, target = tensors()
    with dispatch.record() as ran:
        assert loss_of(logits.detach(), target).grad_fn is None
        with torch.no_grad():
            assert loss_of(logits, target).grad_fn is None
        rows = loss_of(logits, target, PLAIN._replace(reduction=NONE))
    assert ran == [f"nll:{BEST}"] * 3
    assert rows.grad_fn.formed is None  # each row may have an upstream of its own
    probabilities = torch.softmax(logits.detach(), 1).requires_grad_()
    assert loss_of(logits.detach(), probabilities).grad_fn.formed is None


# There the logits are dropped or moved away, and a gradient as large would stay in their place.
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_is_formed_where_hooks_take_the_logits_away(shape):
    logits, target = tensors(shape)
    expected = by_two_passes(logits, target)[1]
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(logits, target)
    assert loss.grad_fn.formed is None
    equal(gradient(loss, logits), expected)
    found, formed = in_checkpoint(lambda x: loss_of(x, target), logits)
    equal(found, expected)
    assert set(formed) == {None}


# Each form of the forward. An object that knows its owner dies at a garbage collection alone.
@pytest.mark.parametrize("reduction", [NONE, MEAN])
@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("formed", ["forward", "backward"])
def test_a_loss_that_dies_frees_what_it_kept(reduction, stats, formed):
    logits, target = tensors()
    x, options = logits * 1, PLAIN._replace(reduction=reduction)
    gc.disable()
    try:
        with neglog.options(gradient=formed):
            made = nll(x, target, None, None, None, options, stats, "")
        kept = [made.loss.grad_fn.formed, x]
        assert (kept[0] is None) == (formed == "backward" or reduction == NONE)
        alive = [weakref.ref(tensor) for tensor in kept if tensor is not None]
        del made, kept, x
        assert [tensor() for tensor in alive] == [None] * len(alive)
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["cross_entropy", "masked_cross_entropy"])
def test_the_losses_form_it_in_the_forward(name):
    logits, target = tensors(SHAPES[1], torch.bfloat16)
    mask = () if name == "cross_entropy" else (target != -100,)
    loss = getattr(neglog, name)(logits, target, *mask)
    made_by = loss.grad_fn.next_functions[0][0]  # the loss itself is rounded to bfloat16
    address = made_by.formed.data_ptr()
    assert gradient(loss, logits).data_ptr() == address
