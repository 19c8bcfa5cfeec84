"""The oracle: every loss in float64, plainly, one function per op. Read this first.

Nothing here is fast and nothing is shared with the kernels; the tests hold every backend to it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


class NLL(NamedTuple):
    """What `nll` returns: loss (() or (N,)), the rest by row, and grad as the logits (N, V)."""

    loss: Array
    lse: Array
    correct: NDArray[np.bool_]
    entropy: Array
    argmax: NDArray[np.int64]
    total_weight: float
    grad: Array


def scores(logits: Array, logit_scale: float, softcap: float | None) -> tuple[Array, Array]:
    """z = softcap * tanh(logit_scale * x / softcap), and dz/dx."""
    z = logit_scale * logits
    if not softcap:
        return z, np.full_like(z, logit_scale)
    # Not 1 - tanh^2, which is 0 where tanh rounds to 1.
    return softcap * np.tanh(z / softcap), logit_scale / np.cosh(z / softcap) ** 2


def log_softmax(z: Array) -> tuple[Array, Array]:
    """Log-probabilities (N, V) and log-sum-exp (N,)."""
    maximum = z.max(axis=1, keepdims=True, initial=-np.inf)
    log_sum = np.log(np.exp(z - maximum).sum(axis=1, keepdims=True))
    # A row of -inf has lse -inf, as torch.logsumexp says, though its probabilities are NaN.
    all_masked = np.isneginf(maximum[:, 0])
    lse = np.where(all_masked, -np.inf, (maximum + log_sum)[:, 0])
    return (z - maximum) - log_sum, lse


def target_mass(
    target: NDArray, weight: Array, ignore_index: int, label_smoothing: float
) -> tuple[Array, Array, NDArray[np.bool_]]:
    """What multiplies each -log p, (N, V); each row's weight; and which rows count."""
    vocab = len(weight)
    if target.ndim == 2:
        smoothed = target.astype(np.float64) * (1 - label_smoothing) + label_smoothing / vocab
        return weight * smoothed, np.ones(len(target)), np.ones(len(target), bool)
    counted = target != ignore_index
    for row in np.flatnonzero(counted):
        if not 0 <= target[row] < vocab:
            raise IndexError(
                f"target {target[row]} at row {row} is out of range: expected 0 <= target < {vocab}"
            )
    index = np.where(counted, target, 0).astype(np.int64)
    row_weight = np.where(counted, weight[index], 0.0)
    mass = np.tile(label_smoothing / vocab * weight, (len(target), 1))
    mass[np.arange(len(target)), index] += (1 - label_smoothing) * weight[index]
    return mass, row_weight, counted


def nll(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    num_items: float | None = None,
    grad_loss: ArrayLike = 1.0,
    grad_lse: ArrayLike = 0.0,
    grad_entropy: ArrayLike = 0.0,
) -> NLL:
    """Negative log-likelihood of `target` under softmax(z), and its gradient.

    logits: (N, V). target: (N,) integers, or (N, V) probabilities.
    loss_i = -sum_c w_c q_c log p_c + w_i z_loss lse_i^2, where q is the smoothed target and w_i the
    weight of the target's class (1 for probabilities). "mean" divides by the sum of w_i.
    """
    x = np.asarray(logits, np.float64)
    t = np.asarray(target)
    rows, vocab = x.shape
    w = np.ones(vocab) if weight is None else np.asarray(weight, np.float64)
    with np.errstate(all="ignore"):
        z, dz_dx = scores(x, logit_scale, softcap)
        log_p, lse = log_softmax(z)
        p = np.exp(log_p)
        mass, row_weight, counted = target_mass(t, w, ignore_index, label_smoothing)
        # An index target multiplies only what it names: 0 * -inf elsewhere must not make a NaN.
        plain = t.ndim == 1 and label_smoothing == 0
        terms = np.where(mass == 0, 0.0, mass * log_p) if plain else mass * log_p
        loss = -terms.sum(axis=1)
        if z_loss:
            loss = loss + row_weight * z_loss * lse**2
        loss = np.where(counted, loss, 0.0)
        total_weight = float(row_weight.sum()) if num_items is None else float(num_items)

        soft = mass.sum(axis=1) + (2 * z_loss * row_weight * lse if z_loss else 0.0)
        dz = soft[:, None] * p - mass
        upstream = np.broadcast_to(np.asarray(grad_loss, np.float64), (rows,))
        if reduction == "mean":
            upstream = upstream / np.float64(total_weight)
        grad = np.where(counted[:, None], upstream[:, None] * dz * dz_dx, 0.0)
        through_lse = np.broadcast_to(np.asarray(grad_lse, np.float64), (rows,))
        used = (through_lse != 0) & (counted | np.isfinite(lse))
        grad = grad + np.where(used[:, None], through_lse[:, None] * p * dz_dx, 0.0)
        entropy = -np.where(p == 0, 0.0, p * log_p).sum(axis=1)
        through_entropy = np.broadcast_to(np.asarray(grad_entropy, np.float64), (rows,))
        used = (through_entropy != 0) & (counted | np.isfinite(lse))
        of_entropy = np.where(p == 0, 0.0, -p * (log_p + entropy[:, None]))
        grad = grad + np.where(used[:, None], through_entropy[:, None] * of_entropy * dz_dx, 0.0)

        reduced = loss if reduction == "none" else np.asarray(loss.sum())
        if reduction == "mean":
            reduced = np.asarray(loss.sum() / np.float64(total_weight))
    correct, argmax = np.zeros(rows, bool), np.zeros(rows, np.int64)
    if vocab:
        argmax = z.argmax(axis=1)  # of a NaN, as torch
    if t.ndim == 1 and vocab:
        correct = counted & (argmax == t) & ~np.isnan(z).any(axis=1)
    return NLL(reduced, lse, correct, entropy, argmax, total_weight, grad)


class Pairs(NamedTuple):
    """What `pairs` returns: column_lse is (M,), the two gradients (N, M), the others (N,)."""

    row_lse: Array
    column_lse: Array
    positive_score: Array
    grad: Array
    sigmoid: Array
    sigmoid_grad: Array


def probabilities(z: Array) -> tuple[Array, Array]:
    """softmax(z) and log-sum-exp; a row of -inf has only zeros, and so no gradient."""
    log_p, lse = log_softmax(z)
    return np.where(np.isneginf(lse)[:, None], 0.0, np.exp(log_p)), lse


def pairs(
    similarity: ArrayLike,
    *,
    scale: ArrayLike = 1.0,
    bias: ArrayLike = 0.0,
    positive: ArrayLike | None = None,
    excluded: ArrayLike | None = None,
    row_group: ArrayLike | None = None,
    column_group: ArrayLike | None = None,
    grad_row_lse: ArrayLike = 0.0,
    grad_column_lse: ArrayLike = 0.0,
    grad_row_loss: ArrayLike = 0.0,
    grad_column_loss: ArrayLike = 0.0,
    grad_positive_score: ArrayLike = 0.0,
    grad_sigmoid: float = 1.0,
) -> Pairs:
    """Log-sum-exps of the rows and columns of z = scale * similarity + bias, and the sigmoid loss.

    similarity: (N, M). scale: () or (N,). bias: () or (M,).
    positive, excluded: (N,), a column of each row (of excluded, -1 for none).
    row_group (N,), column_group (M,): pairs of one group are excluded, but not a row's positive.

    An excluded pair's z is -inf; the score of a positive is taken before that. `grad` is the
    gradient of z for these upstreams, each a scalar or of its own shape: grad_row_lse (N,),
    grad_column_lse (M,), grad_row_loss (N,) of row_lse - positive_score, grad_column_loss (N,) of
    column_lse[positive] - positive_score, and grad_positive_score (N,).
    sigmoid: softplus(-z) of a row's positive and softplus(z) of its others, added up;
    sigmoid_grad is the gradient of z for grad_sigmoid times their sum.
    """
    s = np.asarray(similarity, np.float64)
    rows, columns = s.shape

    def each(upstream: ArrayLike, count: int) -> Array:
        return np.array(np.broadcast_to(np.asarray(upstream, np.float64), (count,)))

    every = np.arange(0 if positive is None else rows)
    at = every, np.asarray(every if positive is None else positive, np.int64)
    with np.errstate(all="ignore"):
        z = s * np.reshape(np.asarray(scale, np.float64), (-1, 1)) + np.asarray(bias, np.float64)
        score = z[at]
        if row_group is not None:
            z[np.asarray(row_group)[:, None] == np.asarray(column_group)] = -np.inf
            z[at] = score
        if excluded is not None:
            named = np.flatnonzero(np.asarray(excluded) >= 0)
            z[named, np.asarray(excluded)[named]] = -np.inf

        of_rows, row_lse = probabilities(z)
        of_columns, column_lse = probabilities(z.T)
        through_rows, through_columns = each(grad_row_lse, rows), each(grad_column_lse, columns)
        row_loss, column_loss = each(grad_row_loss, rows), each(grad_column_loss, rows)
        through_rows[at[0]] += row_loss[at[0]]
        np.add.at(through_columns, at[1], column_loss[at[0]])
        grad = through_rows[:, None] * of_rows + through_columns * of_columns.T
        grad[at] += (each(grad_positive_score, rows) - row_loss - column_loss)[at[0]]

        terms, slopes = np.logaddexp(0.0, z), 1 / (1 + np.exp(-z))
        terms[at], slopes[at] = np.logaddexp(0.0, -score), -1 / (1 + np.exp(score))
    return Pairs(row_lse, column_lse, score, grad, terms.sum(axis=1), grad_sigmoid * slopes)
