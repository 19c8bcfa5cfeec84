"""One row of logits: its loss, its statistics and its gradient. The Numba version of row.hpp.

Read row.hpp first: its notes hold here.
"""

from __future__ import annotations

from math import expm1, inf, isfinite, isnan, nan
from typing import NamedTuple

import numpy as np
from numba import njit

from neglog.kernels.numba.block import (  # isort: skip
    UINT8, Destination, Lse, Softmax, block_affine, block_copy, block_entropy_gradient, block_fill,
    block_find, block_log_probability_dot, block_log_probability_sum, block_multiply,
    block_negative_entropy, block_scale, block_softcap, block_softcap_and_slope, block_softmax,
    block_subtract, block_sum, block_widen, destination_from, exp_of_low, finish, log_probability,
    store_gradient, update,
)  # fmt: skip
from neglog.kernels.numba.exp import exp_nonpositive  # isort: skip
from neglog.kernels.numba.halves import narrow, widen  # isort: skip
from neglog.kernels.numba.intrinsics import (  # isort: skip
    BLOCK, EXACT, Pointer, Real, address_of, block_buffer, cast, is_real, itemsize, pointer,
)  # fmt: skip
from neglog.kernels.numba.problem import Gradient, Output, Problem  # isort: skip

INT64 = np.int64(0)
# How far ahead of what it adds up a forward alone brings logits into L2. Without, the memory waits
# during the exps and the exps for the memory: 8.7 ms instead of 7.0 at 2048 x 32000 float32.
AHEAD = 16 << 10


class Span(NamedTuple):
    """Columns start to start + n of a row."""

    start: int
    n: int


class GradientWeights(NamedTuple):
    """softmax_weight p_c + target_weight (p_c - [c = t]) - uniform_weight b_c
    + entropy_weight p_c (log p_c + entropy), as in row.hpp."""

    target: int  # -1 if there is no index
    target_weight: float
    softmax_weight: float
    uniform_weight: float
    entropy_weight: float
    entropy: float


class RowUpstream(NamedTuple):
    """The upstream of one row, and its entropy."""

    grad: float
    grad_lse: float
    grad_entropy: float
    entropy: float


# Reading a block


@njit(**EXACT)
def blocks(p: Problem) -> int:
    return (p.vocab + BLOCK - 1) // BLOCK


@njit(**EXACT)
def block_span(p: Problem, block: int) -> Span:
    return Span(block * BLOCK, min(BLOCK, p.vocab - block * BLOCK))


@njit(**EXACT)
def has_plain_scores(p: Problem) -> bool:
    """Whether the scores are the logits."""
    return p.logit_scale == 1 and p.softcap == 0


@njit(**EXACT)
def logits_at(p: Problem, row: int, column: int) -> Pointer:
    index = row * p.logits_stride + column
    return pointer(p.logits + index * itemsize(p.stored), p.stored)


@njit(**EXACT)
def as_real(p: Problem, source: Pointer, buffer: Pointer, n: int) -> Pointer:
    """The block at `source` as real numbers: itself, or its conversion in `buffer`."""
    if is_real(p.stored):
        return pointer(address_of(source), p.zero)
    block_widen(source, n, buffer)
    return buffer


@njit(**EXACT)
def scaled_logits(p: Problem, row: int, span: Span, buffer: Pointer) -> Pointer:
    """The block of logits after the scale. With a scale or a softcap they are in the buffer."""
    z = as_real(p, logits_at(p, row, span.start), buffer, span.n)
    if has_plain_scores(p):
        return z
    if is_real(p.stored):
        block_copy(z, span.n, buffer)
    block_scale(buffer, span.n, cast(p.logit_scale, p.zero))
    return buffer


@njit(**EXACT)
def scores(p: Problem, row: int, span: Span, buffer: Pointer) -> Pointer:
    """The block of scores z: the logits after scale and cap."""
    z = scaled_logits(p, row, span, buffer)
    if p.softcap != 0:
        block_softcap(buffer, span.n, cast(p.softcap, p.zero))
    return z


@njit(**EXACT)
def scores_and_slopes(p: Problem, row: int, span: Span, buffer: Pointer, slope: Pointer) -> Pointer:
    """The same, and with a softcap its derivative."""
    z = scaled_logits(p, row, span, buffer)
    if p.softcap != 0:
        block_softcap_and_slope(buffer, span.n, cast(p.softcap, p.zero), slope)
    return z


@njit(**EXACT)
def class_weights(p: Problem, start: int) -> Pointer:
    """The class weights from column `start` on."""
    return pointer(p.weight + start * itemsize(p.zero), p.zero)


@njit(**EXACT)
def coefficients(p: Problem, row: int, span: Span, buffer: Pointer) -> Pointer:
    """The weights w_c q'_c of the log-probabilities, for a target of probabilities."""
    index = row * p.probs_stride + span.start
    source = pointer(p.probs + index * itemsize(p.stored), p.stored)
    q = as_real(p, source, buffer, span.n)
    if p.label_smoothing == 0 and p.weight == 0:
        return q
    if is_real(p.stored):
        block_copy(q, span.n, buffer)
    uniform = p.label_smoothing / p.vocab
    block_affine(buffer, span.n, cast(1 - p.label_smoothing, p.zero), cast(uniform, p.zero))
    if p.weight != 0:
        block_multiply(buffer, class_weights(p, span.start), span.n)
    return buffer


# One row


@njit(**EXACT)
def ignored(p: Problem, row: int) -> bool:
    has_no_class = p.target != 0 and pointer(p.target, INT64)[row] == p.ignore_index
    return has_no_class or token_weight(p, row) == 0


@njit(**EXACT)
def token_weight(p: Problem, row: int) -> float:
    return 1.0 if p.token_weight == 0 else float(pointer(p.token_weight, p.zero)[row])


@njit(**EXACT)
def class_weight_of_target(p: Problem, row: int) -> float:
    if p.weight == 0:
        return 1.0
    return float(class_weights(p, 0)[pointer(p.target, INT64)[row]])


@njit(**EXACT)
def score_at(p: Problem, row: int, column: int) -> Real:
    """The score of one column."""
    return scores(p, row, Span(column, 1), block_buffer(p.zero))[0]


@njit(**EXACT)
def row_lse(p: Problem, row: int, buffer: Pointer, ahead: int) -> tuple[Lse, Real]:
    """The row's log-sum-exp, and its maximum."""
    state = (cast(-inf, p.zero), 0.0)
    for block in range(blocks(p)):
        span = block_span(p, block)
        if has_plain_scores(p):
            state = update(state, logits_at(p, row, span.start), span.n, ahead)
        else:
            state = update(state, scores(p, row, span, buffer), span.n, 0)
    return finish(state), state[0]


@njit(**EXACT)
def row_loss_of_index(p: Problem, row: int, lse: Lse, buffer: Pointer) -> float:
    w = class_weight_of_target(p, row)
    log_p = log_probability(score_at(p, row, pointer(p.target, INT64)[row]), lse)
    loss = -(1 - p.label_smoothing) * w * log_p
    if p.label_smoothing != 0:
        total = 0.0
        for block in range(blocks(p)):
            span = block_span(p, block)
            z = scores(p, row, span, buffer)
            if p.weight == 0:
                total += block_log_probability_sum(z, span.n, lse)
            else:
                total += block_log_probability_dot(z, class_weights(p, span.start), span.n, lse)
        loss -= p.label_smoothing / p.vocab * total
    if p.z_loss != 0:
        loss += p.z_loss * w * (float(lse.high) * lse.high)
    return loss


@njit(**EXACT)
def row_loss_of_probs(
    p: Problem, row: int, lse: Lse, buffer: Pointer, target_buffer: Pointer
) -> float:
    total = 0.0
    for block in range(blocks(p)):
        span = block_span(p, block)
        weights = coefficients(p, row, span, target_buffer)
        total += block_log_probability_dot(scores(p, row, span, buffer), weights, span.n, lse)
    if p.z_loss != 0:
        return p.z_loss * (float(lse.high) * lse.high) - total
    return -total


@njit(**EXACT)
def row_entropy(p: Problem, row: int, lse: Lse, buffer: Pointer) -> float:
    total = 0.0
    for block in range(blocks(p)):
        span = block_span(p, block)
        total += block_negative_entropy(scores(p, row, span, buffer), span.n, lse)
    return -total


@njit(**EXACT)
def row_find(p: Problem, row: int, score: Real, buffer: Pointer) -> int:
    """The first column with this score; V for none."""
    for block in range(blocks(p)):
        span = block_span(p, block)
        column = block_find(scores(p, row, span, buffer), span.n, score)
        if column < span.n:
            return span.start + column
    return p.vocab


@njit(**EXACT)
def row_argmax(p: Problem, row: int, maximum: Real, lse: Lse, buffer: Pointer) -> int:
    """As torch has it: the first column with a NaN, or else with the maximum."""
    if isnan(lse.high):
        column = row_find(p, row, cast(nan, p.zero), buffer)
        if column < p.vocab:
            return column
    column = row_find(p, row, maximum, buffer)
    return column if column < p.vocab else 0


@njit(**EXACT)
def write_argmax(p: Problem, o: Output, row: int, maximum: Real, lse: Lse, column: int) -> None:
    if o.argmax != 0:
        pointer(o.argmax, INT64)[row] = column
    if o.correct != 0:
        nan_among_finite = isnan(lse.high) and maximum < inf
        counts = p.target != 0 and not ignored(p, row) and not nan_among_finite
        correct = counts and pointer(p.target, INT64)[row] == column
        pointer(o.correct, UINT8)[row] = correct


@njit(**EXACT)
def row_forward(p: Problem, o: Output, row: int, ahead: int) -> Lse:
    """Write the row's loss and statistics; return its log-sum-exp."""
    buffer, target_buffer = block_buffer(p.zero), block_buffer(p.zero)
    lse, maximum, loss = Lse(p.zero, p.zero), p.zero, 0.0
    if not ignored(p, row) or o.correct != 0 or o.entropy != 0 or o.argmax != 0:
        lse, maximum = row_lse(p, row, buffer, ahead)
    if not ignored(p, row):
        if p.probs != 0:
            loss = row_loss_of_probs(p, row, lse, buffer, target_buffer)
        else:
            loss = row_loss_of_index(p, row, lse, buffer)
        loss *= token_weight(p, row)
    pointer(o.loss, p.zero)[row] = cast(loss, p.zero)
    if o.lse != 0:
        pointer(o.lse, p.zero)[row] = lse.high
    if o.lse_low != 0:
        pointer(o.lse_low, p.zero)[row] = lse.low
    if o.correct != 0 or o.argmax != 0:
        write_argmax(p, o, row, maximum, lse, row_argmax(p, row, maximum, lse, buffer))
    if o.entropy != 0:
        pointer(o.entropy, p.zero)[row] = cast(row_entropy(p, row, lse, buffer), p.zero)
    return lse


@njit(**EXACT)
def row_coefficient_sum(p: Problem, row: int, buffer: Pointer) -> float:
    total = 0.0
    for block in range(blocks(p)):
        span = block_span(p, block)
        total += block_sum(coefficients(p, row, span, buffer), span.n)
    return total


@njit(**EXACT)
def gradient_weights(
    p: Problem, row: int, lse: Lse, u: RowUpstream, buffer: Pointer
) -> GradientWeights:
    if ignored(p, row):
        return GradientWeights(-1, 0.0, u.grad_lse, 0.0, -u.grad_entropy, u.entropy)
    eps, w, grad = p.label_smoothing, 1.0, u.grad * token_weight(p, row)
    target, target_weight, softmax_weight, uniform_weight = -1, 0.0, u.grad_lse, grad
    if p.probs != 0:
        softmax_weight += grad * row_coefficient_sum(p, row, buffer)
    else:
        w = class_weight_of_target(p, row)
        target = pointer(p.target, INT64)[row]
        target_weight = grad * (1 - eps) * w
        uniform_weight = grad * eps / p.vocab if eps != 0 else 0.0
        softmax_weight += uniform_weight * p.weight_sum
    if p.z_loss != 0:
        softmax_weight += grad * 2 * p.z_loss * w * lse.high
    return GradientWeights(
        target, target_weight, softmax_weight, uniform_weight, -u.grad_entropy, u.entropy
    )


@njit(**EXACT)
def subtract_uniform(
    p: Problem, row: int, span: Span, uniform_weight: float, grad: Pointer, buffer: Pointer
) -> None:
    """Subtract uniform_weight b_c."""
    scale = cast(uniform_weight, p.zero)
    if p.probs != 0:
        block_subtract(grad, coefficients(p, row, span, buffer), span.n, scale)
    elif p.weight != 0:
        block_subtract(grad, class_weights(p, span.start), span.n, scale)
    else:
        block_affine(grad, span.n, cast(1, p.zero), -scale)


@njit(**EXACT)
def target_gradient(weights: GradientWeights, log_p: Real) -> float:
    """Of the target, without uniform_weight."""
    p = exp_nonpositive(log_p)
    gradient = weights.softmax_weight * p + weights.target_weight * expm1(float(log_p))
    if weights.entropy_weight == 0 or p == 0:
        return gradient
    return gradient + weights.entropy_weight * p * (log_p + weights.entropy)


@njit(**EXACT)
def softmax_scale(p: Problem, weights: GradientWeights) -> Real:
    return cast(weights.target_weight + weights.softmax_weight, p.zero)


@njit(**EXACT)
def gradient_of_block(
    p: Problem, row: int, span: Span, lse: Lse, weights: GradientWeights, gradient: Pointer
) -> None:
    """The gradient of a block in L1."""
    buffer, slope = block_buffer(p.zero), block_buffer(p.zero)
    z = scores_and_slopes(p, row, span, buffer, slope)
    scale = softmax_scale(p, weights)
    if weights.entropy_weight == 0:
        block_softmax(z, span.n, lse, scale, gradient)
    else:
        through_entropy = cast(weights.entropy_weight, p.zero)
        block_entropy_gradient(z, span.n, lse, scale, through_entropy, weights.entropy, gradient)
    target = weights.target - span.start
    if 0 <= target < span.n:
        log_p = log_probability(z[target], lse)
        gradient[target] = cast(target_gradient(weights, log_p), p.zero)
    if weights.uniform_weight != 0:
        subtract_uniform(p, row, span, weights.uniform_weight, gradient, buffer)
    if p.softcap != 0:
        block_multiply(gradient, slope, span.n)
    if p.logit_scale != 1:
        block_scale(gradient, span.n, cast(p.logit_scale, p.zero))


@njit(**EXACT)
def gradient_by_blocks(
    p: Problem, row: int, lse: Lse, weights: GradientWeights, to: Destination
) -> None:
    gradient = block_buffer(p.zero)
    for block in range(blocks(p)):
        span = block_span(p, block)
        gradient_of_block(p, row, span, lse, weights, gradient)
        store_gradient(gradient, span.n, None, destination_from(to, span.start))


@njit(**EXACT)
def can_be_in_registers(p: Problem, weights: GradientWeights) -> bool:
    """Where scores are plain, b_c is 1, the scale's products with coefficients are finite, and the
    entropy has no upstream: another loop would take as long again to compile."""
    if weights.entropy_weight != 0:
        return False
    scale = softmax_scale(p, weights)
    uniform_is_constant = weights.uniform_weight == 0 or (p.probs == 0 and p.weight == 0)
    return has_plain_scores(p) and uniform_is_constant and isfinite(scale + scale)


@njit(**EXACT)
def gradient_in_registers(
    p: Problem, row: int, lse: Lse, weights: GradientWeights, to: Destination
) -> None:
    z = logits_at(p, row, 0)
    uniform = cast(weights.uniform_weight, p.zero)
    log_p = p.zero  # before the row is written: `to` may be where the logits are
    if weights.target >= 0:
        log_p = log_probability(widen(z[weights.target]), lse)
    scale = softmax_scale(p, weights) * exp_of_low(lse)
    store_gradient(z, p.vocab, Softmax(lse.high, scale, uniform), to)
    if weights.target >= 0:
        gradient = cast(target_gradient(weights, log_p), p.zero) - uniform
        to.out[weights.target] = narrow(gradient, to.out)


@njit(**EXACT)
def zero_row(p: Problem, to: Destination) -> None:
    zeros = block_buffer(p.zero)
    block_fill(zeros, BLOCK, p.zero)
    for block in range(blocks(p)):
        span = block_span(p, block)
        store_gradient(zeros, span.n, None, destination_from(to, span.start))


@njit(**EXACT)
def next_logits(p: Problem, row: int) -> int:
    """The address of what is read after this row; 0 if that is nothing."""
    if row + 1 == p.rows or ignored(p, row + 1):
        return 0
    return address_of(logits_at(p, row + 1, 0))


@njit(**EXACT)
def row_backward(p: Problem, g: Gradient, row: int, lse: Lse, u: RowUpstream) -> None:
    """One row of the gradient."""
    out = pointer(g.out + row * g.out_stride * itemsize(p.stored), p.stored)
    to = Destination(out, g.bypass_cache, next_logits(p, row))
    unused = u.grad_lse == 0 and u.grad_entropy == 0
    if ignored(p, row) and (unused or not isfinite(lse.high)):
        zero_row(p, to)  # even where the logits are NaN
        return
    weights = gradient_weights(p, row, lse, u, block_buffer(p.zero))
    if can_be_in_registers(p, weights):
        gradient_in_registers(p, row, lse, weights, to)
    else:
        gradient_by_blocks(p, row, lse, weights, to)
