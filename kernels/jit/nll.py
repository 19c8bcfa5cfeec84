"""The Numba twin of nll.pyx: same functions, same signatures, same walk over the rows.

(a) Read nll.pyx first; its notes hold here. Numbers that it takes from types (real, the size of
    one item) are fields of Problem, and `zero` is a number whose type is real.
(b) One compilation serves float32 and both 16-bit types, another float64.
(c) Rows are handed out by a shared counter, because prange alone cuts them in equal parts: a
    prompt of ignored rows would leave one thread with all the work.
(d) Each worker is one function, whether called by one thread or many: the same machine code, so
    the same bits.
"""

# mypy: ignore-errors

from math import expm1, isnan
from typing import NamedTuple

import numba
import numpy as np
from numba import njit, prange

from neglog.kernels.jit.numerics import (
    BLOCK, EXACT, FUSED, INFINITY, UINT16, LogSumExp, Lse, absorb, address_of, block_affine,
    block_buffer, block_contains, block_log_probability_dot, block_log_probability_sum,
    block_multiply, block_negative_entropy, block_scale, block_softcap, block_softcap_backward,
    block_softmax, block_subtract, block_sum, copy_bytes, exp_nonpositive, finish,
    finish_streaming, log_probability, narrow, pointer, real, store_bytes, take, widen, zero_bytes,
)  # fmt: skip

FLOAT32, FLOAT64 = 0, 1
# The gradient's size, in bytes, from which it is streamed past the caches.
STREAM_FROM = 32 << 20
INT64, UINT8 = np.int64(0), np.uint8(0)


class Problem(NamedTuple):
    zero: float
    dtype: int
    rows: int
    vocab: int
    logits: int
    logits_stride: int
    target: int
    probs: int
    probs_stride: int
    weight: int
    ignore_index: int
    label_smoothing: float
    logit_scale: float
    softcap: float
    z_loss: float
    weight_sum: float  # over the vocabulary; the vocabulary's size without weights
    itemsize: int
    blocks: int


class Span(NamedTuple):
    start: int
    n: int


class Output(NamedTuple):
    loss: int
    lse: int
    lse_low: int
    correct: int
    entropy: int


class Factors(NamedTuple):
    target: int
    hard: float
    soft: float
    spread: float


class Gradient(NamedTuple):
    out: int
    stride: int
    stream: bool


# Reading a block


@njit(**EXACT)
def span(p, block):
    return Span(block * BLOCK, min(BLOCK, p.vocab - block * BLOCK))


@njit(**EXACT)
def is_real(p):
    return p.dtype <= FLOAT64


@njit(**EXACT)
def widened(p, source, buffer, n):
    """The block at `source` as real numbers: in place if they are, else through `buffer`."""
    if is_real(p):
        return pointer(source, p.zero)
    widen(pointer(source, UINT16), p.dtype, n, buffer)
    return buffer


@njit(**EXACT)
def scores(p, row, at, buffer):
    """The block of logits after scale and cap: the z of the formulas."""
    z = widened(p, p.logits + (row * p.logits_stride + at.start) * p.itemsize, buffer, at.n)
    if p.logit_scale == 1 and p.softcap == 0:
        return z
    block_scale(z, at.n, real(p.logit_scale, p.zero), buffer)
    if p.softcap != 0:
        block_softcap(buffer, at.n, real(p.softcap, p.zero))
    return buffer


@njit(**EXACT)
def weights(p, start):
    """The class weights from column `start` on."""
    return pointer(p.weight + start * (8 if p.dtype == FLOAT64 else 4), p.zero)


@njit(**EXACT)
def coefficients(p, row, at, buffer):
    """The weight of each log-probability in a row with a probability target, w_c q'_c."""
    q = widened(p, p.probs + (row * p.probs_stride + at.start) * p.itemsize, buffer, at.n)
    if p.label_smoothing == 0 and p.weight == 0:
        return q
    spread = p.label_smoothing / p.vocab
    block_affine(q, at.n, real(1 - p.label_smoothing, p.zero), real(spread, p.zero), buffer)
    if p.weight != 0:
        block_multiply(buffer, weights(p, at.start), at.n)
    return buffer


# One row


@njit(**EXACT)
def ignored(p, row):
    return p.target != 0 and pointer(p.target, INT64)[row] == p.ignore_index


@njit(**EXACT)
def target_weight(p, row):
    if p.weight == 0:
        return 1.0
    return float(weights(p, 0)[pointer(p.target, INT64)[row]])


@njit(**EXACT)
def score_at(p, row, column):
    return scores(p, row, Span(column, 1), block_buffer(p.zero))[0]


@njit(**EXACT)
def row_lse(p, row, buffer):
    """The row's log-sum-exp and its maximum."""
    state = LogSumExp(real(-INFINITY, p.zero), p.zero)
    for block in range(p.blocks):
        at = span(p, block)
        state = absorb(state, scores(p, row, at, buffer), at.n)
    return finish(state), state.maximum


@njit(**EXACT)
def row_loss_of_index(p, row, lse, buffer):
    w = target_weight(p, row)
    log_p = log_probability(score_at(p, row, pointer(p.target, INT64)[row]), lse)
    loss = -(1 - p.label_smoothing) * w * log_p
    if p.label_smoothing != 0:
        total = 0.0
        for block in range(p.blocks):
            at = span(p, block)
            z = scores(p, row, at, buffer)
            if p.weight == 0:
                total += block_log_probability_sum(z, at.n, lse)
            else:
                total += block_log_probability_dot(z, weights(p, at.start), at.n, lse)
        loss -= p.label_smoothing / p.vocab * total
    if p.z_loss != 0:
        loss += p.z_loss * w * (float(lse.high) * lse.high)
    return loss


@njit(**EXACT)
def row_loss_of_probs(p, row, lse, buffer, second):
    total = 0.0
    for block in range(p.blocks):
        at = span(p, block)
        a = coefficients(p, row, at, second)
        total += block_log_probability_dot(scores(p, row, at, buffer), a, at.n, lse)
    if p.z_loss != 0:
        return p.z_loss * (float(lse.high) * lse.high) - total
    return -total


@njit(**EXACT)
def row_entropy(p, row, lse, buffer):
    total = 0.0
    for block in range(p.blocks):
        at = span(p, block)
        total += block_negative_entropy(scores(p, row, at, buffer), at.n, lse)
    return -total


@njit(**EXACT)
def row_correct(p, row, maximum, lse, buffer):
    """Whether the target is where argmax would look: the first of the maxima."""
    nan_among_finite = isnan(lse.high) and maximum < INFINITY
    if p.target == 0 or ignored(p, row) or nan_among_finite:
        return False
    target = pointer(p.target, INT64)[row]
    if score_at(p, row, target) != maximum:
        return False
    for block in range(target // BLOCK + 1):
        at = span(p, block)
        before = min(at.n, target - at.start)
        if block_contains(scores(p, row, Span(at.start, before), buffer), before, maximum):
            return False
    return True


@njit(**EXACT)
def row_forward(p, o, row):
    """Write the row's loss and statistics; return its lse."""
    buffer, second = block_buffer(p.zero), block_buffer(p.zero)
    lse, maximum, loss = Lse(p.zero, p.zero), p.zero, 0.0
    if not ignored(p, row) or o.correct != 0 or o.entropy != 0:
        lse, maximum = row_lse(p, row, buffer)
    if p.probs != 0:
        loss = row_loss_of_probs(p, row, lse, buffer, second)
    elif not ignored(p, row):
        loss = row_loss_of_index(p, row, lse, buffer)
    pointer(o.loss, p.zero)[row] = real(loss, p.zero)
    if o.lse != 0:
        pointer(o.lse, p.zero)[row] = lse.high
    if o.lse_low != 0:
        pointer(o.lse_low, p.zero)[row] = lse.low
    if o.correct != 0:
        pointer(o.correct, UINT8)[row] = row_correct(p, row, maximum, lse, buffer)
    if o.entropy != 0:
        pointer(o.entropy, p.zero)[row] = real(row_entropy(p, row, lse, buffer), p.zero)
    return lse


@njit(**EXACT)
def row_coefficient_sum(p, row, buffer):
    total = 0.0
    for block in range(p.blocks):
        at = span(p, block)
        total += block_sum(coefficients(p, row, at, buffer), at.n)
    return total


@njit(**EXACT)
def row_factors(p, row, lse, grad, grad_lse, buffer):
    """The row's gradient is soft * p, plus hard * (p - 1) at the target, less grad * w_c q'_c."""
    if ignored(p, row):
        return Factors(-1, 0.0, grad_lse, 0.0)
    eps, w = p.label_smoothing, 1.0
    target, hard, spread, soft = -1, 0.0, grad, grad_lse
    if p.probs != 0:
        soft += grad * row_coefficient_sum(p, row, buffer)
    else:
        w = target_weight(p, row)
        target = pointer(p.target, INT64)[row]
        hard = grad * (1 - eps) * w
        spread = grad * eps / p.vocab if eps != 0 else 0.0
        soft += spread * p.weight_sum
    if p.z_loss != 0:
        soft += grad * 2 * p.z_loss * w * lse.high
    return Factors(target, hard, soft, spread)


@njit(**EXACT)
def subtract_target(p, row, at, f, grad, buffer):
    """Take off the part of the target that is spread over the vocabulary."""
    spread = real(f.spread, p.zero)
    if p.probs != 0:
        block_subtract(grad, coefficients(p, row, at, buffer), at.n, spread)
    elif p.weight != 0:
        block_subtract(grad, weights(p, at.start), at.n, spread)
    else:
        block_affine(grad, at.n, real(1, p.zero), -spread, grad)


@njit(**EXACT)
def block_backward(p, row, at, lse, f, z, grad, buffer):
    block_softmax(z, at.n, lse, real(f.hard + f.soft, p.zero), grad)
    target = f.target - at.start
    if 0 <= target < at.n:
        log_p = log_probability(z[target], lse)
        at_target = f.soft * exp_nonpositive(log_p) + f.hard * expm1(float(log_p))
        grad[target] = real(at_target, p.zero)
    if f.spread != 0:
        subtract_target(p, row, at, f, grad, buffer)
    if p.softcap != 0:
        block_softcap_backward(grad, z, at.n, real(p.softcap, p.zero))
    if p.logit_scale != 1:
        block_scale(grad, at.n, real(p.logit_scale, p.zero), grad)


@njit(**EXACT)
def write_block(p, n, grad, out, stream, buffer):
    """Write the block to the address `out`, in the logits' type."""
    source = address_of(grad)
    if not is_real(p):
        source = address_of(buffer)
        narrow(grad, p.dtype, n, pointer(source, UINT16))
    store_bytes(source, n * p.itemsize, out, stream)


@njit(**EXACT)
def row_backward(p, g, row, lse, grad, grad_lse):
    """One row of the gradient, for upstream `grad` of the loss and `grad_lse` of the lse."""
    buffer, second = block_buffer(p.zero), block_buffer(p.zero)
    # Never straight into `out`, which may be the logits: LLVM, unsure whether they overlap, would
    # run the loop unvectorised. The copy stays in L1.
    result = block_buffer(p.zero)
    row_out = g.out + row * g.stride * p.itemsize
    if ignored(p, row) and grad_lse == 0:  # exactly zero, even where the logits are NaN
        zero_bytes(row_out, p.vocab * p.itemsize)
        return
    f = row_factors(p, row, lse, grad, grad_lse, second)
    for block in range(p.blocks):
        at = span(p, block)
        block_backward(p, row, at, lse, f, scores(p, row, at, buffer), result, second)
        write_block(p, at.n, result, row_out + at.start * p.itemsize, g.stream, second)


# All rows


@njit(**EXACT)
def rows_at_once(p):
    """How many rows a thread takes at a time: about 256 KB, so that short rows do not fight over
    the counter."""
    return max(1, (256 << 10) // (p.vocab * p.itemsize + 1))


@njit(**EXACT)
def sum_rows(p, o):
    total = 0.0
    for row in range(p.rows):
        total += pointer(o.loss, p.zero)[row]
    return total
