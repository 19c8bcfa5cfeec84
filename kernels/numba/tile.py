"""A tile of similarities and the scores of its pairs: the first part of pairs.pyx, by Numba."""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import numpy as np
from numba import njit

from neglog.kernels.numba.block import block_affine, widen_block  # isort: skip
from neglog.kernels.numba.block_pairs import block_exclude, block_pair_scores  # isort: skip
from neglog.kernels.numba.intrinsics import (  # isort: skip
    EXACT, Pointer, Real, block_buffer, cast, pointer,
)  # fmt: skip

FLOAT64 = 1
INT64 = np.int64(0)


class Tile(NamedTuple):
    zero: Real  # a number of the type that is computed in
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
    positive: int  # the column of each row's positive, counted over all tiles
    excluded: int  # a column that each row leaves out, counted so; -1 for none
    row_group: int
    column_group: int
    bounded: bool


class Span(NamedTuple):
    """Rows or columns start to start + n of the tile."""

    start: int
    n: int


@njit(**EXACT)
def stored_as_real(t: Tile) -> bool:
    """Whether the similarities are of the type that is computed in."""
    return t.dtype <= FLOAT64


@njit(**EXACT)
def load_real(t: Tile, address: int, index: int) -> Real:
    """One number of the type that is computed in."""
    return pointer(address, t.zero)[index]


@njit(**EXACT)
def block_span(block: int, size: int, whole: int) -> Span:
    return Span(block * size, min(size, whole - block * size))


@njit(**EXACT)
def index_in_block(columns: int, t: Tile, row: int, span: Span) -> int:
    """The index within the block of the column that `columns` names for a row, or -1."""
    if columns == 0:
        return -1
    j = pointer(columns, INT64)[row] - t.first_column - span.start
    return j if 0 <= j < span.n else -1


@njit(**EXACT)
def affine_scores(t: Tile, row: int, span: Span, z: Pointer) -> None:
    """z = scale * similarity + bias"""
    source = t.similarity + (row * t.stride + span.start) * t.itemsize
    scale = load_real(t, t.scale, row * t.scale_stride)
    bias = 0
    if t.bias != 0 and t.bias_stride == 1:
        bias = t.bias + span.start * (8 if t.dtype == FLOAT64 else 4)
    x = block_buffer(t.zero)
    if stored_as_real(t):
        x = pointer(source, t.zero)
    else:
        widen_block(source, t.dtype, span.n, x)
    block_pair_scores(x, span.n, scale, bias, z)
    if t.bias != 0 and t.bias_stride == 0:
        block_affine(z, span.n, cast(1, t.zero), load_real(t, t.bias, 0))


@njit(**EXACT)
def pair_scores(t: Tile, row: int, span: Span, z: Pointer) -> Real:
    """Write the block's scores to z; return the positive's before any exclusion, if it is here."""
    affine_scores(t, row, span, z)
    positive = index_in_block(t.positive, t, row, span)
    positive_score = z[positive] if positive >= 0 else t.zero
    if t.row_group != 0:
        groups = pointer(t.column_group + span.start * 8, INT64)
        block_exclude(z, span.n, pointer(t.row_group, INT64)[row], groups)
        if positive >= 0:
            z[positive] = positive_score
    j = index_in_block(t.excluded, t, row, span)
    if j >= 0:
        z[j] = cast(-inf, t.zero)
    return positive_score
