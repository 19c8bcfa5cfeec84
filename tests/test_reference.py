"""The oracle itself: against torch in float64, against differences, and by hand."""

import math

import numpy as np
import pytest
import torch

from neglog import reference
from tests.conftest import drawn_weight


def case(rng, probabilities):
    logits = rng.standard_normal((6, 9)) * 3
    target = rng.dirichlet(np.ones(9), 6) if probabilities else rng.integers(0, 9, 6)
    if not probabilities:
        target[2] = -100
    return logits, target


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_torch_agrees_in_float64(rng, probabilities, reduction, smoothing, weighted):
    logits, target = case(rng, probabilities)
    weight = rng.uniform(0.1, 2, 9) if weighted else None
    ours = reference.nll(
        logits, target, weight=weight, label_smoothing=smoothing, reduction=reduction
    )
    x = torch.from_numpy(logits).requires_grad_()
    theirs = torch.nn.functional.cross_entropy(
        x,
        torch.from_numpy(target),
        None if weight is None else torch.from_numpy(weight),
        label_smoothing=smoothing,
        reduction=reduction,
    )
    theirs.sum().backward()
    np.testing.assert_allclose(ours.loss, theirs.detach().numpy(), rtol=1e-13)
    np.testing.assert_allclose(ours.grad, x.grad.numpy(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("probabilities", [False, True])
def test_gradient_is_the_slope_of_the_loss(rng, options, probabilities):
    logits, target = case(rng, probabilities)
    options = drawn_weight(options, 9, rng)

    def loss(x):
        return float(reference.nll(x, target, **options).loss)

    slope = np.zeros_like(logits)
    step = 1e-6
    for place in np.ndindex(*logits.shape):
        nudge = np.zeros_like(logits)
        nudge[place] = step
        slope[place] = (loss(logits + nudge) - loss(logits - nudge)) / (2 * step)
    np.testing.assert_allclose(
        reference.nll(logits, target, **options).grad, slope, rtol=1e-6, atol=1e-9
    )


def test_two_equal_classes_by_hand():
    result = reference.nll([[0.0, 0.0]], [1])
    assert result.loss == pytest.approx(math.log(2))
    assert result.lse == pytest.approx(math.log(2))
    assert result.entropy == pytest.approx(math.log(2))
    np.testing.assert_allclose(result.grad, [[0.5, -0.5]])
    assert not result.correct  # the first of equal maxima is the argmax


def test_shift_leaves_the_loss_and_moves_the_lse(rng):
    logits, target = case(rng, False)
    before, after = reference.nll(logits, target), reference.nll(logits + 7, target)
    assert after.loss == pytest.approx(before.loss)
    np.testing.assert_allclose(after.lse, before.lse + 7)


def test_lse_gradient_is_the_softmax(rng):
    logits, target = case(rng, False)
    result = reference.nll(logits, target, grad_loss=0.0, grad_lse=1.0)
    np.testing.assert_allclose(result.grad.sum(1), np.ones(6))
    assert (result.grad > 0).all()


def test_z_loss_by_hand():
    result = reference.nll([[0.0, 0.0]], [0], z_loss=2.0)
    assert result.loss == pytest.approx(math.log(2) + 2 * math.log(2) ** 2)


def test_out_of_range_target_is_named():
    with pytest.raises(IndexError, match=r"target 3 at row 1 .* 0 <= target < 2"):
        reference.nll(np.zeros((2, 2)), [0, 3])
