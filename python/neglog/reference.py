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
    token_weight: ArrayLike | None = None,
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
    loss_i = u_i (-sum_c w_c q_c log p_c + w_i z_loss lse_i^2), where q is the smoothed target, w_i
    the weight of the target's class (1 for probabilities) and u_i the token_weight (N,); a row
    whose u_i is 0 is ignored. "mean" divides by the sum of u_i w_i.
    """
    x = np.asarray(logits, np.float64)
    t = np.asarray(target)
    rows, vocab = x.shape
    w = np.ones(vocab) if weight is None else np.asarray(weight, np.float64)
    of_rows = np.ones(rows) if token_weight is None else np.asarray(token_weight, np.float64)
    if t.ndim == 1:
        t = np.where(of_rows == 0, ignore_index, t)
    with np.errstate(all="ignore"):
        z, dz_dx = scores(x, logit_scale, softcap)
        log_p, lse = log_softmax(z)
        p = np.exp(log_p)
        mass, row_weight, counted = target_mass(t, w, ignore_index, label_smoothing)
        counted = counted & (of_rows != 0)
        # An index target multiplies only what it names: 0 * -inf elsewhere must not make a NaN.
        plain = t.ndim == 1 and label_smoothing == 0
        terms = np.where(mass == 0, 0.0, mass * log_p) if plain else mass * log_p
        loss = -terms.sum(axis=1)
        if z_loss:
            loss = loss + row_weight * z_loss * lse**2
        loss = np.where(counted, of_rows * loss, 0.0)
        total_weight = float(np.where(counted, of_rows * row_weight, 0.0).sum())
        total_weight = total_weight if num_items is None else float(num_items)

        soft = mass.sum(axis=1) + (2 * z_loss * row_weight * lse if z_loss else 0.0)
        dz = soft[:, None] * p - mass
        upstream = of_rows * np.broadcast_to(np.asarray(grad_loss, np.float64), (rows,))
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


class KL(NamedTuple):
    """What `kl` returns: loss (() or (N,)); divergence and cross_entropy (N,); grad (N, V)."""

    loss: Array
    divergence: Array
    cross_entropy: Array
    total_weight: float
    grad: Array


def divergence(log_p: Array, log_q: Array, beta: float) -> tuple[Array, Array]:
    """Of the rows' distributions p from q, (N,); and its gradient by the scores of p, (N, V).

    KL(q | p) for beta 0, KL(p | q) for beta 1, and between them beta KL(q | m) + (1 - beta) KL(p |
    m) with m = beta q + (1 - beta) p. 0 log 0 is 0.
    """
    p, q = np.exp(log_p), np.exp(log_q)

    def mean_log(weights: Array, logs: Array) -> Array:
        return np.where(weights == 0, 0.0, weights * logs).sum(axis=1, keepdims=True)

    if beta == 0:
        return mean_log(q, log_q - log_p)[:, 0], p - q
    if beta == 1:
        value = mean_log(p, log_p - log_q)
        return value[:, 0], np.where(p == 0, 0.0, p * (log_p - log_q - value))
    log_m = np.logaddexp(np.log(beta) + log_q, np.log1p(-beta) + log_p)
    of_student = mean_log(p, log_p - log_m)
    value = beta * mean_log(q, log_q - log_m) + (1 - beta) * of_student
    grad = (1 - beta) * np.where(p == 0, 0.0, p * (log_p - log_m - of_student))
    return value[:, 0], grad


def kl(
    logits: ArrayLike,
    teacher: ArrayLike,
    *,
    ids: ArrayLike | None = None,
    probabilities: bool = False,
    target: ArrayLike | None = None,
    token_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    beta: float = 0.0,
    temperature: float = 1.0,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_scale: float = 1.0,
    teacher_softcap: float | None = None,
    reduction: str = "mean",
    num_items: float | None = None,
    grad_loss: ArrayLike = 1.0,
) -> KL:
    """Divergence of a student's softmax(z / temperature) from a teacher's, and its cross-entropy.

    logits: (N, V). teacher: scores (N, V) as the logits, or `probabilities`; with `ids` (N, K) the
    log-probabilities (N, K) of these classes, at this temperature, and what is left to 1 is that of
    all others together. target: (N,), of the cross-entropy; only `ignore_index` matters without.
    loss_i = u_i (soft_weight divergence_i + hard_weight (lse(z_i) - z_i,target)), u the
    token_weight. "mean" divides by the sum of the counted u_i.
    """
    x = np.asarray(logits, np.float64)
    rows, vocab = x.shape
    t = np.full(rows, ignore_index + 1) if target is None else np.asarray(target)
    of_rows = np.ones(rows) if token_weight is None else np.asarray(token_weight, np.float64)
    counted = (t != ignore_index) & (of_rows != 0)
    index = np.where(counted & (target is not None), t, 0)
    with np.errstate(all="ignore"):
        z, dz_dx = scores(x, logit_scale, softcap)
        given = np.asarray(teacher, np.float64)
        if ids is None:
            log_p, _ = log_softmax(z / temperature)
            of_teacher = np.log(given) if probabilities else given
            log_q, _ = log_softmax(
                scores(of_teacher, teacher_scale, teacher_softcap)[0] / temperature
            )
            soft, soft_grad = divergence(log_p, log_q, beta)
        else:
            named = np.where(counted[:, None], np.asarray(ids), 0)
            soft, soft_grad = _of_named(z / temperature, given, named, beta)
        log_p, _ = log_softmax(z)
        hard = -log_p[np.arange(rows), index]
        hard_grad = np.exp(log_p) - (np.arange(vocab) == index[:, None])
        loss, dz = np.zeros(rows), np.zeros_like(z)
        if soft_weight:
            loss, dz = loss + soft_weight * soft, dz + soft_weight / temperature * soft_grad
        if hard_weight:
            loss, dz = loss + hard_weight * hard, dz + hard_weight * hard_grad
        loss = np.where(counted, of_rows * loss, 0.0)
        total = float(np.where(counted, of_rows, 0.0).sum()) if num_items is None else num_items
        upstream = of_rows * np.broadcast_to(np.asarray(grad_loss, np.float64), (rows,))
        if reduction == "mean":
            upstream = upstream / np.float64(total)
        grad = np.where(counted[:, None], upstream[:, None] * dz * dz_dx, 0.0)
        reduced = loss if reduction == "none" else np.asarray(loss.sum())
        if reduction == "mean":
            reduced = np.asarray(loss.sum() / np.float64(total))
    divergences = np.where(counted, soft if soft_weight else 0.0, 0.0)
    cross_entropies = np.where(counted, hard if hard_weight else 0.0, 0.0)
    return KL(reduced, divergences, cross_entropies, total, grad)


def _of_named(z: Array, logs: Array, ids: NDArray, beta: float) -> tuple[Array, Array]:
    """The divergence over named classes and one bin of all others, and its gradient by z."""
    value, grad = np.zeros(len(z)), np.zeros_like(z)
    largest = z.max(axis=1, keepdims=True)
    z = z - np.where(np.isfinite(largest), largest, 0.0)  # else bins of 1e9 keep seven digits
    for row, (scores_of_row, log_q, columns) in enumerate(zip(z, logs, ids, strict=True)):
        named = ~np.isneginf(log_q)  # one of probability 0 is left to the others
        log_q, columns = log_q[named], columns[named]
        if (columns < 0).any():
            raise IndexError(f"ids: expected 0 to {z.shape[1] - 1}, got {columns.min()}")
        others = np.setdiff1d(np.arange(z.shape[1]), columns)
        softmax_of_others, lse = log_softmax(scores_of_row[None, others])
        rest = np.log(max(1 - np.exp(log_q).sum(), 0.0) if len(others) else 0.0)
        bins = np.append(scores_of_row[columns], lse)[None]
        of_bins = divergence(log_softmax(bins)[0], np.append(log_q, rest)[None], beta)
        value[row], (*of_columns, of_others) = of_bins[0][0], of_bins[1][0]
        grad[row, columns] = of_columns
        if not np.isneginf(lse).all():
            grad[row, others] = of_others * np.exp(softmax_of_others[0])
    return value, grad


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
