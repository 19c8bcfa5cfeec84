"""pairs: the Numba version of pairs.pyx, with the same functions and arguments.

Read pairs.pyx first: its formulas and notes hold here. Those of nll.py on types hold too, and those
of threads.py. A cell is as large as in pairs.pyx, so that columns are summed in the same groups of
rows.
"""

from __future__ import annotations

from math import exp, expm1, inf
from typing import NamedTuple

import numpy as np
from numba import njit, prange

from neglog.kernels.numba.block import (  # isort: skip
    Lse, block_fill, block_softmax, block_sum, log_probability, narrow_block, update,
)  # fmt: skip
from neglog.kernels.numba.block_pairs import (  # isort: skip
    block_exp_sum_of_columns, block_exp_sum_of_row_and_columns, block_finite_shift,
    block_flush_sums, block_maximum_of_columns, block_pair_gradient, block_pair_gradient_bounded,
    block_softplus, softplus,
)  # fmt: skip
from neglog.kernels.numba.exp import exp_nonpositive  # isort: skip
from neglog.kernels.numba.intrinsics import (  # isort: skip
    EXACT, PARALLEL, SERIAL, Pointer, Real, block_buffer, cast, fetch_add, pointer,
)  # fmt: skip
from neglog.kernels.numba.threads import call_with_threads  # isort: skip
from neglog.kernels.numba.tile import (  # isort: skip
    FLOAT64, INT64, Span, Tile, block_span, index_in_block, load_real, pair_scores,
    stored_as_real,
)  # fmt: skip

CELL_ROWS, CELL_COLUMNS = 64, 1024
ROWS_PER_CHUNK = 8
ROWS_PER_FLUSH = 8
STATES_PER_CHUNK = 256
DOUBLE = np.float64(0)


class States(NamedTuple):
    maximum: int  # not used if bounded
    sum: int


class Cells(NamedTuple):
    """The states of each cell: those of its rows by column block, of its columns by row block."""

    row_blocks: int
    column_blocks: int
    row_maximum: int
    row_sum: int
    column_maximum: int
    column_sum: int


class Marginal(NamedTuple):
    """One margin of the tile, its rows or its columns: log-sum-exps and their gradients."""

    lse: int
    lse_low: int
    grad: int  # of the lse, by whatever uses it
    grad_loss: int  # by row: the part of grad by the loss lse - positive_score


class BackwardArrays(NamedTuple):
    grad_positive_score: int  # by row: of the positive's score, without the losses' part
    out: int
    out_stride: int
    factors: int  # of the columns, as scaled_exp_of returns them
    shifts: int


class Gradient(NamedTuple):
    """Made by each thread: a tuple in a tuple does not pass through prange."""

    row: Marginal
    column: Marginal
    arrays: BackwardArrays


class Sigmoid(NamedTuple):
    grad_scale: float
    loss: int
    grad_sum: int
    out: int
    out_stride: int


# Forward


@njit(**EXACT)
def flush_if_due(row: int, row_span: Span, n: int, partial: Pointer, total: Pointer) -> None:
    """Flush the partial sums of n columns after every 8th row of a cell, and after its last."""
    done = row - row_span.start + 1
    if done % ROWS_PER_FLUSH == 0 or done == row_span.n:
        block_flush_sums(partial, n, total)


@njit(**EXACT)
def cell_rows(
    t: Tile, c: Cells, row_span: Span, span: Span, row_offset: int, maximum: Pointer,
    partial: Pointer, column_sum: Pointer, positive_score: int,
) -> None:  # fmt: skip
    """The states of a cell's rows, and its columns' sums if bounded, else their maxima."""
    z = block_buffer(t.zero)
    row_maximum, row_sum = pointer(c.row_maximum, DOUBLE), pointer(c.row_sum, DOUBLE)
    for row in range(row_span.start, row_span.start + row_span.n):
        score = pair_scores(t, row, span, z)
        if positive_score != 0 and index_in_block(t.positive, t, row, span) >= 0:
            pointer(positive_score, t.zero)[row] = score
        if t.bounded:
            row_sum[row_offset + row] = block_exp_sum_of_row_and_columns(z, span.n, partial)
            flush_if_due(row, row_span, span.n, partial, column_sum)
        else:
            state = update((cast(-inf, t.zero), 0.0), z, span.n, 0)
            row_maximum[row_offset + row], row_sum[row_offset + row] = state
            block_maximum_of_columns(z, span.n, maximum)


@njit(**EXACT)
def cell_columns(
    t: Tile, c: Cells, row_span: Span, span: Span, column_offset: int, maximum: Pointer,
    partial: Pointer, column_sum: Pointer,
) -> None:  # fmt: skip
    """The columns' sums of a cell, given their maxima."""
    z = block_buffer(t.zero)
    column_maximum = pointer(c.column_maximum, DOUBLE)
    for j in range(span.n):
        column_maximum[column_offset + j] = maximum[j]
    block_finite_shift(maximum, span.n)
    for row in range(row_span.start, row_span.start + row_span.n):
        pair_scores(t, row, span, z)
        block_exp_sum_of_columns(z, span.n, maximum, partial)
        flush_if_due(row, row_span, span.n, partial, column_sum)


@njit(**EXACT)
def cell_forward(
    t: Tile, c: Cells, row_block: int, column_block: int, with_columns: bool, positive_score: int
) -> None:
    maximum, partial = block_buffer(t.zero), block_buffer(t.zero)
    row_span = block_span(row_block, CELL_ROWS, t.rows)
    span = block_span(column_block, CELL_COLUMNS, t.columns)
    row_offset = column_block * t.rows
    column_offset = row_block * t.columns + span.start
    column_sum = pointer(c.column_sum + column_offset * 8, DOUBLE)
    block_fill(maximum, span.n, cast(-inf, t.zero))
    block_fill(partial, span.n, t.zero)
    block_fill(column_sum, span.n, 0.0)
    cell_rows(t, c, row_span, span, row_offset, maximum, partial, column_sum, positive_score)
    if with_columns and not t.bounded:
        cell_columns(t, c, row_span, span, column_offset, maximum, partial, column_sum)


@njit(**EXACT)
def merge_cell(
    maximum: Real, total: float, cell_maximum: Real, cell_sum: float
) -> tuple[Real, float]:
    """The state (maximum, total) with one cell's (cell_maximum, cell_sum) added."""
    larger = cell_maximum if cell_maximum > maximum else maximum
    shift = cast(0, maximum) if larger == -inf else larger
    kept = total * exp_nonpositive(maximum - shift)
    return larger, kept + cell_sum * exp_nonpositive(cell_maximum - shift)


@njit(**EXACT)
def merge_cells(
    t: Tile, s: States, index: int, maximum: int, total: int, blocks: int, stride: int
) -> None:
    """Add to the state of one row or column what its cells found."""
    found = pointer(total, DOUBLE)
    state_sum = pointer(s.sum, DOUBLE)
    if t.bounded:
        for block in range(blocks):
            state_sum[index] += found[block * stride + index]
        return
    state = load_real(t, s.maximum, index), state_sum[index]
    for block in range(blocks):
        at = block * stride + index
        cell_maximum = cast(pointer(maximum, DOUBLE)[at], t.zero)
        state = merge_cell(state[0], state[1], cell_maximum, found[at])
    pointer(s.maximum, t.zero)[index], state_sum[index] = state


@njit(**EXACT)
def forward_cells(t: Tile, c: Cells, columns: States, positive_score: int, counter: int) -> None:
    """What each thread does first: take cells until none are left."""
    while True:
        cell = fetch_add(pointer(counter, INT64), 1)
        if cell >= c.row_blocks * c.column_blocks:
            return
        row_block, column_block = cell // c.column_blocks, cell % c.column_blocks
        cell_forward(t, c, row_block, column_block, columns.sum != 0, positive_score)


@njit(**EXACT)
def merge_states(t: Tile, c: Cells, rows: States, columns: States, counter: int) -> None:
    """What each thread does then: take rows, then columns, until none are left."""
    states = t.rows + (t.columns if columns.sum != 0 else 0)
    while True:
        start = fetch_add(pointer(counter, INT64), STATES_PER_CHUNK)
        if start >= states:
            return
        for index in range(start, min(start + STATES_PER_CHUNK, states)):
            if index < t.rows:
                merge_cells(t, rows, index, c.row_maximum, c.row_sum, c.column_blocks, t.rows)
            else:
                merge_cells(t, columns, index - t.rows, c.column_maximum, c.column_sum,
                          c.row_blocks, t.columns)  # fmt: skip


@njit(**SERIAL)
def forward_serial(t: Tile, c: Cells, columns: States, positive_score: int, counter: int) -> None:
    forward_cells(t, c, columns, positive_score, counter)


@njit(**PARALLEL)
def forward_parallel(
    t: Tile, c: Cells, columns: States, positive_score: int, counter: int, workers: int
) -> None:
    for _ in prange(workers):
        forward_cells(t, c, columns, positive_score, counter)


@njit(**SERIAL)
def merge_serial(t: Tile, c: Cells, rows: States, columns: States, counter: int) -> None:
    merge_states(t, c, rows, columns, counter)


@njit(**PARALLEL)
def merge_parallel(
    t: Tile, c: Cells, rows: States, columns: States, counter: int, workers: int
) -> None:
    for _ in prange(workers):
        merge_states(t, c, rows, columns, counter)


# Backward


@njit(**EXACT)
def column_blocks(t: Tile) -> int:
    return -(-t.columns // CELL_COLUMNS)


@njit(**EXACT)
def scaled_exp_of(t: Tile, m: Marginal, index: int) -> tuple[float, float]:
    """A row or a column adds factor * e^(z - shift) to the gradient: its factor and its shift."""
    high, low = float(load_real(t, m.lse, index)), float(load_real(t, m.lse_low, index))
    grad = float(load_real(t, m.grad, index))
    if high == -inf:  # every pair is excluded: z - lse would be -inf - -inf = NaN
        return 0.0, 0.0 if t.bounded else inf
    if t.bounded:
        return grad * exp(-high - low), 0.0
    return grad * exp(-low), high


@njit(**EXACT)
def positive_gradient(t: Tile, m: Marginal, index: int, row: int, z: Real) -> float:
    """What one log-sum-exp adds to the gradient of the positive's score z, as in pairs.pyx."""
    lse = Lse(load_real(t, m.lse, index), load_real(t, m.lse_low, index))
    log_p = cast(-inf, t.zero) if lse.high == -inf else log_probability(z, lse)
    target_weight = 0.0 if m.grad_loss == 0 else float(load_real(t, m.grad_loss, row))
    softmax_weight = float(load_real(t, m.grad, index)) - target_weight
    return softmax_weight * exp_nonpositive(log_p) + target_weight * expm1(float(log_p))


@njit(**EXACT)
def block_backward(
    t: Tile, g: Gradient, row: int, span: Span, factor: Real, shift: Real, z: Pointer, out: Pointer
) -> None:
    """Write the gradient of a block of scores, which are written to z."""
    pair_scores(t, row, span, z)
    offset = span.start * (8 if t.dtype == FLOAT64 else 4)
    factors = pointer(g.arrays.factors + offset, t.zero)
    shifts = pointer(g.arrays.shifts + offset, t.zero)
    if t.bounded:
        block_pair_gradient_bounded(z, span.n, factor, factors, out)
    elif g.column.lse == 0:
        block_softmax(z, span.n, Lse(shift, t.zero), factor, out)
    else:
        block_pair_gradient(z, span.n, factor, shift, factors, shifts, out)
    j = index_in_block(t.positive, t, row, span)
    if j >= 0:
        value = positive_gradient(t, g.row, row, row, z[j])
        if g.column.lse != 0:
            value += positive_gradient(t, g.column, span.start + j, row, z[j])
        if g.arrays.grad_positive_score != 0:
            value += load_real(t, g.arrays.grad_positive_score, row)
        out[j] = cast(value, t.zero)


@njit(**EXACT)
def row_backward(t: Tile, g: Gradient, row: int) -> None:
    z, grad_buffer = block_buffer(t.zero), block_buffer(t.zero)
    factor, shift = scaled_exp_of(t, g.row, row)
    for block in range(column_blocks(t)):
        span = block_span(block, CELL_COLUMNS, t.columns)
        out = g.arrays.out + (row * g.arrays.out_stride + span.start) * t.itemsize
        destination = pointer(out, t.zero) if stored_as_real(t) else grad_buffer
        block_backward(t, g, row, span, cast(factor, t.zero), cast(shift, t.zero), z, destination)
        if not stored_as_real(t):
            narrow_block(grad_buffer, t.dtype, span.n, out)


@njit(**EXACT)
def column_factors(t: Tile, m: Marginal, arrays: BackwardArrays) -> None:
    """Write the factors and the shifts of the columns."""
    factors, shifts = pointer(arrays.factors, t.zero), pointer(arrays.shifts, t.zero)
    for index in range(t.columns):
        factor, shift = scaled_exp_of(t, m, index) if m.lse != 0 else (0.0, 0.0)
        factors[index], shifts[index] = cast(factor, t.zero), cast(shift, t.zero)


@njit(**EXACT)
def backward_rows(
    t: Tile, row: Marginal, column: Marginal, arrays: BackwardArrays, counter: int
) -> None:
    """What each thread does: take rows until none are left."""
    g = Gradient(row, column, arrays)
    while True:
        start = fetch_add(pointer(counter, INT64), ROWS_PER_CHUNK)
        if start >= t.rows:
            return
        for index in range(start, min(start + ROWS_PER_CHUNK, t.rows)):
            row_backward(t, g, index)


@njit(**SERIAL)
def backward_serial(
    t: Tile, row: Marginal, column: Marginal, arrays: BackwardArrays, counter: int
) -> None:
    column_factors(t, column, arrays)
    backward_rows(t, row, column, arrays, counter)


@njit(**PARALLEL)
def backward_parallel(
    t: Tile, row: Marginal, column: Marginal, arrays: BackwardArrays, counter: int, workers: int
) -> None:
    column_factors(t, column, arrays)
    for _ in prange(workers):
        backward_rows(t, row, column, arrays, counter)


# The loss by sigmoids


@njit(**EXACT)
def block_sigmoid(t: Tile, row: int, span: Span, grad_scale: Real, out: Pointer) -> float:
    """softplus(-z) of the positive and softplus(z) of the others, and their derivatives."""
    z = block_buffer(t.zero)
    positive_score = pair_scores(t, row, span, z)
    j = index_in_block(t.positive, t, row, span)
    if j >= 0:
        z[j] = cast(-inf, t.zero)  # softplus(-inf) = 0
    loss = block_softplus(z, span.n, grad_scale, out)
    if j >= 0:
        value, derivative = softplus(-positive_score)
        loss += value
        out[j] = -grad_scale * derivative
    return loss


@njit(**EXACT)
def row_sigmoid(t: Tile, s: Sigmoid, row: int) -> None:
    grad_buffer = block_buffer(t.zero)
    grad_scale = cast(s.grad_scale, t.zero)
    for block in range(column_blocks(t)):
        span = block_span(block, CELL_COLUMNS, t.columns)
        out = s.out + (row * s.out_stride + span.start) * t.itemsize
        destination = pointer(out, t.zero) if stored_as_real(t) else grad_buffer
        pointer(s.loss, DOUBLE)[row] += block_sigmoid(t, row, span, grad_scale, destination)
        pointer(s.grad_sum, DOUBLE)[row] += block_sum(destination, span.n)
        if not stored_as_real(t):
            narrow_block(grad_buffer, t.dtype, span.n, out)


@njit(**EXACT)
def sigmoid_rows(t: Tile, s: Sigmoid, counter: int) -> None:
    while True:
        start = fetch_add(pointer(counter, INT64), ROWS_PER_CHUNK)
        if start >= t.rows:
            return
        for row in range(start, min(start + ROWS_PER_CHUNK, t.rows)):
            row_sigmoid(t, s, row)


@njit(**SERIAL)
def sigmoid_serial(t: Tile, s: Sigmoid, counter: int) -> None:
    sigmoid_rows(t, s, counter)


@njit(**PARALLEL)
def sigmoid_parallel(t: Tile, s: Sigmoid, counter: int, workers: int) -> None:
    for _ in prange(workers):
        sigmoid_rows(t, s, counter)


# From Python


def _make_tile(tile: tuple) -> Tile:
    # int() and bool(), because for another type Numba would compile everything again.
    dtype, *rest, bounded = tile
    zero = np.float64(0) if dtype == FLOAT64 else np.float32(0)
    itemsize = (4, 8, 2, 2)[dtype]
    return Tile._make([zero, itemsize, int(dtype), *map(int, rest), bool(bounded)])


def forward(
    tile: tuple, row_maximum: int, row_sum: int, column_maximum: int, column_sum: int,
    positive_score: int, threads: int,
) -> None:  # fmt: skip
    """Merge a tile into the states of its rows and, unless column_sum is 0, of its columns.

    tile: (dtype, rows, columns, first_column, similarity, stride, scale, scale_stride, bias,
    bias_stride, positive, excluded, row_group, column_group, bounded).
    The sums are doubles. The maxima, 0 if bounded, and the positives' scores are of the type that
    is computed in.
    """
    t = _make_tile(tile)
    row_blocks, column_blocks = -(-t.rows // CELL_ROWS), -(-t.columns // CELL_COLUMNS)
    of_rows = np.empty((2, column_blocks * t.rows))
    of_columns = np.empty((2, row_blocks * t.columns))
    found = [part.ctypes.data for part in (*of_rows, *of_columns)]
    c = Cells(row_blocks, column_blocks, *found)
    rows, columns = States(row_maximum, row_sum), States(column_maximum, column_sum)
    # Two functions: Numba merges two parallel loops of one function into one, without a barrier
    # between them, and states were merged before their cells were computed.
    call_with_threads(threads, forward_serial, forward_parallel, t, c, columns, positive_score)
    call_with_threads(threads, merge_serial, merge_parallel, t, c, rows, columns)


def backward(
    tile: tuple, row: tuple, column: tuple, grad_positive_score: int, out: int, out_stride: int,
    threads: int,
) -> None:  # fmt: skip
    """Write the gradient of a tile's scores; `out` may be the address of its similarities.

    row, column: (lse, lse_low, grad, grad_loss), as in Marginal; column is all 0 where columns do
    not count.
    grad_positive_score: by row, or 0.
    """
    t = _make_tile(tile)
    factors, shifts = np.empty((2, t.columns), t.zero.dtype)
    arrays = BackwardArrays(
        grad_positive_score, out, out_stride, factors.ctypes.data, shifts.ctypes.data
    )
    call_with_threads(
        threads, backward_serial, backward_parallel, t, Marginal(*row), Marginal(*column), arrays
    )


def sigmoid(
    tile: tuple, grad_scale: float, loss: int, grad_sum: int, out: int, out_stride: int,
    threads: int,
) -> None:  # fmt: skip
    """Add each row's loss and the sum of its gradient to doubles; write the gradient.

    The gradient is that of grad_scale times the loss; `out` as in backward.
    """
    s = Sigmoid(float(grad_scale), loss, grad_sum, out, out_stride)
    call_with_threads(threads, sigmoid_serial, sigmoid_parallel, _make_tile(tile), s)
