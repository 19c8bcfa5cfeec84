"""nll: the Numba version of nll.pyx, with the same functions and arguments.

Read nll.pyx first: its formulas and notes hold here. How threads share the rows is in threads.py.

(a) forward, backward and forward_backward are one compiled function, which skips what has the
    address 0: compiling is what a first call waits for. Each type in memory has its own: `zero` and
    `stored` in Problem are numbers of the type that is computed in, and of that in memory.
(b) Every float is passed as float(...): for an int Numba would compile everything again.
(c) What is decorated by njit is annotated for the reader. mypy knows nothing of Numba's types.
"""

from __future__ import annotations

import ctypes
from math import nan

import numpy as np
from numba import njit, prange

from neglog.kernels.numba.block import Lse, block_sum  # isort: skip
from neglog.kernels.numba.intrinsics import (  # isort: skip
    EXACT, PARALLEL, SERIAL, Real, fetch_add, finish_streams, pointer,
)  # fmt: skip
from neglog.kernels.numba.problem import Gradient, Output, Problem  # isort: skip
from neglog.kernels.numba.row import AHEAD, RowUpstream, row_backward, row_forward  # isort: skip
from neglog.kernels.numba.positions import takes_layout  # isort: skip
from neglog.kernels.numba.threads import call_with_threads  # isort: skip

FLOAT64 = 1
LARGEST_CACHE = 64 << 20  # bytes
INT64 = np.int64(0)
# By dtype, a number of the type in memory: int16 stands for bfloat16, uint16 for float16.
STORED = (np.float32(0), np.float64(0), np.int16(0), np.uint16(0))


# All rows


@njit(**EXACT)
def sum_rows(p: Problem, o: Output) -> float:
    total = 0.0
    for row in range(p.rows if o.loss != 0 else 0):
        total += pointer(o.loss, p.zero)[row]
    return total


@njit(**EXACT)
def number_of(p: Problem, numbers: int, row: int) -> float:
    return 0.0 if numbers == 0 else float(pointer(numbers, p.zero)[row])


@njit(**EXACT)
def upstream_of(p: Problem, g: Gradient, row: int) -> RowUpstream:
    grad = 1.0 if g.grad == 0 else float(pointer(g.grad, p.zero)[row * g.grad_stride])
    return RowUpstream(
        grad * g.grad_scale, number_of(p, g.grad_lse, row), number_of(p, g.grad_entropy, row),
        number_of(p, g.entropy, row),
    )  # fmt: skip


@njit(**EXACT)
def process_row(p: Problem, o: Output, g: Gradient, row: int) -> None:
    """Forward if there is a loss to write, else the lse is read; backward if there is an `out`."""
    if o.loss != 0:
        # While a gradient is written, the next row is brought in by that.
        lse = row_forward(p, o, row, AHEAD if g.out == 0 else 0)
    else:
        lse = Lse(pointer(o.lse, p.zero)[row], pointer(o.lse_low, p.zero)[row])
    if g.out != 0:
        row_backward(p, g, row, lse, upstream_of(p, g, row))


@njit(**EXACT)
def process_rows(p: Problem, o: Output, g: Gradient, chunk: int, counter: int) -> None:
    """What each thread does: take rows until none are left."""
    while True:
        start = fetch_add(pointer(counter, INT64), chunk)
        if start >= p.rows:
            break
        for row in range(start, min(start + chunk, p.rows)):
            process_row(p, o, g, row)
    finish_streams()


@njit(**SERIAL)
def run_serial(p: Problem, o: Output, g: Gradient, chunk: int, counter: int) -> float:
    process_rows(p, o, g, chunk, counter)
    return sum_rows(p, o)


@njit(**PARALLEL)
def run_parallel(
    p: Problem, o: Output, g: Gradient, chunk: int, counter: int, workers: int
) -> float:
    for _ in prange(workers):
        process_rows(p, o, g, chunk, counter)
    return sum_rows(p, o)


@njit(**SERIAL)
def sum_weights(zero: Real, vocab: int, weight: int) -> float:
    return float(block_sum(pointer(weight, zero), vocab))


@njit(**SERIAL)
def sum_target_weights(
    zero: Real,
    rows: int,
    vocab: int,
    target: int,
    weight: int,
    token_weight: int,
    ignore_index: int,
) -> tuple[float, int, int]:
    """The sum over the counted rows; the first row with a bad target, or -1; that target."""
    total = 0.0
    for row in range(rows):
        t = pointer(target, INT64)[row]
        of_row = 1.0 if token_weight == 0 else float(pointer(token_weight, zero)[row])
        if t == ignore_index or of_row == 0:
            continue
        if t < 0 or t >= vocab:
            return total, row, t
        total += of_row if weight == 0 else of_row * float(pointer(weight, zero)[t])
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
    probs_stride: int, weight: int, token_weight: int, ignore_index: int, label_smoothing: float,
    logit_scale: float, softcap: float, z_loss: float,
) -> Problem:  # fmt: skip
    total = float(vocab)
    if weight != 0 and label_smoothing != 0:
        total = sum_weights(_zero_of(dtype), vocab, weight)
    return Problem(_zero_of(dtype), STORED[dtype], rows, vocab, logits, logits_stride, target,
                   probs, probs_stride, weight, token_weight, ignore_index, float(label_smoothing),
                   float(logit_scale), _softcap_of(dtype, softcap), float(z_loss),
                   total)  # fmt: skip


def _make_gradient(
    p: Problem, out: int, out_stride: int, grad: int, grad_stride: int, grad_scale: float,
    grad_lse: int = 0, grad_entropy: int = 0, entropy: int = 0,
) -> Gradient:  # fmt: skip
    bypass_cache = _nbytes(p) > LARGEST_CACHE and out != p.logits
    return Gradient(out, out_stride, bypass_cache, grad, grad_stride, float(grad_scale), grad_lse,
                    grad_entropy, entropy)  # fmt: skip


def _nbytes(p: Problem) -> int:
    return int(p.rows * p.vocab * p.stored.itemsize)


def _rows_per_chunk(p: Problem, threads: int) -> int:
    """How many rows a thread takes at a time: see nll.pyx."""
    row = p.vocab * p.stored.itemsize
    return max(1, min((4 << 20) // (row + 1), p.rows // (8 * threads)))


def _run(p: Problem, o: Output, g: Gradient, threads: int) -> float:
    chunk = _rows_per_chunk(p, threads)
    total: float = call_with_threads(threads, run_serial, run_parallel, p, o, g, chunk)
    return total


def total_weight(
    rows: int,
    vocab: int,
    target: int,
    probs: int,
    weight: int,
    token_weight: int,
    ignore_index: int,
    dtype: int,
) -> float:
    """The divisor of the mean: the sum over the counted rows of class weight times token_weight.

    Raises IndexError for the first target that is neither ignored nor in [0, vocab).
    """
    zero = _zero_of(dtype)
    if probs != 0:
        if vocab == 0:
            return nan  # as torch, whose rows are numbers / classes
        return float(rows) if token_weight == 0 else sum_weights(zero, rows, token_weight)
    weights = (weight, token_weight)
    total, row, t = sum_target_weights(zero, rows, vocab, target, *weights, ignore_index)
    if row >= 0:
        raise IndexError(f"target {t} at row {row} is out of range: expected 0 <= target < {vocab}")
    return total


@takes_layout
def forward(
    dtype: int, rows: int, vocab: int, logits: int, logits_stride: int, target: int, probs: int,
    probs_stride: int, weight: int, token_weight: int, ignore_index: int, label_smoothing: float,
    logit_scale: float, softcap: float, z_loss: float, loss: int, lse: int, lse_low: int,
    correct: int, entropy: int, argmax: int, threads: int,
) -> float:  # fmt: skip
    """Write each row's loss and statistics; return the sum of the losses."""
    p = _make_problem(
        dtype, rows, vocab, logits, logits_stride, target, probs, probs_stride, weight,
        token_weight, ignore_index, label_smoothing, logit_scale, softcap, z_loss,
    )  # fmt: skip
    o = Output(loss, lse, lse_low, correct, entropy, argmax)
    return _run(p, o, _make_gradient(p, 0, 0, 0, 0, 1.0), threads)


@takes_layout
def backward(
    dtype: int, rows: int, vocab: int, logits: int, logits_stride: int, target: int, probs: int,
    probs_stride: int, weight: int, token_weight: int, ignore_index: int, label_smoothing: float,
    logit_scale: float, softcap: float, z_loss: float, lse: int, lse_low: int, grad: int,
    grad_stride: int, grad_scale: float, grad_lse: int, grad_entropy: int, entropy: int, out: int,
    out_stride: int, threads: int,
) -> None:  # fmt: skip
    """Write the gradient of the logits for upstream `grad * grad_scale`, `grad_lse` and
    `grad_entropy` of the `entropy` that a forward wrote."""
    p = _make_problem(
        dtype, rows, vocab, logits, logits_stride, target, probs, probs_stride, weight,
        token_weight, ignore_index, label_smoothing, logit_scale, softcap, z_loss,
    )  # fmt: skip
    upstream = (grad, grad_stride, grad_scale, grad_lse, grad_entropy, entropy)
    g = _make_gradient(p, out, out_stride, *upstream)
    _run(p, Output(0, lse, lse_low, 0, 0, 0), g, threads)


@takes_layout
def forward_backward(
    dtype: int, rows: int, vocab: int, logits: int, logits_stride: int, target: int, probs: int,
    probs_stride: int, weight: int, token_weight: int, ignore_index: int, label_smoothing: float,
    logit_scale: float, softcap: float, z_loss: float, loss: int, lse: int, lse_low: int,
    correct: int, entropy: int, argmax: int, grad_scale: float, out: int, out_stride: int,
    threads: int,
) -> float:  # fmt: skip
    """forward, and while each row is in cache its gradient, for upstream `grad_scale`.

    `out` may be the address of the logits.
    """
    p = _make_problem(
        dtype, rows, vocab, logits, logits_stride, target, probs, probs_stride, weight,
        token_weight, ignore_index, label_smoothing, logit_scale, softcap, z_loss,
    )  # fmt: skip
    g = _make_gradient(p, out, out_stride, 0, 0, grad_scale)
    return _run(p, Output(loss, lse, lse_low, correct, entropy, argmax), g, threads)


@takes_layout
def loss_and_gradient(
    dtype: int, rows: int, vocab: int, logits: int, logits_stride: int, target: int, probs: int,
    probs_stride: int, weight: int, token_weight: int, ignore_index: int, label_smoothing: float,
    logit_scale: float, softcap: float, z_loss: float, of_rows: bytearray, correct: int,
    entropy: int, argmax: int, mean: bool, num_items: float | None, upstream: float, loss: int,
    out: int, out_stride: int, threads: int,
) -> float:  # fmt: skip
    """total_weight and forward_backward of a loss that is one number, which is written to `loss`.

    Return the divisor of its mean. The gradient is that of upstream / divisor. `of_rows` has room
    for the rows' lse, lse_low and losses, in this order.
    """
    weights = total_weight(rows, vocab, target, probs, weight, token_weight, ignore_index, dtype)
    real = type(_zero_of(dtype))
    lse = np.frombuffer(of_rows, np.uint8).ctypes.data
    size = rows * real().itemsize
    with np.errstate(all="ignore"):
        divisor = np.float64(real(weights) if num_items is None else num_items) + 0.0  # not -0
        total = np.float64(forward_backward(
            dtype, rows, vocab, logits, logits_stride, target, probs, probs_stride, weight,
            token_weight, ignore_index, label_smoothing, logit_scale, softcap, z_loss,
            lse + 2 * size, lse, lse + size, correct, entropy, argmax,
            upstream * (1 / divisor) if mean else upstream, out, out_stride, threads,
        ))  # fmt: skip
        value = real(total / divisor if mean else total)
    ctypes.memmove(loss, value.tobytes(), value.itemsize)
    return float(divisor)
