"""nll: the Numba version of nll.pyx, with the same functions and arguments.

Read nll.pyx first: its formulas and notes hold here. How threads share the rows is in threads.py.

(a) forward, backward and forward_backward are one compiled function, which skips what has the
    address 0: compiling is what a first call waits for. float32 and both 16-bit types share it,
    float64 has its own. `zero` in Problem is a number of the type that is computed in.
(b) Every float is passed as float(...): for an int Numba would compile everything again.
(c) What is decorated by njit is annotated for the reader. mypy knows nothing of Numba's types.
"""

from __future__ import annotations

import ctypes
from math import expm1, inf, isfinite, isnan, nan
from typing import NamedTuple

import numpy as np
from numba import njit, prange

from neglog.kernels.numba.block import (  # isort: skip
    UINT8, Lse, block_affine, block_contains, block_copy, block_log_probability_dot,
    block_log_probability_sum, block_multiply, block_negative_entropy, block_scale, block_softcap,
    block_softcap_and_slope, block_softmax, block_subtract, block_sum, exp_nonpositive, finish,
    log_probability, update, zero_bytes,
)  # fmt: skip
from neglog.kernels.numba.halves import narrow_block, widen_block  # isort: skip
from neglog.kernels.numba.intrinsics import (  # isort: skip
    BLOCK, EXACT, Pointer, Real, block_buffer, cast, fetch_add, pointer,
)  # fmt: skip
from neglog.kernels.numba.threads import call_with_threads  # isort: skip

FLOAT64 = 1
INT64, UINT16 = np.int64(0), np.uint16(0)


class Problem(NamedTuple):
    """The arguments that all share: addresses, 0 where an array is absent; strides in elements."""

    zero: Real
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
    """Columns start to start + n of a row."""

    start: int
    n: int


class Output(NamedTuple):
    loss: int
    lse: int
    lse_low: int
    correct: int
    entropy: int


class GradientWeights(NamedTuple):
    """softmax_weight p_c + target_weight (p_c - [c = t]) - uniform_weight b_c, as in nll.pyx."""

    target: int  # -1 if there is no index
    target_weight: float
    softmax_weight: float
    uniform_weight: float


class Gradient(NamedTuple):
    """Where the gradient is written, 0 for nowhere, and the gradients of the loss and the lse."""

    out: int
    out_stride: int
    grad: int  # 0: every one is 1
    grad_stride: int
    grad_scale: float
    grad_lse: int


# Reading a block


@njit(**EXACT)
def block_span(p: Problem, block: int) -> Span:
    return Span(block * BLOCK, min(BLOCK, p.vocab - block * BLOCK))


@njit(**EXACT)
def stored_as_real(p: Problem) -> bool:
    """Whether the arrays are of the type that is computed in."""
    return p.dtype <= FLOAT64


@njit(**EXACT)
def as_real(p: Problem, source: int, buffer: Pointer, n: int) -> Pointer:
    """The block at `source` as real numbers: itself, or its conversion in `buffer`."""
    if stored_as_real(p):
        return pointer(source, p.zero)
    widen_block(pointer(source, UINT16), p.dtype, n, buffer)
    return buffer


@njit(**EXACT)
def scaled_logits(p: Problem, row: int, span: Span, buffer: Pointer) -> Pointer:
    """The block of logits after the scale. With a softcap they are in the buffer."""
    z = as_real(p, p.logits + (row * p.logits_stride + span.start) * p.itemsize, buffer, span.n)
    if p.logit_scale == 1 and p.softcap == 0:
        return z
    if stored_as_real(p):
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
    return pointer(p.weight + start * (8 if p.dtype == FLOAT64 else 4), p.zero)


@njit(**EXACT)
def coefficients(p: Problem, row: int, span: Span, buffer: Pointer) -> Pointer:
    """The weights w_c q'_c of the log-probabilities, for a target of probabilities."""
    q = as_real(p, p.probs + (row * p.probs_stride + span.start) * p.itemsize, buffer, span.n)
    if p.label_smoothing == 0 and p.weight == 0:
        return q
    if stored_as_real(p):
        block_copy(q, span.n, buffer)
    uniform = p.label_smoothing / p.vocab
    block_affine(buffer, span.n, cast(1 - p.label_smoothing, p.zero), cast(uniform, p.zero))
    if p.weight != 0:
        block_multiply(buffer, class_weights(p, span.start), span.n)
    return buffer


# One row


@njit(**EXACT)
def ignored(p: Problem, row: int) -> bool:
    return p.target != 0 and pointer(p.target, INT64)[row] == p.ignore_index


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
def row_lse(p: Problem, row: int, buffer: Pointer) -> tuple[Lse, Real]:
    """The row's log-sum-exp, and its maximum."""
    state = (cast(-inf, p.zero), 0.0)
    for block in range(p.blocks):
        span = block_span(p, block)
        state = update(state, scores(p, row, span, buffer), span.n)
    return finish(state), state[0]


@njit(**EXACT)
def row_loss_of_index(p: Problem, row: int, lse: Lse, buffer: Pointer) -> float:
    w = class_weight_of_target(p, row)
    log_p = log_probability(score_at(p, row, pointer(p.target, INT64)[row]), lse)
    loss = -(1 - p.label_smoothing) * w * log_p
    if p.label_smoothing != 0:
        total = 0.0
        for block in range(p.blocks):
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
    for block in range(p.blocks):
        span = block_span(p, block)
        weights = coefficients(p, row, span, target_buffer)
        total += block_log_probability_dot(scores(p, row, span, buffer), weights, span.n, lse)
    if p.z_loss != 0:
        return p.z_loss * (float(lse.high) * lse.high) - total
    return -total


@njit(**EXACT)
def row_entropy(p: Problem, row: int, lse: Lse, buffer: Pointer) -> float:
    total = 0.0
    for block in range(p.blocks):
        span = block_span(p, block)
        total += block_negative_entropy(scores(p, row, span, buffer), span.n, lse)
    return -total


@njit(**EXACT)
def row_correct(p: Problem, row: int, maximum: Real, lse: Lse, buffer: Pointer) -> bool:
    """Whether the target is what argmax returns: the first column that has the maximum."""
    nan_among_finite = isnan(lse.high) and maximum < inf
    if p.target == 0 or ignored(p, row) or nan_among_finite:
        return False
    target = pointer(p.target, INT64)[row]
    if score_at(p, row, target) != maximum:
        return False
    for block in range(target // BLOCK + 1):
        span = block_span(p, block)
        before = min(span.n, target - span.start)
        if block_contains(scores(p, row, Span(span.start, before), buffer), before, maximum):
            return False
    return True


@njit(**EXACT)
def row_forward(p: Problem, o: Output, row: int) -> Lse:
    """Write the row's loss and statistics; return its log-sum-exp."""
    buffer, target_buffer = block_buffer(p.zero), block_buffer(p.zero)
    lse, maximum, loss = Lse(p.zero, p.zero), p.zero, 0.0
    if not ignored(p, row) or o.correct != 0 or o.entropy != 0:
        lse, maximum = row_lse(p, row, buffer)
    if p.probs != 0:
        loss = row_loss_of_probs(p, row, lse, buffer, target_buffer)
    elif not ignored(p, row):
        loss = row_loss_of_index(p, row, lse, buffer)
    pointer(o.loss, p.zero)[row] = cast(loss, p.zero)
    if o.lse != 0:
        pointer(o.lse, p.zero)[row] = lse.high
    if o.lse_low != 0:
        pointer(o.lse_low, p.zero)[row] = lse.low
    if o.correct != 0:
        pointer(o.correct, UINT8)[row] = row_correct(p, row, maximum, lse, buffer)
    if o.entropy != 0:
        pointer(o.entropy, p.zero)[row] = cast(row_entropy(p, row, lse, buffer), p.zero)
    return lse


@njit(**EXACT)
def row_coefficient_sum(p: Problem, row: int, buffer: Pointer) -> float:
    total = 0.0
    for block in range(p.blocks):
        span = block_span(p, block)
        total += block_sum(coefficients(p, row, span, buffer), span.n)
    return total


@njit(**EXACT)
def gradient_weights(
    p: Problem, row: int, lse: Lse, grad: float, grad_lse: float, buffer: Pointer
) -> GradientWeights:
    """For the gradients `grad` of the row's loss and `grad_lse` of its lse."""
    if ignored(p, row):
        return GradientWeights(-1, 0.0, grad_lse, 0.0)
    eps, w = p.label_smoothing, 1.0
    target, target_weight, softmax_weight, uniform_weight = -1, 0.0, grad_lse, grad
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
    return GradientWeights(target, target_weight, softmax_weight, uniform_weight)


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
    """softmax_weight p + target_weight (p - 1) of the target."""
    through_softmax = weights.softmax_weight * exp_nonpositive(log_p)
    return through_softmax + weights.target_weight * expm1(float(log_p))


@njit(**EXACT)
def block_backward(
    p: Problem, row: int, span: Span, lse: Lse, weights: GradientWeights, z: Pointer,
    slope: Pointer, grad: Pointer, buffer: Pointer,
) -> None:  # fmt: skip
    target = weights.target - span.start
    target_in_block = 0 <= target < span.n
    # Before the block is written: `grad` may be where `z` is.
    log_p = log_probability(z[target], lse) if target_in_block else p.zero
    scale = cast(weights.target_weight + weights.softmax_weight, p.zero)
    block_softmax(z, span.n, lse, scale, grad)
    if target_in_block:
        grad[target] = cast(target_gradient(weights, log_p), p.zero)
    if weights.uniform_weight != 0:
        subtract_uniform(p, row, span, weights.uniform_weight, grad, buffer)
    if p.softcap != 0:
        block_multiply(grad, slope, span.n)
    if p.logit_scale != 1:
        block_scale(grad, span.n, cast(p.logit_scale, p.zero))


@njit(**EXACT)
def row_backward(p: Problem, g: Gradient, row: int, lse: Lse, grad: float, grad_lse: float) -> None:
    """One row of the gradient, for upstream `grad` of the loss and `grad_lse` of the lse."""
    buffer, target_buffer = block_buffer(p.zero), block_buffer(p.zero)
    grad_buffer, slope = block_buffer(p.zero), block_buffer(p.zero)
    start = g.out + row * g.out_stride * p.itemsize
    # Exactly zero, even where the logits are NaN.
    if ignored(p, row) and (grad_lse == 0 or not isfinite(lse.high)):
        zero_bytes(start, p.vocab * p.itemsize)
        return
    weights = gradient_weights(p, row, lse, grad, grad_lse, target_buffer)
    for block in range(p.blocks):
        span = block_span(p, block)
        out = start + span.start * p.itemsize
        destination = pointer(out, p.zero) if stored_as_real(p) else grad_buffer
        z = scores_and_slopes(p, row, span, buffer, slope)
        block_backward(p, row, span, lse, weights, z, slope, destination, target_buffer)
        if not stored_as_real(p):
            narrow_block(grad_buffer, p.dtype, span.n, pointer(out, UINT16))


# All rows


@njit(**EXACT)
def rows_per_chunk(p: Problem) -> int:
    """How many rows a thread takes at a time.

    About 256 KB, so that threads seldom wait for one another's change of the counter.
    """
    return max(1, (256 << 10) // (p.vocab * p.itemsize + 1))


@njit(**EXACT)
def sum_rows(p: Problem, o: Output) -> float:
    total = 0.0
    for row in range(p.rows if o.loss != 0 else 0):
        total += pointer(o.loss, p.zero)[row]
    return total


@njit(**EXACT)
def process_row(p: Problem, o: Output, g: Gradient, row: int) -> None:
    """Forward if there is a loss to write, else the lse is read; backward if there is an `out`."""
    if o.loss != 0:
        lse = row_forward(p, o, row)
    else:
        lse = Lse(pointer(o.lse, p.zero)[row], pointer(o.lse_low, p.zero)[row])
    if g.out != 0:
        grad = 1.0 if g.grad == 0 else float(pointer(g.grad, p.zero)[row * g.grad_stride])
        grad_lse = 0.0 if g.grad_lse == 0 else float(pointer(g.grad_lse, p.zero)[row])
        row_backward(p, g, row, lse, grad * g.grad_scale, grad_lse)


@njit(**EXACT)
def process_rows(p: Problem, o: Output, g: Gradient, counter: int) -> None:
    """What each thread does: take rows until none are left."""
    while True:
        start = fetch_add(pointer(counter, INT64), rows_per_chunk(p))
        if start >= p.rows:
            return
        for row in range(start, min(start + rows_per_chunk(p), p.rows)):
            process_row(p, o, g, row)


@njit(nogil=True, cache=True, **EXACT)
def run_serial(p: Problem, o: Output, g: Gradient, counter: int) -> float:
    process_rows(p, o, g, counter)
    return sum_rows(p, o)


@njit(parallel=True, cache=True, **EXACT)
def run_parallel(p: Problem, o: Output, g: Gradient, counter: int, workers: int) -> float:
    for _ in prange(workers):
        process_rows(p, o, g, counter)
    return sum_rows(p, o)


@njit(nogil=True, cache=True, **EXACT)
def sum_weights(zero: Real, vocab: int, weight: int) -> float:
    return float(block_sum(pointer(weight, zero), vocab))


@njit(nogil=True, cache=True, **EXACT)
def sum_target_weights(
    zero: Real, rows: int, vocab: int, target: int, weight: int, ignore_index: int
) -> tuple[float, int, int]:
    """The sum over the counted rows; the first row with a bad target, or -1; that target."""
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


def _zero_of(dtype: int) -> Real:
    return np.float64(0) if dtype == FLOAT64 else np.float32(0)


def _softcap_of(dtype: int, softcap: float) -> float:
    """0 for none: as in nll.pyx."""
    limits = np.finfo(_zero_of(dtype).dtype)
    if softcap == 0 or softcap > float(limits.max):
        return 0.0
    return max(float(softcap), float(limits.tiny))


def _make_problem(
    dtype: int, rows: int, vocab: int, logits: int, logits_stride: int, target: int, probs: int,
    probs_stride: int, weight: int, ignore_index: int, label_smoothing: float, logit_scale: float,
    softcap: float, z_loss: float,
) -> Problem:  # fmt: skip
    total = float(vocab)
    if weight != 0 and label_smoothing != 0:
        total = sum_weights(_zero_of(dtype), vocab, weight)
    return Problem(_zero_of(dtype), dtype, rows, vocab, logits, logits_stride, target, probs,
                   probs_stride, weight, ignore_index, float(label_smoothing), float(logit_scale),
                   _softcap_of(dtype, softcap), float(z_loss), total, (4, 8, 2, 2)[dtype],
                   -(-vocab // BLOCK))  # fmt: skip


def total_weight(
    rows: int, vocab: int, target: int, probs: int, weight: int, ignore_index: int, dtype: int
) -> float:
    """The divisor of the mean: the sum of the counted rows' weights, or the rows for probabilities.

    Raises IndexError for the first target that is neither ignored nor in [0, vocab).
    """
    if probs != 0:
        return float(rows) if vocab else nan  # as torch, whose rows are numbers / classes
    total, row, t = sum_target_weights(_zero_of(dtype), rows, vocab, target, weight, ignore_index)
    if row >= 0:
        raise IndexError(f"target {t} at row {row} is out of range: expected 0 <= target < {vocab}")
    return total


def forward(
    dtype: int, rows: int, vocab: int, logits: int, logits_stride: int, target: int, probs: int,
    probs_stride: int, weight: int, ignore_index: int, label_smoothing: float, logit_scale: float,
    softcap: float, z_loss: float, loss: int, lse: int, lse_low: int, correct: int,
    entropy: int, threads: int,
) -> float:  # fmt: skip
    """Write each row's loss and statistics; return the sum of the losses."""
    p = _make_problem(
        dtype, rows, vocab, logits, logits_stride, target, probs, probs_stride, weight,
        ignore_index, label_smoothing, logit_scale, softcap, z_loss,
    )  # fmt: skip
    o = Output(loss, lse, lse_low, correct, entropy)
    return call_with_threads(threads, run_serial, run_parallel, p, o, Gradient(0, 0, 0, 0, 1.0, 0))


def backward(
    dtype: int, rows: int, vocab: int, logits: int, logits_stride: int, target: int, probs: int,
    probs_stride: int, weight: int, ignore_index: int, label_smoothing: float, logit_scale: float,
    softcap: float, z_loss: float, lse: int, lse_low: int, grad: int, grad_stride: int,
    grad_scale: float, grad_lse: int, out: int, out_stride: int, threads: int,
) -> None:  # fmt: skip
    """Write the gradient of the logits for upstream `grad * grad_scale` and `grad_lse`."""
    p = _make_problem(
        dtype, rows, vocab, logits, logits_stride, target, probs, probs_stride, weight,
        ignore_index, label_smoothing, logit_scale, softcap, z_loss,
    )  # fmt: skip
    g = Gradient(out, out_stride, grad, grad_stride, float(grad_scale), grad_lse)
    o = Output(0, lse, lse_low, 0, 0)
    call_with_threads(threads, run_serial, run_parallel, p, o, g)


def forward_backward(
    dtype: int, rows: int, vocab: int, logits: int, logits_stride: int, target: int, probs: int,
    probs_stride: int, weight: int, ignore_index: int, label_smoothing: float, logit_scale: float,
    softcap: float, z_loss: float, loss: int, lse: int, lse_low: int, correct: int,
    entropy: int, grad_scale: float, out: int, out_stride: int, threads: int,
) -> float:  # fmt: skip
    """forward, and while each row is in cache its gradient, for upstream `grad_scale`.

    `out` may be the address of the logits.
    """
    p = _make_problem(
        dtype, rows, vocab, logits, logits_stride, target, probs, probs_stride, weight,
        ignore_index, label_smoothing, logit_scale, softcap, z_loss,
    )  # fmt: skip
    g = Gradient(out, out_stride, 0, 0, float(grad_scale), 0)
    o = Output(loss, lse, lse_low, correct, entropy)
    return call_with_threads(threads, run_serial, run_parallel, p, o, g)


def loss_and_gradient(
    dtype: int, rows: int, vocab: int, logits: int, logits_stride: int, target: int, probs: int,
    probs_stride: int, weight: int, ignore_index: int, label_smoothing: float, logit_scale: float,
    softcap: float, z_loss: float, row_loss: int, lse: int, lse_low: int, correct: int,
    entropy: int, mean: bool, num_items: float | None, upstream: float, loss: int, out: int,
    out_stride: int, threads: int,
) -> float:  # fmt: skip
    """total_weight and forward_backward of a loss that is one number, which is written to `loss`.

    Return the divisor of its mean. The gradient is that of upstream / divisor.
    """
    weights = total_weight(rows, vocab, target, probs, weight, ignore_index, dtype)
    real = type(_zero_of(dtype))
    with np.errstate(all="ignore"):
        divisor = np.float64(real(weights) if num_items is None else num_items) + 0.0  # not -0
        total = np.float64(forward_backward(
            dtype, rows, vocab, logits, logits_stride, target, probs, probs_stride, weight,
            ignore_index, label_smoothing, logit_scale, softcap, z_loss, row_loss, lse, lse_low,
            correct, entropy, upstream * (1 / divisor) if mean else upstream, out, out_stride,
            threads,
        ))  # fmt: skip
        value = real(total / divisor if mean else total)
    ctypes.memmove(loss, value.tobytes(), value.itemsize)
    return float(divisor)
