"""What a loss over classes means does not depend on how many numbers there are.

tests/test_checks.py shows it for arguments and errors, this file for values.
"""

import math

import pytest
import torch
import torch.utils.checkpoint

import neglog
from neglog import dispatch

# Below and above what nll calls small, and several tiles and threads.
ROWS = (9, 3000)
VOCAB = 50
LOSSES = ("cross_entropy", "masked_cross_entropy", "linear_cross_entropy")


def loss_of(name, logits, target, **options):
    """By each loss the same: linear_cross_entropy gets logits as hidden states of unit weights."""
    if name == "cross_entropy":
        return neglog.cross_entropy(logits, target, **options)
    if name == "masked_cross_entropy":
        return neglog.masked_cross_entropy(logits, target.clamp(min=0), target != -100, **options)
    weight = torch.eye(logits.shape[1], dtype=logits.dtype)
    return neglog.linear_cross_entropy(logits, weight, target, **options)


def draw(rows, dtype=torch.float32):
    """Logits, every third row of which is ignored and NaN, inf or -inf."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, VOCAB, generator=generator).to(dtype)
    target = torch.arange(rows) % VOCAB
    target[1::3] = -100
    for first, value in ((1, torch.nan), (4, torch.inf), (7, -torch.inf)):
        logits[first::9] = value
    return logits.requires_grad_(), target


# What torch's own function has, what only the formula has, a function that has no derivative at
# NaN, and the gradient over the logits.
OPTIONS = [{}, {"z_loss": 0.1}, {"softcap": 3.0}, {"inplace_backward": True}]


# Each reduction makes another upstream of a row; of an ignored one it may be NaN.
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", LOSSES)
def test_an_ignored_row_has_no_gradient_whatever_it_is(backend, name, rows, options, reduction):
    if name == "linear_cross_entropy" and "inplace_backward" in options:
        options = {}
    logits, target = draw(rows)
    loss = loss_of(name, logits * 1, target, reduction=reduction, **options)
    upstream = torch.ones_like(loss)
    if reduction == "none":
        upstream[1::3] = torch.nan
    (grad,) = torch.autograd.grad(loss, logits, upstream)
    assert loss.isfinite().all()
    assert not grad[1::3].any()
    assert grad[target >= 0].isfinite().all()
    assert grad[target >= 0].any(1).all()


# A weight's gradient is a sum over rows, of which one is NaN times 0.
@pytest.mark.parametrize("rows", ROWS)
def test_nor_does_it_reach_the_head(backend, rows):
    x, target = draw(rows)
    weight, bias = (torch.ones(shape, requires_grad=True) for shape in ((7, VOCAB), (7,)))
    target = target.clamp(max=6)
    neglog.linear_cross_entropy(x, weight, target, linear_bias=bias).backward()
    assert weight.grad.isfinite().all()
    assert bias.grad.isfinite().all()


# float16 ends at 65504, so the sum of 70,000 losses of 2 is out of its range, and of 3 is not.
@pytest.mark.parametrize("rows", [3, 70_000])
@pytest.mark.parametrize("name", LOSSES)
def test_a_mean_in_float16_does_not_overflow(backend, name, rows):
    logits = torch.zeros(rows, 2, dtype=torch.float16)
    logits[:, 1] = math.log(math.e**2 - 1)  # beside 0: a loss of 2
    logits.requires_grad_()
    target = torch.zeros(rows, dtype=torch.int64)
    loss = loss_of(name, logits, target)
    assert loss.dtype == torch.float16
    assert loss.item() == pytest.approx(2, rel=1e-3)
    # Each gradient is 0.86 / rows: of 70,000 rows too small for float16 to hold exactly.
    (grad,) = torch.autograd.grad(loss, logits, torch.tensor(1024.0, dtype=torch.float16))
    expected = torch.full((rows,), 1024 * (1 - math.exp(-2)) / rows)
    torch.testing.assert_close(-grad[:, 0].float(), expected, rtol=2e-3, atol=0)


# Any logits: a row's loss and gradient are those that it has alone, whatever lies beside it.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", LOSSES[:2])
def test_a_row_does_not_depend_on_those_beside_it(kernel_backend, name, dtype):
    found = []
    for rows in ROWS:
        logits, target = draw(max(ROWS), dtype)
        logits = logits.detach()[:rows].clone().requires_grad_()
        loss = loss_of(name, logits, target[:rows], reduction="none")
        found.append((loss.detach()[:9], torch.autograd.grad(loss.sum(), logits)[0][:9]))
    torch.testing.assert_close(*found, rtol=0, atol=0)


# 131,072 logits are where the gradient stops to be formed in the forward.
@pytest.mark.parametrize("rows", [3, 4000])
@pytest.mark.parametrize("changed", ["logits", "target"])
def test_what_changes_before_the_backward_raises(rows, changed):
    source = torch.randn(rows, 40, requires_grad=True)
    logits, target = source * 1, torch.arange(rows) % 40
    loss = neglog.cross_entropy(logits, target)
    with torch.no_grad():
        {"logits": logits, "target": target}[changed].mul_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("rows", [3, 4000])
def test_no_gradient_is_formed_where_none_is_wanted(rows):
    logits = torch.randn(rows, 40, requires_grad=True)
    with torch.no_grad(), dispatch.record() as ran:
        loss = neglog.cross_entropy(logits, torch.arange(rows) % 40)
    assert not loss.requires_grad
    assert ran == [f"nll:{dispatch.best('cpu')}"]


# Checkpointing counts how often a saved tensor is asked for; both sides of 131,072 logits, and an
# upstream that the early gradient serves and one that it does not.
@pytest.mark.parametrize("upstream", [1.0, 0.5])
@pytest.mark.parametrize("rows", [3, 4000])
def test_under_activation_checkpointing(rows, upstream):
    source = torch.randn(rows, 40, requires_grad=True)
    target = torch.arange(rows) % 40

    def loss(x):
        return neglog.cross_entropy(x * 2, target)

    made = torch.utils.checkpoint.checkpoint(loss, source, use_reentrant=False)
    (found,) = torch.autograd.grad(made * upstream, source)
    (expected,) = torch.autograd.grad(loss(source) * upstream, source)
    assert torch.equal(found, expected)
