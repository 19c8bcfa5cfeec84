"""The Numba twin of pairs.pyx: same functions, same signatures, same cells.

(a) Read pairs.pyx first; its notes hold here, and those of numba/nll.py on types and threads.
(b) A cell is as large as there, so that columns are summed in the same groups of 64 rows.
(c) int() and bool() on what a tile is made of: another type would compile everything anew.
"""

# mypy: ignore-errors

from math import exp, expm1, inf
from typing import NamedTuple

import numba
import numpy as np
from numba import njit, prange

from neglog.kernels.numba.block import (  # isort: skip
    EXACT, UINT16, Lse, absorb, block_affine, block_buffer, block_softmax, block_sum,
    exp_nonpositive, log_probability, narrow, pointer, real, take, widen,
)  # fmt: skip
from neglog.kernels.numba.block_pairs import (  # isort: skip
    block_exclude, block_exp_sum_both, block_exp_sum_of_columns, block_fill, block_finite_shift,
    block_maximum_of_columns, block_pair_gradient, block_pair_gradient_bounded, block_pair_scores,
    block_pour, block_softplus, softplus,
)  # fmt: skip

FLOAT64 = 1
CELL_ROWS, CELL_COLUMNS = 64, 1024
ROWS_AT_ONCE = 8
ROWS_IN_REAL = 8
STATES_AT_ONCE = 256
INT64, DOUBLE = np.int64(0), np.float64(0)


class Tile(NamedTuple):
    zero: float  # a number of the accum dtype
    itemsize: int
    dtype: int
    rows: int
    columns: int
    first_column: int
    similarity: int
    stride: int
    scale: int
    scale_stride: int
    bias: int
    bias_stride: int
    positive: int  # column of each row, counted from the first tile's first
    excluded: int
    row_group: int
    column_group: int
    bounded: bool


class Span(NamedTuple):
    start: int
    n: int


class States(NamedTuple):
    maximum: int  # not used if bounded
    sum: int


class Cells(NamedTuple):
    """What each cell found: of its rows by column block, of its columns by row block."""

    row_blocks: int
    column_blocks: int
    row_maximum: int
    row_sum: int
    column_maximum: int
    column_sum: int


class Marginal(NamedTuple):
    """The gradient that flows in by the log-sum-exps of the rows, or of the columns."""

    lse: int
    lse_low: int
    grad: int  # of all that holds the lse
    hard: int  # by row: the part of it that holds lse - score of the positive


class Places(NamedTuple):
    positive: int  # by row: gradient of the positive's score itself
    out: int
    out_stride: int
    factors: int  # of the columns
    shifts: int


class Gradient(NamedTuple):
    """Put together by each thread: a tuple in a tuple does not pass through prange."""

    row: Marginal
    column: Marginal
    at: Places


class Sigmoid(NamedTuple):
    grad_scale: float
    loss: int
    grad: int
    out: int
    out_stride: int


# Reading


@njit(**EXACT)
def is_real(t):
    return t.dtype <= FLOAT64


@njit(**EXACT)
def number(t, address, index):
    """One of the accum dtype's numbers at an address."""
    return pointer(address, t.zero)[index]


@njit(**EXACT)
def cut(block, size, whole):
    return Span(block * size, min(size, whole - block * size))


@njit(**EXACT)
def blocks_of(t):
    return -(-t.columns // CELL_COLUMNS)


@njit(**EXACT)
def place(columns, t, row, at):
    """Where in the block the column is that a row names, or -1."""
    if columns == 0:
        return -1
    j = pointer(columns, INT64)[row] - t.first_column - at.start
    return j if 0 <= j < at.n else -1


@njit(**EXACT)
def affine_scores(t, row, at, z):
    """Similarity times scale plus bias."""
    source = t.similarity + (row * t.stride + at.start) * t.itemsize
    scale = number(t, t.scale, row * t.scale_stride)
    bias = 0
    if t.bias != 0 and t.bias_stride == 1:
        bias = t.bias + at.start * (8 if t.dtype == FLOAT64 else 4)
    x = block_buffer(t.zero)
    if is_real(t):
        x = pointer(source, t.zero)
    else:
        widen(pointer(source, UINT16), t.dtype, at.n, x)
    block_pair_scores(x, at.n, scale, bias, z)
    if t.bias != 0 and t.bias_stride == 0:
        block_affine(z, at.n, real(1, t.zero), number(t, t.bias, 0))


@njit(**EXACT)
def pair_scores(t, row, at, z):
    """Fill z with the block's scores; return the positive's before any exclusion, if it is here."""
    affine_scores(t, row, at, z)
    positive = place(t.positive, t, row, at)
    score = z[positive] if positive >= 0 else t.zero
    if t.row_group != 0:
        groups = pointer(t.column_group + at.start * 8, INT64)
        block_exclude(z, at.n, pointer(t.row_group, INT64)[row], groups)
        if positive >= 0:
            z[positive] = score
    j = place(t.excluded, t, row, at)
    if j >= 0:
        z[j] = real(-inf, t.zero)
    return score


# Forward


@njit(**EXACT)
def pour(row, down, at, total, to):
    """After every 8th row of a cell and its last."""
    done = row - down.start + 1
    if done % ROWS_IN_REAL == 0 or done == down.n:
        block_pour(total, at.n, to)


@njit(**EXACT)
def cell_rows(t, c, down, at, in_rows, maximum, total, column_sum, positive):
    """The rows of a cell, and its columns' sums if bounded, else their maxima."""
    z = block_buffer(t.zero)
    row_maximum, row_sum = pointer(c.row_maximum, DOUBLE), pointer(c.row_sum, DOUBLE)
    for row in range(down.start, down.start + down.n):
        score = pair_scores(t, row, at, z)
        if positive != 0 and place(t.positive, t, row, at) >= 0:
            pointer(positive, t.zero)[row] = score
        if t.bounded:
            row_sum[in_rows + row] = block_exp_sum_both(z, at.n, total)
            pour(row, down, at, total, column_sum)
        else:
            state = absorb((real(-inf, t.zero), 0.0), z, at.n)
            row_maximum[in_rows + row], row_sum[in_rows + row] = state
            block_maximum_of_columns(z, at.n, maximum)


@njit(**EXACT)
def cell_columns(t, c, down, at, in_columns, maximum, total, column_sum):
    """The columns' sums of a cell, given their maxima."""
    z = block_buffer(t.zero)
    column_maximum = pointer(c.column_maximum, DOUBLE)
    for j in range(at.n):
        column_maximum[in_columns + j] = maximum[j]
    block_finite_shift(maximum, at.n)
    for row in range(down.start, down.start + down.n):
        pair_scores(t, row, at, z)
        block_exp_sum_of_columns(z, at.n, maximum, total)
        pour(row, down, at, total, column_sum)


@njit(**EXACT)
def cell_forward(t, c, row_block, column_block, columns, positive):
    maximum, total = block_buffer(t.zero), block_buffer(t.zero)
    down = cut(row_block, CELL_ROWS, t.rows)
    at = cut(column_block, CELL_COLUMNS, t.columns)
    in_columns = row_block * t.columns + at.start
    column_sum = pointer(c.column_sum + in_columns * 8, DOUBLE)
    block_fill(maximum, at.n, real(-inf, t.zero))
    block_fill(total, at.n, t.zero)
    block_fill(column_sum, at.n, 0.0)
    cell_rows(t, c, down, at, column_block * t.rows, maximum, total, column_sum, positive)
    if columns and not t.bounded:
        cell_columns(t, c, down, at, in_columns, maximum, total, column_sum)


@njit(**EXACT)
def merged(maximum, total, of_cell, sum_of_cell):
    larger = of_cell if of_cell > maximum else maximum
    shift = real(0, maximum) if larger == -inf else larger
    kept = total * exp_nonpositive(maximum - shift)
    return larger, kept + sum_of_cell * exp_nonpositive(of_cell - shift)


@njit(**EXACT)
def merge_all(t, s, index, maximum, total, blocks, stride):
    """Into the state of one row or column, what its cells found."""
    found = pointer(total, DOUBLE)
    state_sum = pointer(s.sum, DOUBLE)
    if t.bounded:
        for block in range(blocks):
            state_sum[index] += found[block * stride + index]
        return
    state = number(t, s.maximum, index), state_sum[index]
    for block in range(blocks):
        at = block * stride + index
        of_cell = real(pointer(maximum, DOUBLE)[at], t.zero)
        state = merged(state[0], state[1], of_cell, found[at])
    pointer(s.maximum, t.zero)[index], state_sum[index] = state


@njit(**EXACT)
def find_cells(t, c, columns, positive, counter):
    while True:
        cell = take(pointer(counter, INT64), 1)
        if cell >= c.row_blocks * c.column_blocks:
            return
        row_block, column_block = cell // c.column_blocks, cell % c.column_blocks
        cell_forward(t, c, row_block, column_block, columns.sum != 0, positive)


@njit(**EXACT)
def merge_cells(t, c, rows, columns, counter):
    """Every row's state, then every column's."""
    states = t.rows + (t.columns if columns.sum != 0 else 0)
    while True:
        start = take(pointer(counter, INT64), STATES_AT_ONCE)
        if start >= states:
            return
        for index in range(start, min(start + STATES_AT_ONCE, states)):
            if index < t.rows:
                merge_all(t, rows, index, c.row_maximum, c.row_sum, c.column_blocks, t.rows)
            else:
                merge_all(t, columns, index - t.rows, c.column_maximum, c.column_sum,
                          c.row_blocks, t.columns)  # fmt: skip


@njit(nogil=True, cache=True, **EXACT)
def find_serial(t, c, columns, positive, counter, workers):
    find_cells(t, c, columns, positive, counter)


@njit(parallel=True, cache=True, **EXACT)
def find_parallel(t, c, columns, positive, counter, workers):
    for _ in prange(workers):
        find_cells(t, c, columns, positive, counter)


@njit(nogil=True, cache=True, **EXACT)
def merge_serial(t, c, rows, columns, counter, workers):
    merge_cells(t, c, rows, columns, counter)


@njit(parallel=True, cache=True, **EXACT)
def merge_parallel(t, c, rows, columns, counter, workers):
    for _ in prange(workers):
        merge_cells(t, c, rows, columns, counter)


# Backward


@njit(**EXACT)
def factor_of(t, m, index):
    """What a row or a column multiplies its exps by, and what it takes from the scores first."""
    high, low = float(number(t, m.lse, index)), float(number(t, m.lse_low, index))
    grad = float(number(t, m.grad, index))
    if high == -inf:  # no pair counts: -inf - -inf would be NaN
        return 0.0, 0.0 if t.bounded else inf
    if t.bounded:
        return grad * exp(-high - low), 0.0
    return grad * exp(-low), high


@njit(**EXACT)
def at_positive(t, m, index, row, z):
    """The gradient of the positive's score by way of one log-sum-exp."""
    lse = Lse(number(t, m.lse, index), number(t, m.lse_low, index))
    log_p = real(-inf, t.zero) if lse.high == -inf else log_probability(z, lse)
    hard = 0.0 if m.hard == 0 else float(number(t, m.hard, row))
    soft = float(number(t, m.grad, index)) - hard
    return soft * exp_nonpositive(log_p) + hard * expm1(float(log_p))


@njit(**EXACT)
def block_backward(t, g, row, at, factor, shift, z, out):
    """The gradient of a block of scores z."""
    pair_scores(t, row, at, z)
    offset = at.start * (8 if t.dtype == FLOAT64 else 4)
    factors, shifts = pointer(g.at.factors + offset, t.zero), pointer(g.at.shifts + offset, t.zero)
    if t.bounded:
        block_pair_gradient_bounded(z, at.n, factor, factors, out)
    elif g.column.lse == 0:
        block_softmax(z, at.n, Lse(shift, t.zero), factor, out)
    else:
        block_pair_gradient(z, at.n, factor, shift, factors, shifts, out)
    j = place(t.positive, t, row, at)
    if j >= 0:
        value = at_positive(t, g.row, row, row, z[j])
        if g.column.lse != 0:
            value += at_positive(t, g.column, at.start + j, row, z[j])
        if g.at.positive != 0:
            value += number(t, g.at.positive, row)
        out[j] = real(value, t.zero)


@njit(**EXACT)
def row_backward(t, g, row):
    z, result = block_buffer(t.zero), block_buffer(t.zero)
    factor, shift = factor_of(t, g.row, row)
    for block in range(blocks_of(t)):
        at = cut(block, CELL_COLUMNS, t.columns)
        out = g.at.out + (row * g.at.out_stride + at.start) * t.itemsize
        written = pointer(out, t.zero) if is_real(t) else result
        block_backward(t, g, row, at, real(factor, t.zero), real(shift, t.zero), z, written)
        if not is_real(t):
            narrow(result, t.dtype, at.n, pointer(out, UINT16))


@njit(**EXACT)
def column_factors(t, m, places):
    factors, shifts = pointer(places.factors, t.zero), pointer(places.shifts, t.zero)
    for index in range(t.columns):
        factor, shift = factor_of(t, m, index) if m.lse != 0 else (0.0, 0.0)
        factors[index], shifts[index] = real(factor, t.zero), real(shift, t.zero)


@njit(**EXACT)
def backward_rows(t, row_marginal, column_marginal, places, counter):
    g = Gradient(row_marginal, column_marginal, places)
    while True:
        start = take(pointer(counter, INT64), ROWS_AT_ONCE)
        if start >= t.rows:
            return
        for row in range(start, min(start + ROWS_AT_ONCE, t.rows)):
            row_backward(t, g, row)


@njit(nogil=True, cache=True, **EXACT)
def backward_serial(t, row, column, places, counter, workers):
    column_factors(t, column, places)
    backward_rows(t, row, column, places, counter)


@njit(parallel=True, cache=True, **EXACT)
def backward_parallel(t, row, column, places, counter, workers):
    column_factors(t, column, places)
    for _ in prange(workers):
        backward_rows(t, row, column, places, counter)


# The loss by sigmoids


@njit(**EXACT)
def block_sigmoid(t, row, at, grad_scale, out):
    """softplus(-z) of the positive and softplus(z) of the others, and their derivatives."""
    z = block_buffer(t.zero)
    score = pair_scores(t, row, at, z)
    j = place(t.positive, t, row, at)
    if j >= 0:
        z[j] = real(-inf, t.zero)  # adds nothing
    loss = block_softplus(z, at.n, grad_scale, out)
    if j >= 0:
        value, derivative = softplus(-score)
        loss += value
        out[j] = -grad_scale * derivative
    return loss


@njit(**EXACT)
def row_sigmoid(t, s, row):
    result = block_buffer(t.zero)
    grad_scale = real(s.grad_scale, t.zero)
    for block in range(blocks_of(t)):
        at = cut(block, CELL_COLUMNS, t.columns)
        out = s.out + (row * s.out_stride + at.start) * t.itemsize
        written = pointer(out, t.zero) if is_real(t) else result
        pointer(s.loss, DOUBLE)[row] += block_sigmoid(t, row, at, grad_scale, written)
        pointer(s.grad, DOUBLE)[row] += block_sum(written, at.n)
        if not is_real(t):
            narrow(result, t.dtype, at.n, pointer(out, UINT16))


@njit(**EXACT)
def sigmoid_rows(t, s, counter):
    while True:
        start = take(pointer(counter, INT64), ROWS_AT_ONCE)
        if start >= t.rows:
            return
        for row in range(start, min(start + ROWS_AT_ONCE, t.rows)):
            row_sigmoid(t, s, row)


@njit(nogil=True, cache=True, **EXACT)
def sigmoid_serial(t, s, counter, workers):
    sigmoid_rows(t, s, counter)


@njit(parallel=True, cache=True, **EXACT)
def sigmoid_parallel(t, s, counter, workers):
    for _ in prange(workers):
        sigmoid_rows(t, s, counter)


# From Python


def _tile(given):
    dtype, *rest, bounded = given
    zero = np.float64(0) if dtype == FLOAT64 else np.float32(0)
    return Tile(zero, (4, 8, 2, 2)[dtype], int(dtype), *map(int, rest), bool(bounded))


def _run(threads, serial, parallel, *arguments):
    counter = np.zeros(1, np.int64)
    workers = min(threads, numba.config.NUMBA_NUM_THREADS)
    if workers <= 1:
        serial(*arguments, counter.ctypes.data, 1)
        return
    before = numba.get_num_threads()
    numba.set_num_threads(workers)
    try:
        parallel(*arguments, counter.ctypes.data, workers)
    finally:
        numba.set_num_threads(before)


def forward(tile, row_maximum, row_sum, column_maximum, column_sum, positive, threads):
    """Merge a tile into the states of its rows and, unless column_sum is 0, of its columns.

    tile: (dtype, rows, columns, first_column, similarity, stride, scale, scale_stride, bias,
    bias_stride, positive, excluded, row_group, column_group, bounded); 0 for an absent address.
    Sums are doubles; maxima, absent if bounded, and the positives' scores are real.
    """
    t = _tile(tile)
    row_blocks, column_blocks = -(-t.rows // CELL_ROWS), -(-t.columns // CELL_COLUMNS)
    of_rows = np.empty((2, column_blocks * t.rows))
    of_columns = np.empty((2, row_blocks * t.columns))
    found = [part.ctypes.data for part in (*of_rows, *of_columns)]
    c = Cells(row_blocks, column_blocks, *found)
    rows, columns = States(row_maximum, row_sum), States(column_maximum, column_sum)
    # Two functions: Numba makes one loop of two in a function, without a barrier between them, and
    # states were merged before their cells were found.
    _run(threads, find_serial, find_parallel, t, c, columns, positive)
    _run(threads, merge_serial, merge_parallel, t, c, rows, columns)


def backward(tile, row, column, positive, out, out_stride, threads):
    """Write the gradient of a tile's scores, over its similarities if `out` is where they lie.

    row, column: (lse, lse_low, grad, hard), as in Marginal; column all 0 where only rows count.
    positive: the gradient of the positives' scores, by row, or 0.
    """
    t = _tile(tile)
    factors, shifts = np.empty((2, t.columns), t.zero.dtype)
    places = Places(positive, out, out_stride, factors.ctypes.data, shifts.ctypes.data)
    _run(threads, backward_serial, backward_parallel, t, Marginal(*row), Marginal(*column), places)


def sigmoid(tile, grad_scale, loss, grad, out, out_stride, threads):
    """Add each row's loss by sigmoids, and its gradient's sum, to doubles; write the gradient.

    The gradient is that of grad_scale times the loss; `out` as in backward.
    """
    s = Sigmoid(float(grad_scale), loss, grad, out, out_stride)
    _run(threads, sigmoid_serial, sigmoid_parallel, _tile(tile), s)
