"""nll of a small input: its gradient is formed in the forward, and handed over if it fits.

What is handed over must be, bit for bit, what the two passes of a large input give; and where the
backward is none of the usual, it must not be handed over at all.
"""

import pytest
import torch
import torch.nn.functional as F

from neglog import dispatch
from neglog.ops.nll import cpu, schema
from neglog.ops.nll.autograd import nll
from neglog.ops.nll.schema import MEAN, NONE, SUM, Options
from tests.support.backends import BEST, KERNELS
from tests.support.nll_tensors import large

PLAIN = Options(MEAN, -100, 0.0, 1.0, 0.0, 0.0)
ALL = Options(SUM, -100, 0.2, 0.7, 5.0, 0.1)


def small(dtype=torch.float32, rows=6, vocab=40):
    logits, target = large(dtype, rows + 7, vocab)
    return logits.detach()[7:].clone().requires_grad_(), target[7:]


def loss_of(logits, target, options=PLAIN, weight=None, backend=""):
    return nll(logits, target, weight, None, options, False, backend).loss


def by_two_passes(logits, target, options=PLAIN, weight=None, backend="", upstream=1.0):
    """Loss and gradient by a forward and a backward, as every large input has them."""
    given = (logits.detach(), target, weight)
    out = cpu.forward(schema.forward.Arguments(*given, None, *options, True, backend))
    upstream = torch.tensor(upstream, dtype=out.lse.dtype)
    kept = (out.lse, out.lse_low, out.total_weight())
    arguments = schema.backward.Arguments(upstream, None, *given, *kept, *options, backend)
    return out.loss(options.reduction), cpu.backward(arguments, out.divisor)


def equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


# Each dtype has a kernel of its own; the options call all of it; a weight and probabilities are
# read by other code. One row, and the largest input that is small.
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *((BEST, dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16)),
        *((name, torch.float32) for name in KERNELS),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [PLAIN, ALL, ALL._replace(reduction=MEAN)], ids=str)
@pytest.mark.parametrize("kind", ["indices", "weight", "probabilities"])
@pytest.mark.parametrize("shape", [(1, 1), (6, 40), (4, cpu.FORMED_IN_FORWARD // 4)], ids=str)
def test_the_bits_are_those_of_two_passes(backend, dtype, options, kind, shape):
    logits, target = small(dtype, *shape)
    target[0] = -100 if shape[0] > 1 else 0
    if kind == "probabilities":
        target = torch.softmax(logits.detach().float().flip(1), 1).to(dtype)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.linspace(0.5, 2, shape[1], dtype=real) if kind == "weight" else None
    loss = loss_of(logits, target, options, weight, backend)
    assert loss.grad_fn.formed is not None
    found = (loss.detach(), *torch.autograd.grad(loss, logits))
    equal(found, by_two_passes(logits, target, options, weight, backend))


# The largest that is small and the smallest that is not; gradients with and without a thread more.
@pytest.mark.parametrize("beyond", [0, 1])
def test_the_bits_are_the_same_on_both_sides_of_the_limit(kernel_backend, beyond):
    logits, target = small(rows=1, vocab=cpu.FORMED_IN_FORWARD + beyond)
    loss = loss_of(logits, target, backend=kernel_backend)
    assert (loss.grad_fn.formed is None) == bool(beyond)
    found = (loss.detach(), *torch.autograd.grad(loss, logits))
    equal(found, by_two_passes(logits, target, backend=kernel_backend))


# What was formed is for 1 alone; of NaN nothing is equal to anything.
@pytest.mark.parametrize("upstream", [1.0, 0.5, -1.0, 0.0, float("nan"), float("inf")])
def test_upstreams(kernel_backend, upstream):
    logits, target = small()
    loss = loss_of(logits, target, backend=kernel_backend)
    with dispatch.record() as ran:
        (found,) = torch.autograd.grad(loss, logits, torch.tensor(upstream))
    assert ran[-1] == f"nll_backward:{kernel_backend}"
    equal(found, by_two_passes(logits, target, backend=kernel_backend, upstream=upstream)[1])


def test_a_second_backward(kernel_backend):
    logits, target = small()
    loss = loss_of(logits, target, backend=kernel_backend)
    expected = by_two_passes(logits, target, backend=kernel_backend)[1]
    found = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(3)]
    for one in found:
        equal(one, expected)
    assert len({one.data_ptr() for one in found}) == 3
    torch.autograd.grad(loss, logits)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, logits)


def test_what_is_handed_over_is_the_users_alone(kernel_backend):
    """They may change it: no backward after it, and no logits, may change with it."""
    logits, target = small()
    before = logits.detach().clone()
    loss = loss_of(logits, target, backend=kernel_backend)
    address = loss.grad_fn.formed.data_ptr()
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert first.data_ptr() == address
    assert loss.grad_fn.formed is None
    first.fill_(7.0)
    (second,) = torch.autograd.grad(loss, logits)
    equal(second, by_two_passes(logits, target, backend=kernel_backend)[1])
    equal(logits.detach(), before)
    assert second.untyped_storage().nbytes() == second.nbytes


def test_gradients_of_a_leaf_are_added(kernel_backend):
    logits, target = small()
    expected = by_two_passes(logits, target, backend=kernel_backend)[1]
    for _ in range(2):
        loss_of(logits, target, backend=kernel_backend).backward()
    equal(logits.grad, 2 * expected)


def test_create_graph(kernel_backend):
    logits, target = small(torch.float64)
    loss = loss_of(logits, target, backend=kernel_backend)
    (first,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert first.requires_grad
    equal(first.detach(), by_two_passes(logits, target, backend=kernel_backend)[1])
    own = torch.autograd.grad(F.cross_entropy(logits, target), logits, create_graph=True)[0]
    seconds = [torch.autograd.grad(x.square().sum(), logits)[0] for x in (first, own)]
    torch.testing.assert_close(*seconds)


def test_a_batch_of_upstreams(kernel_backend):
    logits, target = small()
    loss = loss_of(logits, target, backend=kernel_backend)
    upstreams = torch.tensor([1.0, 0.5, -2.0])
    (found,) = torch.autograd.grad(loss, logits, upstreams, is_grads_batched=True)
    for one, upstream in zip(found, upstreams.tolist(), strict=True):
        equal(one, by_two_passes(logits, target, backend=kernel_backend, upstream=upstream)[1])


def test_a_target_that_wants_a_gradient(kernel_backend):
    logits, _ = small(torch.float64)
    target = torch.softmax(logits.detach().flip(1), 1).requires_grad_()
    found = torch.autograd.grad(loss_of(logits, target, backend=kernel_backend), (logits, target))
    torch.testing.assert_close(
        found, torch.autograd.grad(F.cross_entropy(logits, target), (logits, target))
    )


def test_nothing_is_formed_that_nobody_wants():
    logits, target = small()
    with dispatch.record() as ran:
        assert loss_of(logits.detach(), target).grad_fn is None
        rows = loss_of(logits, target, PLAIN._replace(reduction=NONE))
        stats = nll(logits, target, None, None, PLAIN, True, "")
    assert ran == [f"nll:{BEST}"] * 3
    assert rows.grad_fn.formed is None  # each row may have an upstream of its own
    assert stats.loss.grad_fn.formed is None  # the log-sum-exps may have one
