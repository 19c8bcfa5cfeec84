"""The gradient of nll over the logits: its numbers, and what it refuses and leaves alone."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import neglog
import neglog.losses.cross_entropy  # defines the ops
from neglog import dispatch
from tests.support.nll_tensors import forward_arguments, large


def head(dtype=torch.float32, rows=200, vocab=1000):
    torch.manual_seed(5)
    hidden = torch.randn(rows, 8, dtype=dtype)
    weight = torch.randn(8, vocab, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, vocab, (rows,))


# float16 alone divides in the backward, and only a mean divides.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_in_place_gradient(kernel_backend, dtype, reduction):
    hidden, weight, target = head(dtype)
    target[3] = -100
    logits = hidden @ weight
    address = logits.data_ptr()
    with dispatch.record() as ran:
        loss = neglog.cross_entropy(logits, target, reduction=reduction, inplace_backward=True)
        (loss.sum() * 0.5).backward()
    assert ran == [f"nll_:{kernel_backend}"]
    assert logits.data_ptr() == address
    assert logits._version > 0
    expected = F.cross_entropy(hidden @ weight, target, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(expected.sum() * 0.5, weight)
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(dtype, 1e-5)
    torch.testing.assert_close(weight.grad, gradient, rtol=tolerance, atol=tolerance)


def test_in_place_float16_survives_a_loss_scale(kernel_backend):
    """A mean over many rows underflows in float16 unless its divisor waits for the loss scale."""
    hidden, weight, target = head(torch.float16, rows=4096, vocab=64)
    loss = neglog.cross_entropy(hidden @ weight, target, inplace_backward=True)
    (loss.float() * 4096).backward()
    exact = weight.detach().double().requires_grad_()
    (F.cross_entropy(hidden.double() @ exact, target) * 4096).backward()
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=2e-2, atol=1.0)
    assert weight.grad.abs().sum() > 0


def test_in_place_spoils_what_others_saved_and_says_so():
    hidden, weight, target = head()
    logits = hidden @ weight
    penalty = logits.square().sum()  # square saves its input
    loss = penalty + neglog.cross_entropy(logits, target, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_twice_through_one_graph():
    hidden, weight, target = head()
    loss = neglog.cross_entropy(hidden @ weight, target, inplace_backward=True)
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, weight, retain_graph=True)[0], first)
    torch.autograd.grad(loss * 2, weight, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, weight)


def test_in_place_has_no_second_derivative():
    hidden, weight, target = head()
    loss = neglog.cross_entropy(hidden @ weight, target, inplace_backward=True)
    with pytest.raises(RuntimeError, match="inplace_backward: the gradient has no derivative"):
        torch.autograd.grad(loss, weight, create_graph=True)


def test_in_place_refuses_a_leaf():
    logits, target = large()
    kept = logits.detach().clone()
    with pytest.raises(RuntimeError, match="inplace_backward: input is a leaf"):
        neglog.cross_entropy(logits, target, inplace_backward=True)
    assert torch.equal(logits, kept)


def test_in_place_refuses_a_view_of_a_leaf():
    leaf = torch.randn(20, 1000, requires_grad=True)
    kept = leaf.detach().clone()
    for view in (leaf.view(-1, 1000), leaf[:], leaf.t().t()):
        with pytest.raises(RuntimeError, match="a leaf that requires grad or a view of one"):
            neglog.cross_entropy(view, torch.arange(20), inplace_backward=True)
    assert torch.equal(leaf, kept)


def test_in_place_refuses_a_target_in_the_same_memory():
    logits = torch.rand(20, 1000, requires_grad=True) * 1
    with pytest.raises(RuntimeError, match="expected a target in memory of its own"):
        neglog.cross_entropy(logits, logits.detach(), inplace_backward=True)


def test_in_place_refuses_rows_that_overlap():
    row = torch.randn(1, 1000, requires_grad=True)
    with pytest.raises(RuntimeError, match="expected an input whose rows lie apart in memory"):
        neglog.cross_entropy((row * 1).expand(20, 1000), torch.arange(20), inplace_backward=True)


def test_in_place_of_all_ignored_rows_is_zero(kernel_backend):
    for dtype in (torch.float16, torch.float32):
        logits = torch.randn(20, 1000, dtype=dtype, requires_grad=True)
        target = torch.full((20,), -100)
        loss = neglog.cross_entropy(logits * 1, target, inplace_backward=True)
        assert loss.isnan()
        assert not torch.autograd.grad(loss, logits)[0].any()


def test_in_place_with_a_target_that_wants_a_gradient():
    logits, target = torch.randn(20, 1000), torch.rand(20, 1000, requires_grad=True)
    hidden = logits.clone().requires_grad_()
    loss = neglog.cross_entropy(hidden * 1, target, inplace_backward=True)
    ours = torch.autograd.grad(loss, (hidden, target))
    theirs = torch.autograd.grad(F.cross_entropy(hidden, target), (hidden, target))
    torch.testing.assert_close(ours, theirs)


def test_in_place_leaves_the_logits_alone_without_a_gradient():
    logits, target = large()
    kept = logits.detach().clone()
    with torch.no_grad():
        neglog.cross_entropy(logits, target, inplace_backward=True)
    neglog.cross_entropy(logits.detach(), target, inplace_backward=True)
    assert torch.equal(logits, kept)


def test_in_place_through_views_and_odd_strides(kernel_backend):
    hidden, weight, target = head(torch.float64)
    layouts = {
        "view of three": lambda x: x.view(20, 10, 1000).view(-1, 1000),
        "transposed": lambda x: x.t().contiguous().t(),
        "row slice": lambda x: torch.cat([x, x], 1)[:, :1000],
    }
    expected = torch.autograd.grad(F.cross_entropy(hidden @ weight, target), weight)[0]
    for layout in layouts.values():
        loss = neglog.cross_entropy(layout(hidden @ weight), target, inplace_backward=True)
        torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], expected)


def test_in_place_with_stats(kernel_backend):
    hidden, weight, target = head()
    logits = hidden @ weight
    plain = neglog.cross_entropy(logits, target, return_stats=True)
    over = neglog.cross_entropy(logits, target, return_stats=True, inplace_backward=True)
    torch.testing.assert_close(tuple(over), tuple(plain))
    assert not over.logsumexp.requires_grad


def test_opcheck_in_place():
    arguments = forward_arguments(requires_grad=False)
    outcome = opcheck(torch.ops.neglog.nll_.default, arguments)
    assert set(outcome.values()) == {"SUCCESS"}


# What saves its output for its own backward; through a view, as logits (N, C, d) are read, too.
@pytest.mark.parametrize(
    ("function", "name"),
    [(torch.tanh, "TanhBackward0"), (lambda x: x.softmax(1), "SoftmaxBackward0"),
     (lambda x: x.exp().view(6, 5), "ExpBackward0")],
    ids=["tanh", "softmax", "a view of exp"],
)  # fmt: skip
def test_an_output_that_its_own_backward_needs_is_refused_at_once(function, name):
    logits, target = torch.randn(6, 5, requires_grad=True), torch.arange(6) % 5
    with pytest.raises(RuntimeError, match=f"inplace_backward: .* the output of {name}"):
        neglog.cross_entropy(function(logits), target, inplace_backward=True)


def two_backwards(logits, target):
    loss = neglog.cross_entropy(logits, target, inplace_backward=True)
    loss.backward()
    loss.backward()


def two_losses(logits, target):
    losses = [neglog.cross_entropy(logits, target, inplace_backward=True) for _ in range(2)]
    sum(losses).backward()


def a_change(logits, target):
    loss = neglog.cross_entropy(logits, target, inplace_backward=True)
    logits.detach().mul_(2)
    loss.backward()


@pytest.mark.parametrize("use", [two_backwards, two_losses, a_change], ids=lambda x: x.__name__)
def test_a_gradient_that_is_no_longer_there_is_said_to_be_in_place(use):
    logits = torch.randn(6, 5, requires_grad=True) * 1
    with pytest.raises(RuntimeError, match="inplace_backward: the gradient that lies in the input"):
        use(logits, torch.arange(6) % 5)
