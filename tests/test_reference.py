"""The oracle itself: against torch in float64, against differences, and by hand."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from neglog import reference
from tests.support.nll_cases import drawn_weights


def case(rng, probabilities):
    logits = rng.standard_normal((6, 9)) * 3
    target = rng.dirichlet(np.ones(9), 6) if probabilities else rng.integers(0, 9, 6)
    if not probabilities:
        target[2] = -100
    return logits, target


# All that torch's function has, in every combination: this is what all other tests rest on.
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
    options = drawn_weights(options, len(logits), 9, rng)

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


# Pairs


def drawn_pairs(rng):
    similarity = rng.standard_normal((5, 7))
    options = {
        "bias": np.array([0.3, -np.inf, 0, 1, -1, 0.5, 0]),
        "positive": np.array([0, 2, 2, 5, 6]),
        "excluded": np.array([-1, 3, 0, -1, 4]),
        "row_group": np.array([0, 1, 2, 0, 5]),
        "column_group": np.array([0, 9, 1, 2, 2, 0, 3]),
        "scale": rng.uniform(0.5, 3, 5),
    }
    return similarity, options


def slope_of(loss, x, step=1e-6):
    """The gradient of a function of x, by differences."""
    slope = np.zeros_like(x)
    for place in np.ndindex(*x.shape):
        nudge = np.zeros_like(x)
        nudge[place] = step
        slope[place] = (loss(x + nudge) - loss(x - nudge)) / (2 * step)
    return slope


def test_gradient_of_pairs_is_the_slope(rng):
    similarity, options = drawn_pairs(rng)
    positive = options["positive"]
    a, b, c, d = rng.standard_normal((4, 5))
    e = rng.standard_normal(7)
    e[1] = 0  # its column has nothing but -inf

    def loss(x):
        r = reference.pairs(x, **options)
        columns = np.where(np.isneginf(r.column_lse), 0, r.column_lse)
        of_rows = a * r.row_lse + b * (r.row_lse - r.positive_score) + c * r.positive_score
        return float(
            (of_rows + d * (columns[positive] - r.positive_score)).sum() + (e * columns).sum()
        )

    result = reference.pairs(
        similarity, **options, grad_row_lse=a, grad_row_loss=b, grad_positive_score=c,
        grad_column_loss=d, grad_column_lse=e,
    )  # fmt: skip
    grad = result.grad * options["scale"][:, None]
    np.testing.assert_allclose(grad, slope_of(loss, similarity), rtol=1e-6, atol=1e-8)


def test_gradient_of_sigmoids_is_the_slope(rng):
    similarity, options = drawn_pairs(rng)
    result = reference.pairs(similarity, **options, grad_sigmoid=0.7)
    grad = result.sigmoid_grad * options["scale"][:, None]
    slope = slope_of(lambda x: 0.7 * reference.pairs(x, **options).sigmoid.sum(), similarity)
    np.testing.assert_allclose(grad, slope, rtol=1e-6, atol=1e-8)


def test_two_by_two_pairs_by_hand():
    ln3 = math.log(3)
    result = reference.pairs(
        [[1.0, 0.0], [0.0, 1.0]], scale=ln3, positive=[0, 1], grad_row_loss=1.0
    )
    np.testing.assert_allclose(result.row_lse, math.log(4))
    np.testing.assert_allclose(result.column_lse, math.log(4))
    np.testing.assert_allclose(result.positive_score, ln3)
    np.testing.assert_allclose(result.grad, [[-0.25, 0.25], [0.25, -0.25]])
    np.testing.assert_allclose(result.sigmoid, math.log(4 / 3) + math.log(2))
    np.testing.assert_allclose(result.sigmoid_grad, [[-0.25, 0.5], [0.5, -0.25]])


def test_pairs_torch_agrees(rng):
    """Of rows and columns without exclusions: cross-entropy of the matrix and its transpose."""
    similarity = rng.standard_normal((6, 6))
    target = torch.arange(6)
    result = reference.pairs(
        similarity, scale=4.0, positive=np.arange(6), grad_row_loss=0.5, grad_column_loss=0.5
    )
    z = (torch.from_numpy(similarity) * 4).requires_grad_()
    cross_entropy = torch.nn.functional.cross_entropy
    loss = cross_entropy(z, target, reduction="sum") + cross_entropy(z.T, target, reduction="sum")
    (loss / 2).backward()
    np.testing.assert_allclose(result.grad, z.grad.numpy(), rtol=1e-12, atol=1e-15)
    ours = (result.row_lse + result.column_lse - 2 * result.positive_score).sum() / 2
    assert ours == pytest.approx(loss.item() / 2)


def torch_kl(z, teacher, target, beta, temperature, hard_weight):
    """The mean of the formula by torch's functions, and its gradient."""
    z = torch.from_numpy(z).requires_grad_()
    log_p = (z / temperature).log_softmax(1)
    log_q = (torch.from_numpy(teacher) / temperature).log_softmax(1)
    kl_div = partial(torch.nn.functional.kl_div, reduction="none", log_target=True)
    if beta == 0:
        soft = kl_div(log_p, log_q)
    elif beta == 1:
        soft = kl_div(log_q, log_p)
    else:
        log_m = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
        soft = beta * kl_div(log_m, log_q) + (1 - beta) * kl_div(log_m, log_p)
    hard = torch.nn.functional.cross_entropy(z, torch.from_numpy(target))
    loss = soft.sum(1).mean() + hard_weight * hard
    return loss.item(), torch.autograd.grad(loss, z)[0].numpy()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_kl_torch_agrees(rng, beta, temperature):
    z, teacher = rng.standard_normal((2, 6, 9)) * 3
    target = rng.integers(0, 9, 6)
    options = {"beta": beta, "temperature": temperature, "hard_weight": 0.4}
    ours = reference.kl(z, teacher, target=target, **options)
    loss, grad = torch_kl(z, teacher, target, **options)
    assert ours.loss == pytest.approx(loss)
    np.testing.assert_allclose(ours.grad, grad, rtol=1e-11, atol=1e-14)
    probs = np.exp(reference.log_softmax(teacher)[0])
    if temperature == 1:
        again = reference.kl(z, probs, probabilities=True, target=target, **options)
        np.testing.assert_allclose(again.grad, ours.grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_kl_of_named_classes_is_that_of_the_bins(rng, beta):
    """Every class but those that are named is one class: of their log-sum-exp, by torch."""
    z = rng.standard_normal((4, 7)) * 2
    logs = reference.log_softmax(rng.standard_normal((4, 7)))[0]
    ours = reference.kl(z, logs[:, [5, 2]], ids=np.tile([5, 2], (4, 1)), beta=beta)
    others = [0, 1, 3, 4, 6]
    student = torch.from_numpy(z).requires_grad_()
    bins = torch.cat([student[:, [5, 2]], student[:, others].logsumexp(1, keepdim=True)], 1)
    teacher = np.hstack([logs[:, [5, 2]], np.log(np.exp(logs[:, others]).sum(1, keepdims=True))])
    by_bins = reference.kl(bins.detach().numpy(), teacher, beta=beta)
    assert ours.loss == pytest.approx(by_bins.loss)
    grad = torch.autograd.grad(bins, student, torch.from_numpy(by_bins.grad))[0]
    np.testing.assert_allclose(ours.grad, grad.numpy(), rtol=1e-10, atol=1e-14)


def test_kl_of_named_classes_far_from_0(rng):
    z = np.round(rng.standard_normal((3, 6)), 3)
    logs = reference.log_softmax(rng.standard_normal((3, 6)))[0][:, :2]
    ids = np.tile([4, 1], (3, 1))
    near = reference.kl(z, logs, ids=ids)
    far = reference.kl(z + 2.0**30, logs, ids=ids)
    rounded = reference.kl((z + 2.0**30) - 2.0**30, logs, ids=ids)
    np.testing.assert_allclose(far.grad, rounded.grad, rtol=1e-12)
    np.testing.assert_allclose(far.grad, near.grad, rtol=1e-5, atol=1e-7)


def test_kl_of_a_row_with_nan_among_the_others(rng):
    z = rng.standard_normal((2, 5))
    z[1, 3] = np.nan
    made = reference.kl(z, np.full((2, 2), -1.5), ids=np.tile([0, 1], (2, 1)), reduction="sum")
    assert np.isfinite(made.grad[0]).all()
    assert np.isnan(made.grad[1]).all()


def test_kl_without_a_target_counts_all_rows_whatever_is_ignored(rng):
    z, teacher = rng.standard_normal((2, 3, 5))
    for ignore_index in (-100, 0, 1):
        made = reference.kl(z, teacher, ignore_index=ignore_index)
        assert made.total_weight == 3
        assert made.loss == reference.kl(z, teacher).loss


def test_kl_asks_nothing_of_the_classes_that_ignored_rows_name(rng):
    z, logs = rng.standard_normal((3, 5)), np.full((3, 2), -1.5)
    ids = np.array([[0, 1], [77, -5], [2, 4]])
    made = reference.kl(z, logs, ids=ids, target=np.array([0, -100, 1]))
    assert made.total_weight == 2
    assert not made.grad[1].any()
    assert np.isfinite(made.loss)
    for bad in (-1, 5):
        with pytest.raises(IndexError):
            reference.kl(z, logs, ids=np.where(ids == 4, bad, ids), target=np.array([0, -100, 1]))
