"""pairs: row and column log-sum-exps of scaled similarities that never lie in memory whole.

neglog::pairs            forward, a tile of similarities at a time
neglog::pairs_backward   gradients of query, key and scale; itself differentiable

score_ij = scale_i <query_i, key_j> + bias_j, or -inf where the pair is excluded.

Shapes: query (N, D), key (M, D); scale () or (N,), bias () or (M,) and everything returned in the
accumulation dtype. positive (N,) int64: the column of each row's positive. excluded (N,) int64: a
column that its row leaves out, -1 for none. query_group (N,), key_group (M,) int64: pairs of one
group are left out, but for the positive. symmetric: key is query and positive its own inverse, so
the tiles on and above the diagonal are enough.

Returned, (0,) where not asked for or without a positive: row_loss (N,) = row_lse - positive score;
column_loss (N,) = column_lse[positive] - positive score; row_lse (N,), column_lse (M,), score (N,)
of the positive; then what the backward needs: row_low (N,), column_low (M,) and, if `keep` and they
fit in the workspace, the similarities (N, M).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from neglog.ops.nll import library, new_memory, new_rows
from neglog.ops.pairs_tile import (
    CpuTiles,
    CudaTiles,
    Marginal,
    Pairs,
    States,
    Tiles,
    Upstream,
)
from neglog.tiles import gemm, plan

PAIRS = (
    "Tensor query, Tensor key, Tensor scale, Tensor? bias, Tensor? positive, Tensor? excluded, "
    "Tensor? query_group, Tensor? key_group, bool columns, bool symmetric, int workspace, "
    "str backend"
)
library.define(
    f"pairs({PAIRS}, bool keep) -> (Tensor row_loss, Tensor column_loss, "
    "Tensor row_lse, Tensor column_lse, Tensor score, Tensor row_low, Tensor column_low, "
    "Tensor kept)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "pairs_backward(Tensor? grad_row_loss, Tensor? grad_column_loss, Tensor? grad_row_lse, "
    f"Tensor? grad_column_lse, Tensor? grad_score, {PAIRS}, Tensor row_lse, Tensor column_lse, "
    "Tensor row_low, Tensor column_low, Tensor kept, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

# Bytes of a tile, if the workspace allows it, and its columns. On the CPU half of that, which the
# last cache holds, is no faster, and slower on a busy machine: each tile waits for all threads half
# a dozen times. On CUDA, not measured yet: what fills the device, and little more than its cache.
TILE_BYTES, WIDTH = 16 << 20, 4096
CUDA_TILE_BYTES, CUDA_WIDTH = 128 << 20, 8192


def keeps(pairs: Pairs, keep: bool) -> bool:
    """Whether the similarities are kept: they are asked for, and fit in the workspace."""
    numbers = pairs.query.shape[0] * pairs.key.shape[0]
    return keep and numbers * gemm.tile_dtype(pairs.query).itemsize <= pairs.workspace


def tiles_of(pairs: Pairs) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each tile."""
    rows, columns = len(pairs.query), len(pairs.key)
    size = gemm.tile_dtype(pairs.query).itemsize
    cuda = pairs.query.is_cuda
    budget = min(CUDA_TILE_BYTES if cuda else TILE_BYTES, pairs.workspace)
    width = min(columns, CUDA_WIDTH if cuda else WIDTH)
    height = plan.rows_per_tile(rows, width * size, budget)
    if pairs.symmetric:  # squares, so that the diagonal cuts none of the others
        height = width = min(height, width)
    return plan.grid(rows, columns, height, width, pairs.symmetric)


class Workspace:
    """Where tiles of similarities lie: all of them beside each other, or each over the last."""

    def __init__(self, pairs: Pairs, kept: Tensor | None) -> None:
        self.pairs = pairs
        self.kept = kept
        self.dtype = gemm.tile_dtype(pairs.query)
        self._memory = pairs.query.new_empty(0, dtype=self.dtype)

    def new(self, rows: slice, columns: slice) -> Tensor:
        """Room for a tile, until the next one."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        stride = plan.row_stride(width, self.dtype.itemsize)
        if self._memory.numel() < height * stride:  # the first tile is the largest
            self._memory = new_memory((height * stride,), self.pairs.query, self.dtype)
        return self._memory[: height * stride].view(height, stride)[:, :width]

    def filled(self, rows: slice, columns: slice) -> Tensor:
        """The similarities of a tile."""
        out = self.new(rows, columns) if self.kept is None else self.kept[rows, columns]
        gemm.linear(self.pairs.query[rows], self.pairs.key[columns], None, out)
        return out


# Forward


def _forward(kind: Tiles, *arguments: Any) -> tuple[Tensor, ...]:
    *given, keep = arguments
    pairs = Pairs(*given).ready()
    tiles = kind("pairs", pairs)
    rows, columns = (States(len(x), x, tiles.bounded) for x in (pairs.query, pairs.key))
    score = rows.maximum.new_zeros(len(pairs.query) if pairs.positive is not None else 0)
    kept = None
    if keeps(pairs, keep):
        shape = (len(pairs.query), len(pairs.key))
        kept = new_rows(*shape, pairs.query, gemm.tile_dtype(pairs.query))
    workspace = Workspace(pairs, kept)
    of_columns = rows if pairs.symmetric else columns
    for down, across in tiles_of(pairs):
        similarity = workspace.filled(down, across)
        both = pairs.columns or (pairs.symmetric and down != across)
        tiles.forward(
            similarity, down, across, rows, of_columns if both else None,
            None if pairs.positive is None else score,
        )  # fmt: skip
    nothing = score.new_empty(0)
    if pairs.symmetric and pairs.positive is not None:  # of the two, one lies above the diagonal
        below = pairs.positive < torch.arange(len(score), device=score.device)
        score = torch.where(below, score[pairs.positive], score)
    row_lse, row_low = rows.finish()
    column_lse, column_low = columns.finish() if pairs.columns else (nothing, nothing.clone())
    row_loss, column_loss = nothing.clone(), nothing.clone()
    if pairs.positive is not None:
        row_loss = (row_lse - score) + row_low
        if pairs.columns:
            column_loss = (column_lse[pairs.positive] - score) + column_low[pairs.positive]
    return (
        row_loss, column_loss, row_lse, column_lse, score, row_low, column_low,
        pairs.query.new_empty(0, dtype=workspace.dtype) if kept is None else kept,
    )  # fmt: skip


# Backward


def _sum(*parts: Tensor | None) -> Tensor | None:
    total = None
    for part in parts:
        if part is not None:
            total = part if total is None else total + part
    return total


def _size(grads: tuple[Tensor | None, ...]) -> Tensor | float:
    """The largest finite number among the largest of each; 1 if there is none but 0."""
    largest = [g.abs().amax() for g in grads if g is not None and g.numel()]
    if not largest:
        return 1.0
    finite = torch.stack(largest)
    size = torch.where(finite < torch.inf, finite, 0).amax()
    return torch.where(size > 0, size, 1)


def _upstream(
    pairs: Pairs, saved: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]
) -> Upstream:
    row_lse, column_lse, row_low, column_low = saved
    size: float | Tensor = 1.0
    if pairs.query.itemsize == 2:  # products of small gradients and small probabilities vanish
        size = _size(grads)
        grads = tuple(None if g is None else g / size for g in grads)
    row_hard, column_hard, row_soft, column_soft, score = (
        None if g is None or not g.numel() else g.contiguous() for g in grads
    )
    row_grad = _sum(row_soft, row_hard)
    row = Marginal(
        row_lse, row_low, torch.zeros_like(row_lse) if row_grad is None else row_grad, row_hard
    )
    if pairs.symmetric:
        if pairs.positive is not None:
            column_hard = None if row_hard is None else row_hard[pairs.positive]
            score = None if score is None else score + score[pairs.positive]
        return Upstream(row, row._replace(hard=column_hard), score, size)
    if not pairs.columns or (column_hard is None and column_soft is None):
        return Upstream(row, None, score, size)
    column_grad = torch.zeros_like(column_lse) if column_soft is None else column_soft.clone()
    if column_hard is not None:
        assert pairs.positive is not None
        # Not index_add_: on CUDA its order is not determined.
        column_grad.index_put_((pairs.positive,), column_hard, accumulate=True)
    return Upstream(row, Marginal(column_lse, column_low, column_grad, column_hard), score, size)


class Sums:
    """Over the tiles: gradient times key, by row, and gradient times query, by column."""

    def __init__(self, pairs: Pairs, by_row: bool, by_column: bool) -> None:
        self.pairs = pairs
        self.by_row = new_memory(pairs.query.shape if by_row else (0,), pairs.query, pairs.real)
        self.by_column = new_memory(pairs.key.shape if by_column else (0,), pairs.key, pairs.real)
        self._scaled = pairs.scale.dim() == 1  # a scale of its own: the sum must hold it
        self._has_rows = by_row
        if pairs.symmetric:
            self.by_row.zero_()

    def add(self, gradient: Tensor, rows: slice, columns: slice) -> None:
        pairs, first = self.pairs, not self.pairs.symmetric
        if self.by_row.numel():
            part = self.by_row[rows]
            key = pairs.key[columns]
            gemm.add_product(gradient, key, part, first and columns.start == 0)
        if pairs.symmetric and rows != columns:
            gemm.add_outer(gradient, pairs.query[rows], self.by_row[columns], False)
        if self.by_column.numel():
            x = pairs.query[rows]
            if self._scaled:
                x = (x * pairs.scale[rows, None]).to(gradient.dtype)
            gemm.add_outer(gradient, x, self.by_column[columns], rows.start == 0)

    def finished(
        self, wanted: list[bool], size: float | Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query and key in `dtype`, and of scale; empty where not wanted."""
        pairs = self.pairs
        query, key, scale = (pairs.scale.new_empty(0) for _ in range(3))
        if wanted[2]:
            scale = self._of_scale().mul_(size)
        if wanted[0]:
            factor = pairs.scale * size
            query = self.by_row.mul_(factor[:, None] if self._scaled else factor)
        if wanted[1]:
            key = self.by_column.mul_(size if self._scaled else pairs.scale * size)
        return query.to(dtype), key.to(dtype), scale

    def _of_scale(self) -> Tensor:
        """sum_j dscore_ij <query_i, key_j> is <query_i, sum_j dscore_ij key_j>: no tile needed."""
        pairs = self.pairs
        if not self._has_rows:
            return _dot_rows(pairs.key, self.by_column).sum()
        by_row = _dot_rows(pairs.query, self.by_row)
        if self._scaled:
            return by_row
        return by_row.sum() / 2 if pairs.symmetric else by_row.sum()


def _dot_rows(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i>, with x widened some rows at a time."""
    return torch.cat([(a * b).sum(1) for a, b in zip(x.split(4096), y.split(4096), strict=True)])


def _backward(kind: Tiles, *arguments: Any) -> tuple[Tensor, ...]:
    grads, pairs = arguments[:5], Pairs(*arguments[5:17]).ready()
    *saved, kept, wanted = arguments[17:]
    up = _upstream(pairs, tuple(saved), grads)
    from_columns = wanted[1] and not wanted[0] and pairs.scale.dim() == 0 and not pairs.symmetric
    sums = Sums(pairs, wanted[0] or (wanted[2] and not from_columns), wanted[1])
    tiles = kind("pairs_backward", pairs)
    if not pairs.query.numel() or not pairs.key.numel():
        sums.by_row.zero_()
        sums.by_column.zero_()
        return sums.finished(wanted, up.size, pairs.query.dtype)
    workspace = Workspace(pairs, None)
    for down, across in tiles_of(pairs):
        if kept.numel():
            similarity, gradient = kept[down, across], workspace.new(down, across)
        else:
            similarity = gradient = workspace.filled(down, across)
        tiles.backward(similarity, down, across, up, gradient)
        sums.add(gradient, down, across)
    return sums.finished(wanted, up.size, pairs.query.dtype)


for _kind, _key in ((CpuTiles, "CPU"), (CudaTiles, "CUDA")):
    library.impl("pairs", partial(_forward, _kind), _key)
    library.impl("pairs_backward", partial(_backward, _kind), _key)


# Shapes alone


@torch.library.register_fake("neglog::pairs", lib=library)
def _pairs_fake(*arguments: Any) -> tuple[Tensor, ...]:
    *given, keep = arguments
    pairs = Pairs(*given)
    query, rows, columns = pairs.query, pairs.query.shape[0], pairs.key.shape[0]

    def numbers(count: Any) -> Tensor:
        return query.new_empty(count, dtype=pairs.real)

    dtype = gemm.tile_dtype(query)
    kept = query.new_empty(0, dtype=dtype)
    if keeps(pairs, keep):
        strides = (plan.row_stride(columns, dtype.itemsize), 1)
        kept = query.new_empty_strided((rows, columns), strides, dtype=dtype)
    of_positive = rows if pairs.positive is not None else 0
    of_columns = columns if pairs.columns else 0
    return (
        numbers(of_positive), numbers(of_positive if pairs.columns else 0), numbers(rows),
        numbers(of_columns), numbers(of_positive), numbers(rows), numbers(of_columns),
        kept,
    )  # fmt: skip


@torch.library.register_fake("neglog::pairs_backward", lib=library)
def _pairs_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    pairs, wanted = Pairs(*arguments[5:17]), arguments[-1]
    likes = (pairs.query, pairs.key, pairs.scale)
    dtypes = (pairs.query.dtype, pairs.query.dtype, pairs.real)
    return tuple(
        pairs.query.new_empty(like.shape if want else 0, dtype=dtype)
        for like, want, dtype in zip(likes, wanted, dtypes, strict=True)
    )
