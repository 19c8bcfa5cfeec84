"""infonce: row and column log-sum-exps of scaled similarities that never lie in memory whole.

neglog::infonce            forward, a tile of similarities at a time
neglog::infonce_backward   gradients of query, key and scale; itself differentiable

score_ij = scale_i <query_i, key_j> + bias_j, or -inf where the pair is excluded.

Shapes: query (N, D), key (M, D); scale () or (N,), bias () or (M,) and everything returned in the
accumulation dtype. positive (N,) int64: the column of each row's positive. excluded (N,) int64: a
column that its row leaves out, -1 for none. query_group (N,), key_group (M,) int64: pairs of one
group are left out, but for the positive. symmetric: key is query and positive its own inverse, so
the tiles on and above the diagonal are enough.

Returned, (0,) where not asked for or without a positive: row_loss (N,) = row_lse - positive score;
column_loss (N,) = column_lse[positive] - positive score; row_lse (N,), column_lse (M,), score (N,)
of the positive; then what the backward needs: row_low (N,), column_low (M,) and, if `keep`, the
similarities (N, M).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neglog import dispatch, kernels, matmul, tiling
from neglog.kernels.threads import allowed
from neglog.ops.nll import DTYPE_CODES, library, new_memory, real_dtype

PAIRS = (
    "Tensor query, Tensor key, Tensor scale, Tensor? bias, Tensor? positive, Tensor? excluded, "
    "Tensor? query_group, Tensor? key_group, bool columns, bool symmetric, int workspace, "
    "str backend"
)
library.define(
    f"infonce({PAIRS}, bool keep) -> (Tensor row_loss, Tensor column_loss, "
    "Tensor row_lse, Tensor column_lse, Tensor score, Tensor row_low, Tensor column_low, "
    "Tensor kept)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "infonce_backward(Tensor? grad_row_loss, Tensor? grad_column_loss, Tensor? grad_row_lse, "
    f"Tensor? grad_column_lse, Tensor? grad_score, {PAIRS}, Tensor row_lse, Tensor column_lse, "
    "Tensor row_low, Tensor column_low, Tensor kept, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

# Scores up to this size need no maximum: e^40 and the sum of a billion of them are float32's.
BOUNDED = {torch.float32: 40.0, torch.float64: 300.0}
# Bytes of a tile, if the workspace allows it. Half of that, which the last cache holds, is no
# faster, and slower on a busy machine: each tile waits for all threads half a dozen times.
TILE_BYTES = 16 << 20
WIDTH = 4096


class Pairs(NamedTuple):
    """What is compared, as the schemas begin."""

    query: Tensor
    key: Tensor
    scale: Tensor
    bias: Tensor | None
    positive: Tensor | None
    excluded: Tensor | None
    query_group: Tensor | None
    key_group: Tensor | None
    columns: bool
    symmetric: bool
    workspace: int
    backend: str

    @property
    def real(self) -> torch.dtype:
        return real_dtype(self.query.dtype)

    def rows(self, part: slice) -> Pairs:
        """Some queries against all keys."""

        def of_rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[part]

        return self._replace(
            query=self.query[part], scale=self.scale[part] if self.scale.dim() else self.scale,
            positive=of_rows(self.positive), excluded=of_rows(self.excluded),
            query_group=of_rows(self.query_group),
        )  # fmt: skip

    def ready(self) -> Pairs:
        """As the kernels want them: contiguous, the small ones in the accumulation dtype."""

        def of(x: Any, dtype: torch.dtype) -> Any:
            return None if x is None else x.to(dtype).contiguous()

        return self._replace(
            query=self.query.contiguous(), key=self.key.contiguous(),
            scale=of(self.scale, self.real), bias=of(self.bias, self.real),
            positive=of(self.positive, torch.int64), excluded=of(self.excluded, torch.int64),
            query_group=of(self.query_group, torch.int64),
            key_group=of(self.key_group, torch.int64),
        )  # fmt: skip

    def bounded(self) -> bool:
        """Whether no score can be too large, or too small, for e^score."""
        if not self.query.numel() or not self.key.numel():
            return False
        lengths = (x.to(self.real).norm(dim=1).amax() for x in (self.query, self.key))
        bound = self.scale.abs().amax() * next(lengths) * next(lengths)
        if self.bias is not None:
            bound = bound + self.bias.abs().where(self.bias != -torch.inf, 0).amax()
        return bool(bound <= BOUNDED[self.real])

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        rows, columns, size = len(self.query), len(self.key), self.query.itemsize
        budget = min(TILE_BYTES, self.workspace)
        width = min(columns, WIDTH)
        height = tiling.rows_per_tile(rows, width * size, budget)
        if self.symmetric:  # squares, so that the diagonal cuts none of the others
            height = width = min(height, width)
        return tiling.grid(rows, columns, height, width, self.symmetric)


class Workspace:
    """Where tiles of similarities lie: all of them beside each other, or each over the last."""

    def __init__(self, pairs: Pairs, kept: Tensor | None) -> None:
        self.pairs = pairs
        self.kept = kept
        self._memory = pairs.query.new_empty(0)

    def new(self, rows: slice, columns: slice) -> Tensor:
        """Room for a tile, until the next one."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if self._memory.numel() < height * width:  # the first tile is the largest
            self._memory = new_memory((height * width,), self.pairs.query.dtype)
        return self._memory[: height * width].view(height, width)

    def filled(self, rows: slice, columns: slice) -> Tensor:
        """The similarities of a tile."""
        out = self.new(rows, columns) if self.kept is None else self.kept[rows, columns]
        matmul.linear(self.pairs.query[rows], self.pairs.key[columns], None, out)
        return out


def address(tensor: Tensor | None, start: int = 0) -> int:
    return 0 if tensor is None else tensor.data_ptr() + start * tensor.itemsize


def step(tensor: Tensor | None) -> int:
    """Between the numbers of a vector; 0 where one number stands for all."""
    return int(tensor is not None and tensor.dim() == 1)


def tile_arguments(
    pairs: Pairs, similarity: Tensor, rows: slice, columns: slice, bounded: bool
) -> tuple:
    """The `tile` of the kernels."""
    i, j = rows.start, columns.start
    return (
        DTYPE_CODES[similarity.dtype], *similarity.shape, j,
        similarity.data_ptr(), similarity.stride(0),
        address(pairs.scale, i * step(pairs.scale)), step(pairs.scale),
        address(pairs.bias, j * step(pairs.bias)), step(pairs.bias),
        address(pairs.positive, i), address(pairs.excluded, i),
        address(pairs.query_group, i), address(pairs.key_group, j), bounded,
    )  # fmt: skip


def load_kernel(op: str, backend: str) -> Any:
    dispatch.ran(op, backend or dispatch.kernel_backend() or "none")
    return kernels.load("infonce", backend or None)


# Forward


class States:
    """Maximum and sum of rows or columns; the maximum is 0 where none is needed."""

    def __init__(self, count: int, real: torch.dtype, bounded: bool) -> None:
        start = 0.0 if bounded else -torch.inf
        self.maximum = torch.full((count,), start, dtype=real)
        self.sum = torch.zeros(count, dtype=torch.float64)

    def finish(self) -> tuple[Tensor, Tensor]:
        """The log-sum-exp as the unevaluated sum of two numbers."""
        lse = self.maximum.double() + self.sum.log()
        high = lse.to(self.maximum.dtype)
        return high, (lse - high).nan_to_num(0.0).to(high.dtype)


def _infonce_cpu(*arguments: Any) -> tuple[Tensor, ...]:
    *given, keep = arguments
    pairs = Pairs(*given).ready()
    kernel = load_kernel("infonce", pairs.backend)
    bounded = pairs.bounded()
    rows, columns = (States(len(x), pairs.real, bounded) for x in (pairs.query, pairs.key))
    score = rows.maximum.new_zeros(len(pairs.query) if pairs.positive is not None else 0)
    kept = new_memory((len(pairs.query), len(pairs.key)), pairs.query.dtype) if keep else None
    workspace, threads = Workspace(pairs, kept), allowed(torch.get_num_threads())
    of_columns = rows if pairs.symmetric else columns
    for down, across in pairs.tiles():
        similarity = workspace.filled(down, across)
        both = pairs.columns or (pairs.symmetric and down != across)
        kernel.forward(
            tile_arguments(pairs, similarity, down, across, bounded),
            address(rows.maximum, down.start), address(rows.sum, down.start),
            address(of_columns.maximum, across.start) if both else 0,
            address(of_columns.sum, across.start) if both else 0,
            address(score, down.start) if len(score) else 0, threads,
        )  # fmt: skip
    nothing = score.new_empty(0)
    if pairs.symmetric and pairs.positive is not None:  # of the two, one lies above the diagonal
        below = pairs.positive < torch.arange(len(score))
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
        pairs.query.new_empty(0) if kept is None else kept,
    )  # fmt: skip


# Backward


class Marginal(NamedTuple):
    """What flows in by the log-sum-exps of rows or columns; see the kernel's struct."""

    lse: Tensor
    low: Tensor
    grad: Tensor
    hard: Tensor | None

    def addresses(self, at: int, rows: int) -> tuple[int, ...]:
        parts = (address(part, at) for part in self[:3])
        return (*parts, address(self.hard, rows))


class Upstream(NamedTuple):
    """The five gradients that flow in, for unit size: divided by `size`."""

    row: Marginal
    column: Marginal | None
    score: Tensor | None
    size: float


def _sum(*parts: Tensor | None) -> Tensor | None:
    total = None
    for part in parts:
        if part is not None:
            total = part if total is None else total + part
    return total


def _upstream(
    pairs: Pairs, saved: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]
) -> Upstream:
    row_lse, column_lse, row_low, column_low = saved
    size = 1.0
    if pairs.query.itemsize == 2:  # products of small gradients and small probabilities vanish
        largest = [float(g.abs().amax()) for g in grads if g is not None and g.numel()]
        size = max([g for g in largest if 0 < g < torch.inf], default=1.0)
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
        column_grad.index_add_(0, pairs.positive, column_hard)
    return Upstream(row, Marginal(column_lse, column_low, column_grad, column_hard), score, size)


class Sums:
    """Over the tiles: gradient times key, by row, and gradient times query, by column."""

    def __init__(self, pairs: Pairs, by_row: bool, by_column: bool) -> None:
        self.pairs = pairs
        real = pairs.real
        self.by_row = new_memory(pairs.query.shape if by_row else (0,), real)
        self.by_column = new_memory(pairs.key.shape if by_column else (0,), real)
        self._scaled = pairs.scale.dim() == 1  # a scale of its own: the sum must hold it
        self._has_rows = by_row
        if pairs.symmetric:
            self.by_row.zero_()

    def add(self, gradient: Tensor, rows: slice, columns: slice) -> None:
        pairs, first = self.pairs, not self.pairs.symmetric
        if self.by_row.numel():
            part = self.by_row[rows]
            key = pairs.key[columns]
            matmul.add_product(gradient, key, part, first and columns.start == 0)
        if pairs.symmetric and rows != columns:
            matmul.add_outer(gradient, pairs.query[rows], self.by_row[columns], False)
        if self.by_column.numel():
            x = pairs.query[rows]
            if self._scaled:
                x = (x * pairs.scale[rows, None]).to(x.dtype)
            matmul.add_outer(gradient, x, self.by_column[columns], rows.start == 0)

    def finished(
        self, wanted: list[bool], size: float, dtype: torch.dtype
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


def _infonce_backward_cpu(*arguments: Any) -> tuple[Tensor, ...]:
    grads, pairs = arguments[:5], Pairs(*arguments[5:17]).ready()
    *saved, kept, wanted = arguments[17:]
    kernel = load_kernel("infonce_backward", pairs.backend)
    up = _upstream(pairs, tuple(saved), grads)
    from_columns = wanted[1] and not wanted[0] and pairs.scale.dim() == 0 and not pairs.symmetric
    sums = Sums(pairs, wanted[0] or (wanted[2] and not from_columns), wanted[1])
    if not pairs.query.numel() or not pairs.key.numel():
        sums.by_row.zero_()
        sums.by_column.zero_()
        return sums.finished(wanted, up.size, pairs.query.dtype)
    bounded, threads = pairs.bounded(), allowed(torch.get_num_threads())
    workspace = Workspace(pairs, None)
    for down, across in pairs.tiles():
        if kept.numel():
            similarity, gradient = kept[down, across], workspace.new(down, across)
        else:
            similarity = gradient = workspace.filled(down, across)
        kernel.backward(
            tile_arguments(pairs, similarity, down, across, bounded),
            up.row.addresses(down.start, down.start),
            (0, 0, 0, 0) if up.column is None else up.column.addresses(across.start, down.start),
            address(up.score, down.start), gradient.data_ptr(), gradient.stride(0), threads,
        )  # fmt: skip
        sums.add(gradient, down, across)
    return sums.finished(wanted, up.size, pairs.query.dtype)


library.impl("infonce", _infonce_cpu, "CPU")
library.impl("infonce_backward", _infonce_backward_cpu, "CPU")


# Shapes alone


@torch.library.register_fake("neglog::infonce", lib=library)
def _infonce_fake(*arguments: Any) -> tuple[Tensor, ...]:
    *given, keep = arguments
    pairs = Pairs(*given)
    query, rows, columns = pairs.query, pairs.query.shape[0], pairs.key.shape[0]

    def numbers(count: Any) -> Tensor:
        return query.new_empty(count, dtype=pairs.real)

    of_positive = rows if pairs.positive is not None else 0
    of_columns = columns if pairs.columns else 0
    return (
        numbers(of_positive), numbers(of_positive if pairs.columns else 0), numbers(rows),
        numbers(of_columns), numbers(of_positive), numbers(rows), numbers(of_columns),
        query.new_empty((rows, columns) if keep else 0),
    )  # fmt: skip


@torch.library.register_fake("neglog::infonce_backward", lib=library)
def _infonce_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    pairs, wanted = Pairs(*arguments[5:17]), arguments[-1]
    likes = (pairs.query, pairs.key, pairs.scale)
    dtypes = (pairs.query.dtype, pairs.query.dtype, pairs.real)
    return tuple(
        pairs.query.new_empty(like.shape if want else 0, dtype=dtype)
        for like, want, dtype in zip(likes, wanted, dtypes, strict=True)
    )
