"""The schedules of pairs, one for the CPU and CUDA; cpu.py and cuda.py have the steps.

Similarities are made a tile at a time in a workspace: 2 matmuls of the forward and the backward's
3 are 4 in all where the backward makes them again, and 3 where the forward kept them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from neglog.ops.dtypes import real_dtype
from neglog.ops.memory import contiguous, new_gradient, new_memory, new_rows
from neglog.ops.pairs import formula, schema
from neglog.ops.pairs.cpu import CpuTiles
from neglog.ops.pairs.cuda import CudaTiles
from neglog.ops.pairs.schema import Marginal, Pairs, Upstream
from neglog.ops.pairs.states import States
from neglog.tiles import gemm, plan

TILES: dict[str, Any] = {"cpu": CpuTiles, "cuda": CudaTiles}
# Bytes of a tile, if the workspace allows it, and its columns. On the CPU half of that, which the
# last cache holds, is no faster, and slower on a busy machine: each tile waits for all threads half
# a dozen times. On CUDA, not measured yet: what fills the device, and little more than its cache.
TILE_BYTES, WIDTH = 16 << 20, 4096
DOT_ROWS = 4096
CUDA_TILE_BYTES, CUDA_WIDTH = 128 << 20, 8192


def tiles_of(pairs: Pairs) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each tile."""
    rows, columns = pairs.shape
    cuda = pairs.query.is_cuda
    budget = min(CUDA_TILE_BYTES if cuda else TILE_BYTES, pairs.workspace)
    width = min(columns, CUDA_WIDTH if cuda else WIDTH)
    height = plan.rows_per_tile(rows, width * pairs.tile_dtype.itemsize, budget)
    if pairs.symmetric:  # squares, so that the diagonal cuts none of the others
        height = width = min(height, width)
    return plan.grid(rows, columns, height, width, pairs.symmetric)


class Workspace:
    """Where tiles of similarities lie: all of them beside each other, or each over the last."""

    def __init__(self, pairs: Pairs, kept: Tensor | None) -> None:
        self.pairs = pairs
        self.kept = kept
        self._memory = pairs.query.new_empty(0, dtype=pairs.tile_dtype)

    def new(self, rows: slice, columns: slice) -> Tensor:
        """Room for a tile, until the next one."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        stride = plan.row_stride(width, self.pairs.tile_dtype.itemsize)
        if self._memory.numel() < height * stride:  # the first tile is the largest
            self._memory = new_memory((height * stride,), self.pairs.query, self._memory.dtype)
        return self._memory.as_strided((height, width), (stride, 1))

    def filled(self, rows: slice, columns: slice) -> Tensor:
        """The similarities of a tile."""
        out = self.new(rows, columns) if self.kept is None else self.kept[rows, columns]
        gemm.linear(self.pairs.query[rows], self.pairs.key[columns], None, out)
        return out


# Forward


def forward(kind: Any, a: Any) -> tuple[Tensor, ...]:
    pairs = Pairs.of(a).ready()
    tiles = kind("pairs", pairs)
    rows, columns = States.of_both(pairs.shape, pairs.query, tiles.bounded)
    score = rows.maximum.new_zeros(pairs.shape[0] if pairs.positive is not None else 0)
    kept = None
    if a.keep:
        kept = new_rows(*pairs.shape, pairs.query, pairs.tile_dtype)
    workspace = Workspace(pairs, kept)
    of_columns = rows if pairs.symmetric else columns
    for down, across in tiles_of(pairs):
        similarity = workspace.filled(down, across)
        both = pairs.columns or (pairs.symmetric and down != across)
        tiles.forward(
            similarity, down, across, rows, of_columns if both else None,
            None if pairs.positive is None else score,
        )  # fmt: skip
    if pairs.symmetric and pairs.positive is not None:  # of the two, one lies above the diagonal
        below = pairs.positive < torch.arange(len(score), device=score.device)
        score = torch.where(below, score[pairs.positive], score)
    if kept is None:
        kept = pairs.query.new_empty(0, dtype=pairs.tile_dtype)
    return *_results(pairs, rows, columns, score), kept


def _results(pairs: Pairs, rows: States, columns: States, score: Tensor) -> tuple[Tensor, ...]:
    """All but the similarities that were kept."""

    def nothing() -> Tensor:  # the results of an op are not each other's
        return score.new_empty(0)

    row_lse, row_low = rows.finish()
    column_lse, column_low = columns.finish() if pairs.columns else (nothing(), nothing())
    own = pairs.positive
    row_loss = nothing() if own is None else (row_lse - score).add_(row_low)
    column_loss = nothing()
    if own is not None and pairs.columns:
        column_loss = (column_lse[own] - score).add_(column_low[own])
    return row_loss, column_loss, row_lse, column_lse, score, row_low, column_low


# Backward


def total_of(*parts: Tensor | None) -> Tensor | None:
    total = None
    for part in parts:
        if part is not None:
            total = part if total is None else total + part
    return total


def largest_of(grads: Sequence[Tensor | None]) -> Tensor | float:
    """The largest finite number among the largest of each; 1 if there is none but 0."""
    largest = [g.abs().amax() for g in grads if g is not None and g.numel()]
    if not largest:
        return 1.0
    each = torch.stack(largest)
    size = torch.where(each < torch.inf, each, 0).amax()
    return torch.where(size > 0, size, 1)


def _upstream(pairs: Pairs, a: Any) -> Upstream:
    """The gradients of losses are those of a log-sum-exp, and their negatives of a score."""
    given = ((name, getattr(a, name)) for name in schema.UPSTREAM)
    grads = [None if g is None or not g.numel() else contiguous(g, name) for name, g in given]
    size: float | Tensor = 1.0
    if pairs.query.itemsize == 2:  # products of small gradients and small probabilities vanish
        size = largest_of(grads)
        grads = [None if g is None else g / size for g in grads]
    row_loss, column_loss, through_rows, through_columns, score = grads
    by_row = total_of(through_rows, row_loss)
    by_row = torch.zeros_like(a.row_lse) if by_row is None else by_row
    row = Marginal(a.row_lse, a.row_low, by_row, row_loss)
    if pairs.symmetric:
        if pairs.positive is not None:
            column_loss = None if row_loss is None else row_loss[pairs.positive]
            score = None if score is None else score + score[pairs.positive]
        return Upstream(row, row._replace(target_weight=column_loss), score, size)
    if not pairs.columns or (column_loss is None and through_columns is None):
        return Upstream(row, None, score, size)
    by_column = (
        torch.zeros_like(a.column_lse) if through_columns is None else through_columns.clone()
    )
    if column_loss is not None:
        assert pairs.positive is not None
        # Not index_add_: on CUDA its order is not determined.
        by_column.index_put_((pairs.positive,), column_loss, accumulate=True)
    column = Marginal(a.column_lse, a.column_low, by_column, column_loss)
    return Upstream(row, column, score, size)


class Sums:
    """Over the tiles: gradient times key, by row, and gradient times query, by column.

    onto: what the sums by row are added to, (N, D); without it they begin at 0.
    """

    def __init__(
        self, pairs: Pairs, by_row: bool, by_column: bool, onto: Tensor | None = None
    ) -> None:
        self.pairs = pairs
        self.by_row = onto if onto is not None and by_row else _new_sum(pairs.query, by_row)
        self.by_column = _new_sum(pairs.key, by_column)
        self._scaled = pairs.scale.dim() == 1  # a scale of its own: the sum must hold it
        self._has_rows = by_row
        self._continues = onto is not None
        if pairs.symmetric or not pairs.query.numel() or not pairs.key.numel():
            self.by_column.zero_()
            if not self._continues:
                self.by_row.zero_()

    def add(self, gradient: Tensor, rows: slice, columns: slice) -> None:
        pairs, first = self.pairs, not (self.pairs.symmetric or self._continues)
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
        self, wanted: Sequence[bool], size: float | Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query and key in `dtype`, and of scale; empty where not wanted."""
        query, key, scale = (self.pairs.scale.new_empty(0) for _ in range(3))
        factor = self.pairs.scale * size
        if wanted[2]:
            scale = self._of_scale().mul_(size)
        if wanted[0]:
            query = self.by_row.mul_(factor[:, None] if self._scaled else factor)
        if wanted[1]:
            key = self.by_column.mul_(size if self._scaled else factor)
        return query.to(dtype), key.to(dtype), scale

    def _of_scale(self) -> Tensor:
        """sum_j dscore_ij <query_i, key_j> is <query_i, sum_j dscore_ij key_j>: no tile needed."""
        pairs = self.pairs
        if not self._has_rows:
            return dot_rows(pairs.key, self.by_column).sum()
        by_row = dot_rows(pairs.query, self.by_row)
        if self._scaled:
            return by_row
        return by_row.sum() / 2 if pairs.symmetric else by_row.sum()


def _new_sum(x: Tensor, wanted: bool) -> Tensor:
    return new_gradient(x.shape if wanted else (0,), x, real_dtype(x.dtype))


def dot_rows(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i>, with x widened some rows at a time."""
    if x.shape[0] <= DOT_ROWS:
        return (x * y).sum(1)
    return torch.cat(
        [(a * b).sum(1) for a, b in zip(x.split(DOT_ROWS), y.split(DOT_ROWS), strict=True)]
    )


def backward(kind: Any, a: Any) -> tuple[Tensor, ...]:
    pairs, wanted = Pairs.of(a).ready(), a.wanted
    up = _upstream(pairs, a)
    from_columns = wanted[1] and not wanted[0] and pairs.scale.dim() == 0 and not pairs.symmetric
    sums = Sums(pairs, wanted[0] or (wanted[2] and not from_columns), wanted[1])
    tiles = kind("pairs_backward", pairs)
    if not pairs.query.numel() or not pairs.key.numel():
        return sums.finished(wanted, up.size, pairs.query.dtype)
    workspace = Workspace(pairs, None)
    for down, across in tiles_of(pairs):
        if a.kept.numel():
            similarity, gradient = a.kept[down, across], workspace.new(down, across)
        else:
            similarity = gradient = workspace.filled(down, across)
        tiles.backward(similarity, down, across, up, gradient)
        sums.add(gradient, down, across)
    return sums.finished(wanted, up.size, pairs.query.dtype)


# The loss by sigmoids


def sigmoid(kind: Any, a: Any) -> tuple[Tensor, ...]:
    pairs = Pairs.of_sigmoid(*a[: a._fields.index("wanted")]).ready()
    tiles = kind("pairs_sigmoid", pairs, False)
    sums = Sums(pairs, a.wanted[0] or a.wanted[2], a.wanted[1])
    loss, slopes = (a.query.new_zeros(len(a.query), dtype=torch.float64) for _ in range(2))
    workspace = Workspace(pairs, None)
    for down, across in tiles_of(pairs):
        similarity = workspace.filled(down, across)
        tiles.sigmoid(similarity, down, across, loss, slopes)
        sums.add(similarity, down, across)
    formed = sums.finished(a.wanted[:3], 1.0, pairs.real)
    of_bias = slopes.sum() if a.wanted[3] else slopes.new_empty(0)
    return loss.sum().to(pairs.real), *formed, of_bias.to(pairs.real)


def sigmoid_backward(kind: Any, a: Any) -> tuple[Tensor, ...]:
    """What the forward formed, times the upstream, or formed anew. In new memory: the graph may be
    walked again."""
    likes = (a.query, a.key, a.scale, a.bias)
    if not len(a.query):  # a mean over no rows has an infinite upstream: 0 times it is NaN
        return tuple(
            x.new_zeros(x.shape if want else 0) for x, want in zip(likes, a.wanted, strict=True)
        )
    formed: Sequence[Tensor] = (a.grad_query, a.grad_key, a.grad_scale, a.grad_bias)
    if any(want and not kept.numel() for want, kept in zip(a.wanted, formed, strict=True)):
        names = schema.sigmoid.Arguments._fields
        formed = sigmoid(kind, schema.sigmoid.Arguments(*(getattr(a, name) for name in names)))[1:]
    return tuple(
        torch.mul(kept, a.grad, out=new_gradient(kept.shape, kept, x.dtype))
        if want
        else x.new_empty(0)
        for kept, x, want in zip(formed, likes, a.wanted, strict=True)
    )


def statistics(a: Any) -> tuple[Tensor, ...]:
    return formula.statistics(a.positive_score, Pairs.of(a))


for _device, _kind in TILES.items():
    schema.forward.implement(_device, partial(forward, _kind))
    schema.backward.implement(_device, partial(backward, _kind))
    schema.sigmoid.implement(_device, partial(sigmoid, _kind))
    schema.sigmoid_backward.implement(_device, partial(sigmoid_backward, _kind))
    schema.statistics.implement(_device, statistics)
