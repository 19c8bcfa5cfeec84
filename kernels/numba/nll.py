"""The Numba twin of nll.pyx: same functions, same signatures, same walk over the rows.

(a) Read nll.pyx first; its notes hold here. What it takes from types is here in Problem: `zero` is
    a number of the accum dtype.
(b) forward, backward and fused are one compiled function, told by zeros what not to do: compiling
    is what a first call waits for. float32 and both 16-bit types share it, float64 has its own.
(c) Threads take rows from a shared counter, because prange alone cuts them in equal parts: a
    prompt of ignored rows would leave one thread with all the work.
(d) One thread goes round Numba's threading layer: GNU's does not survive a fork, and Numba's own
    ends the process when two Python threads enter it. For that the parallel one keeps the GIL.
(e) float() on every float: an int would compile everything anew.
"""

# mypy: ignore-errors

from math import expm1, inf, isnan, nan
from typing import NamedTuple

import numba
import numpy as np
from numba import njit, prange

from neglog.kernels.numba.block import (  # isort: skip
    BLOCK, EXACT, UINT16, Lse, absorb, block_affine, block_buffer,
    block_contains, block_copy, block_log_probability_dot, block_log_probability_sum,
    block_multiply, block_negative_entropy, block_scale, block_softcap, block_softcap_backward,
    block_softmax, block_subtract, block_sum, exp_nonpositive, finish, log_probability, narrow,
    pointer, real, take, widen,
)  # fmt: skip

FLOAT64 = 1
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
    """Where the gradient goes, 0 for nowhere, and what flows in from the loss and the lse."""

    out: int
    out_stride: int
    grad: int  # 0: of one
    grad_stride: int
    grad_scale: float
    grad_lse: int


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
    if is_real(p):
        block_copy(z, at.n, buffer)
    block_scale(buffer, at.n, real(p.logit_scale, p.zero))
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
    if is_real(p):
        block_copy(q, at.n, buffer)
    spread = p.label_smoothing / p.vocab
    block_affine(buffer, at.n, real(1 - p.label_smoothing, p.zero), real(spread, p.zero))
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
    state = (real(-inf, p.zero), 0.0)
    for block in range(p.blocks):
        at = span(p, block)
        state = absorb(state, scores(p, row, at, buffer), at.n)
    return finish(state), state[0]


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
    nan_among_finite = isnan(lse.high) and maximum < inf
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
        block_affine(grad, at.n, real(1, p.zero), -spread)


@njit(**EXACT)
def block_backward(p, row, at, lse, f, z, grad, buffer):
    target = f.target - at.start
    here = 0 <= target < at.n
    # Read before the block is written: grad may lie where z does.
    log_p = log_probability(z[target], lse) if here else p.zero
    block_softmax(z, at.n, lse, real(f.hard + f.soft, p.zero), grad)
    if here:
        at_target = f.soft * exp_nonpositive(log_p) + f.hard * expm1(float(log_p))
        grad[target] = real(at_target, p.zero)
    if f.spread != 0:
        subtract_target(p, row, at, f, grad, buffer)
    if p.softcap != 0:
        block_softcap_backward(grad, z, at.n, real(p.softcap, p.zero))
    if p.logit_scale != 1:
        block_scale(grad, at.n, real(p.logit_scale, p.zero))


@njit(**EXACT)
def row_backward(p, g, row, lse, grad, grad_lse):
    """One row of the gradient, for upstream `grad` of the loss and `grad_lse` of the lse."""
    buffer, second, result = block_buffer(p.zero), block_buffer(p.zero), block_buffer(p.zero)
    start = g.out + row * g.out_stride * p.itemsize
    if ignored(p, row) and grad_lse == 0:  # exactly zero, even where the logits are NaN
        for byte in range(p.vocab * p.itemsize):
            pointer(start, UINT8)[byte] = 0
        return
    f = row_factors(p, row, lse, grad, grad_lse, second)
    for block in range(p.blocks):
        at = span(p, block)
        out = start + at.start * p.itemsize
        written = pointer(out, p.zero) if is_real(p) else result
        block_backward(p, row, at, lse, f, scores(p, row, at, buffer), written, second)
        if not is_real(p):
            narrow(result, p.dtype, at.n, pointer(out, UINT16))


# All rows


@njit(**EXACT)
def rows_at_once(p):
    """How many rows a thread takes at a time: about 256 KB, so that short rows do not fight over
    the counter."""
    return max(1, (256 << 10) // (p.vocab * p.itemsize + 1))


@njit(**EXACT)
def sum_rows(p, o):
    total = 0.0
    for row in range(p.rows if o.loss != 0 else 0):
        total += pointer(o.loss, p.zero)[row]
    return total


@njit(**EXACT)
def one_row(p, o, g, row):
    """Forward if there is a loss to write, else its lse is read; then backward if asked."""
    if o.loss != 0:
        lse = row_forward(p, o, row)
    else:
        lse = Lse(pointer(o.lse, p.zero)[row], pointer(o.lse_low, p.zero)[row])
    if g.out != 0:
        grad = 1.0 if g.grad == 0 else float(pointer(g.grad, p.zero)[row * g.grad_stride])
        grad_lse = 0.0 if g.grad_lse == 0 else float(pointer(g.grad_lse, p.zero)[row])
        row_backward(p, g, row, lse, grad * g.grad_scale, grad_lse)


@njit(**EXACT)
def work(p, o, g, counter):
    """Take rows until there are no more: what each thread does."""
    while True:
        start = take(pointer(counter, INT64), rows_at_once(p))
        if start >= p.rows:
            return
        for row in range(start, min(start + rows_at_once(p), p.rows)):
            one_row(p, o, g, row)


@njit(nogil=True, cache=True, **EXACT)
def run_serial(p, o, g, counter):
    work(p, o, g, counter)
    return sum_rows(p, o)


@njit(parallel=True, cache=True, **EXACT)
def run_parallel(p, o, g, counter, workers):
    for _ in prange(workers):
        work(p, o, g, counter)
    return sum_rows(p, o)


@njit(nogil=True, cache=True, **EXACT)
def sum_weights(zero, vocab, weight):
    return float(block_sum(pointer(weight, zero), vocab))


@njit(nogil=True, cache=True, **EXACT)
def sum_target_weights(zero, rows, vocab, target, weight, ignore_index):
    """The sum over the counted rows, and the first row whose target is out of range, or -1."""
    total = 0.0
    for row in range(rows):
        t = pointer(target, INT64)[row]
        if t == ignore_index:
            continue
        if t < 0 or t >= vocab:
            return total, row, t
        total += 1.0 if weight == 0 else float(pointer(weight, zero)[t])
    return total, -1, 0


# From Python


def _zero(dtype):
    return np.float64(0) if dtype == FLOAT64 else np.float32(0)


def _problem(dtype, rows, vocab, logits, logits_stride, target, probs, probs_stride, weight,
             ignore_index, label_smoothing, logit_scale, softcap, z_loss):  # fmt: skip
    total = float(vocab)
    if weight != 0 and label_smoothing != 0:
        total = sum_weights(_zero(dtype), vocab, weight)
    return Problem(_zero(dtype), dtype, rows, vocab, logits, logits_stride, target, probs,
                   probs_stride, weight, ignore_index, float(label_smoothing), float(logit_scale),
                   float(softcap), float(z_loss), total, (4, 8, 2, 2)[dtype],
                   -(-vocab // BLOCK))  # fmt: skip


def _run(threads, p, o, g):
    counter = np.zeros(1, np.int64)
    workers = min(threads, numba.config.NUMBA_NUM_THREADS)
    if workers <= 1:
        return run_serial(p, o, g, counter.ctypes.data)
    before = numba.get_num_threads()
    numba.set_num_threads(workers)
    try:
        return run_parallel(p, o, g, counter.ctypes.data, workers)
    finally:
        numba.set_num_threads(before)


def total_weight(rows, vocab, target, probs, weight, ignore_index, dtype):
    """The divisor of the mean: the sum of the counted rows' weights, or the rows for probabilities.

    Raises IndexError for the first target that is neither ignored nor in [0, vocab).
    """
    if probs != 0:
        return float(rows) if vocab else nan  # as torch, whose rows are numbers / classes
    total, row, t = sum_target_weights(_zero(dtype), rows, vocab, target, weight, ignore_index)
    if row >= 0:
        raise IndexError(f"target {t} at row {row} is out of range: expected 0 <= target < {vocab}")
    return total


def forward(dtype, rows, vocab, logits, logits_stride, target, probs, probs_stride, weight,
            ignore_index, label_smoothing, logit_scale, softcap, z_loss, loss, lse, lse_low,
            correct, entropy, threads):  # fmt: skip
    """Write each row's loss and statistics; return the sum of the losses."""
    p = _problem(dtype, rows, vocab, logits, logits_stride, target, probs, probs_stride, weight,
                 ignore_index, label_smoothing, logit_scale, softcap, z_loss)  # fmt: skip
    o = Output(loss, lse, lse_low, correct, entropy)
    return _run(threads, p, o, Gradient(0, 0, 0, 0, 1.0, 0))


def backward(dtype, rows, vocab, logits, logits_stride, target, probs, probs_stride, weight,
             ignore_index, label_smoothing, logit_scale, softcap, z_loss, lse, lse_low, grad,
             grad_stride, grad_scale, grad_lse, out, out_stride, threads):  # fmt: skip
    """Write the gradient of the logits for upstream `grad * grad_scale` and `grad_lse`."""
    p = _problem(dtype, rows, vocab, logits, logits_stride, target, probs, probs_stride, weight,
                 ignore_index, label_smoothing, logit_scale, softcap, z_loss)  # fmt: skip
    g = Gradient(out, out_stride, grad, grad_stride, float(grad_scale), grad_lse)
    _run(threads, p, Output(0, lse, lse_low, 0, 0), g)


def forward_backward(dtype, rows, vocab, logits, logits_stride, target, probs, probs_stride, weight,
          ignore_index, label_smoothing, logit_scale, softcap, z_loss, loss, lse, correct, entropy,
          grad_scale, out, out_stride, threads):  # fmt: skip
    """Forward, and while each row is in cache its gradient for upstream `grad_scale`.

    `out` may be the logits themselves.
    """
    p = _problem(dtype, rows, vocab, logits, logits_stride, target, probs, probs_stride, weight,
                 ignore_index, label_smoothing, logit_scale, softcap, z_loss)  # fmt: skip
    g = Gradient(out, out_stride, 0, 0, float(grad_scale), 0)
    return _run(threads, p, Output(loss, lse, 0, correct, entropy), g)
