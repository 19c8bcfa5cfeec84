"""kl: the Numba version of kl.pyx, with the same function and arguments.

Read kl.pyx first: its notes hold here, and those of nll.py. What is compiled is one function for
each type that is computed in: that in memory is asked for at run time. The classes that a teacher
names are checked and sorted by NumPy before it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from neglog.kernels.numba.intrinsics import (  # isort: skip
    EXACT, PARALLEL, SERIAL, Pointer, fetch_add, finish_streams, itemsize, pointer,
)  # fmt: skip
from neglog.kernels.numba.kl_problem import Gradient, Output, Problem  # isort: skip
from neglog.kernels.numba.kl_row import (  # isort: skip
    FLOAT64, INT64, row_backward, row_forward,
)  # fmt: skip
from neglog.kernels.numba.positions import array_at  # isort: skip
from neglog.kernels.numba.threads import call_with_threads  # isort: skip

LARGEST_CACHE = 64 << 20  # bytes
LARGEST_MASS = 1.05  # as in kl_row.hpp
BFLOAT16 = 2
# Of the kernels' dtypes: NumPy has no bfloat16.
_TYPES = (np.float32, np.float64, np.uint16, np.float16)


class _Named(NamedTuple):
    """column (N, K) and bins (N, K + 1) of Problem, and the rows whose classes are none."""

    column: NDArray[np.int64]
    bins: NDArray[Any]
    invalid: NDArray[np.bool_]


@njit(**EXACT)
def process_rows(
    p: Problem, o: Output, g: Gradient, scratch: Pointer, chunk: int, counter: int
) -> None:
    """What each thread does: take rows until none are left."""
    while True:
        start = fetch_add(pointer(counter, INT64), chunk)
        if start >= p.rows:
            break
        for row in range(start, min(start + chunk, p.rows)):
            sums, of_row = row_forward(p, o, row, scratch)
            if g.out != 0:
                row_backward(p, g, row, sums, of_row, scratch)
    finish_streams()


@njit(**EXACT)
def sum_rows(p: Problem, o: Output) -> float:
    total = 0.0
    for row in range(p.rows if o.loss != 0 else 0):
        total += pointer(o.loss, p.zero)[row]
    return total


@njit(**EXACT)
def scratch_of(p: Problem, scratch: int, worker: int) -> Pointer:
    return pointer(scratch + worker * 2 * (p.named + 1) * itemsize(p.zero), p.zero)


@njit(**SERIAL)
def run_serial(p: Problem, o: Output, g: Gradient, scratch: int, chunk: int, counter: int) -> float:
    process_rows(p, o, g, scratch_of(p, scratch, 0), chunk, counter)
    return sum_rows(p, o)


@njit(**PARALLEL)
def run_parallel(
    p: Problem, o: Output, g: Gradient, scratch: int, chunk: int, counter: int, workers: int
) -> float:
    for worker in prange(workers):
        process_rows(p, o, g, scratch_of(p, scratch, worker), chunk, counter)
    return sum_rows(p, o)


# From Python


def _softcap_of(real: Any, softcap: float) -> float:
    """0 for none: as in nll.pyx."""
    limits = np.finfo(real)
    if softcap == 0 or softcap > float(limits.max):
        return 0.0
    return max(float(softcap), float(limits.tiny))


def _named(ids: NDArray[np.int64], logs: NDArray[Any], vocab: int) -> _Named:
    """Each row's classes in ascending order. One of probability 0 is left to the others."""
    named = logs > -np.inf
    named |= np.isnan(logs)
    columns = np.where(named, ids, vocab)
    order = np.argsort(columns, axis=1, kind="stable")
    columns = np.take_along_axis(columns, order, 1)
    sorted_logs = np.take_along_axis(np.where(named, logs, -np.inf), order, 1)
    # Above 1 they are refused, by whatever number.
    mass = np.exp(np.minimum(sorted_logs.astype(np.float64), 1)).sum(1)
    twice = (columns[:, 1:] == columns[:, :-1]) & (columns[:, 1:] != vocab)
    outside = named & ((ids < 0) | (ids >= vocab))
    invalid = outside.any(1) | twice.any(1) | (mass > LARGEST_MASS)
    rest = np.log(np.maximum(1 - mass, 0.0))
    rest = np.where(named.sum(1) < vocab, rest, -np.inf)  # else what is left is rounding
    bins = np.concatenate([sorted_logs, rest[:, None].astype(logs.dtype)], 1)
    return _Named(np.ascontiguousarray(columns), np.ascontiguousarray(bins), invalid)


def _as_real(stored: NDArray[Any], dtype: int, real: Any) -> NDArray[Any]:
    if dtype == BFLOAT16:
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(real)


def _rows_per_chunk(p: Problem, itemsize: int, threads: int) -> int:
    """As in nll.pyx."""
    return max(1, min((4 << 20) // (p.vocab * itemsize + 1), p.rows // (8 * threads)))


def rows(
    dtype: int, rows: int, vocab: int, logits: int, logits_stride: int, teacher_dtype: int,
    teacher: int, teacher_stride: int, probabilities: bool, ids: int, count: int, target: int,
    token_weight: int, ignore_index: int, beta: float, temperature: float, soft_weight: float,
    hard_weight: float, logit_scale: float, softcap: float, teacher_scale: float,
    teacher_softcap: float, loss: int, divergence: int, cross_entropy: int, grad: int,
    grad_stride: int, grad_scale: float, out: int, out_stride: int, threads: int,
) -> tuple[float, int]:  # fmt: skip
    """Write each row's loss, divergence and cross-entropy, and with `out` the gradient of the
    logits for the upstream `grad * grad_scale`; without `grad`, `grad_scale`. `out` may be the
    address of the logits.

    Return the sum of the losses, and a row whose ids or log-probabilities are none, or -1. That row
    has a loss and a gradient of 0.
    """
    real: Any = np.float64 if dtype == FLOAT64 else np.float32
    size = np.dtype(_TYPES[dtype]).itemsize
    column: NDArray[Any] = np.empty(0)
    bins, invalid = column, -1
    if ids != 0:
        labels = array_at(target, np.dtype(np.int64), (rows,), (1,))
        counted = labels != ignore_index
        if token_weight != 0:
            counted &= array_at(token_weight, np.dtype(real), (rows,), (1,)) != 0
        of_ids = array_at(ids, np.dtype(np.int64), (rows, count), (count, 1))
        kind = np.dtype(_TYPES[teacher_dtype])
        stored = array_at(teacher, kind, (rows, count), (teacher_stride, 1))
        with np.errstate(all="ignore"):  # what is too large is inf, and the log of 0 -inf
            logs = _as_real(stored, teacher_dtype, real)
            column, bins, of_rows = _named(of_ids, logs, vocab)
        of_rows &= counted
        if of_rows.any():
            invalid = int(of_rows.argmax())
            labels = np.where(of_rows, ignore_index, labels)
            target = labels.ctypes.data
    named = count if ids != 0 else -1
    p = Problem(
        real(0), dtype, teacher_dtype, rows, vocab, logits, logits_stride, teacher, teacher_stride,
        bool(probabilities), column.ctypes.data, bins.ctypes.data, named, target, token_weight,
        ignore_index, float(beta), float(temperature), float(soft_weight),
        float(hard_weight), float(logit_scale), _softcap_of(real, softcap), float(teacher_scale),
        _softcap_of(real, teacher_softcap),
    )  # fmt: skip
    bypass_cache = rows * vocab * size > LARGEST_CACHE and out != logits
    g = Gradient(out, out_stride, bypass_cache, grad, grad_stride, float(grad_scale))
    scratch = np.empty(max(1, threads) * 2 * (p.named + 1), real)
    given = (p, Output(loss, divergence, cross_entropy), g, scratch.ctypes.data)
    chunk = _rows_per_chunk(p, size, threads)
    total: float = call_with_threads(threads, run_serial, run_parallel, *given, chunk)
    return total, invalid
