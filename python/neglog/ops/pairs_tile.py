"""One tile of pairs: what it adds to the states of its rows and columns, and its gradient.

CpuTiles    by the kernels of kernels/pairs.pyx or of their Numba twin
CudaTiles   by those of csrc/pairs.cu, which are ops:
    neglog::pairs_tile            merges a tile into the states
    neglog::pairs_tile_backward   writes the gradient of its scores
    neglog::pairs_tile_sigmoid    adds to its rows' losses by sigmoids, writes their gradient
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from neglog import dispatch, kernels
from neglog.kernels.threads import allowed
from neglog.ops.nll import DTYPE_CODES, library, real_dtype

_TILE = (
    "Tensor similarity, Tensor scale, Tensor? bias, Tensor? positive, Tensor? excluded, "
    "Tensor? query_group, Tensor? key_group, int first_column"
)
SCHEMAS = (
    f"pairs_tile({_TILE}, Tensor(a!) row_maximum, Tensor(b!) row_sum, "
    "Tensor(c!)? column_maximum, Tensor(d!)? column_sum, Tensor(e!)? score) -> ()",
    f"pairs_tile_backward({_TILE}, Tensor row_lse, Tensor row_low, Tensor row_grad, "
    "Tensor? row_hard, Tensor? column_lse, Tensor? column_low, Tensor? column_grad, "
    "Tensor? column_hard, Tensor? grad_score, Tensor(a!) out) -> ()",
    f"pairs_tile_sigmoid({_TILE}, Tensor(a!) loss, Tensor(b!) slopes, Tensor(c!) out) -> ()",
)
for _schema in SCHEMAS:
    library.define(_schema)

# Scores up to this size need no maximum: e^40 and the sum of a billion of them are float32's.
BOUNDED = {torch.float32: 40.0, torch.float64: 300.0}


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


class States:
    """Maximum and sum of rows or columns; the maximum is 0 where none is needed."""

    def __init__(self, count: int, like: Tensor, bounded: bool) -> None:
        start = 0.0 if bounded else -torch.inf
        self.maximum = like.new_full((count,), start, dtype=real_dtype(like.dtype))
        self.sum = like.new_zeros(count, dtype=torch.float64)

    def finish(self) -> tuple[Tensor, Tensor]:
        """The log-sum-exp as the unevaluated sum of two numbers."""
        lse = self.maximum.double() + self.sum.log()
        high = lse.to(self.maximum.dtype)
        return high, (lse - high).nan_to_num(0.0).to(high.dtype)


class Marginal(NamedTuple):
    """What flows in by the log-sum-exps of rows or columns; see the kernel's struct."""

    lse: Tensor
    low: Tensor
    grad: Tensor
    hard: Tensor | None

    def addresses(self, at: int, rows: int) -> tuple[int, ...]:
        parts = (address(part, at) for part in self[:3])
        return (*parts, address(self.hard, rows))

    def parts(self, at: slice, rows: slice) -> tuple[Tensor | None, ...]:
        return (*(part[at] for part in self[:3]), None if self.hard is None else self.hard[rows])


class Upstream(NamedTuple):
    """The five gradients that flow in, for unit size: divided by `size`."""

    row: Marginal
    column: Marginal | None
    score: Tensor | None
    size: float | Tensor


# The CPU's kernels


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
    return kernels.load("pairs", backend or None)


class CpuTiles:
    """By kernels that are given addresses."""

    def __init__(self, op: str, pairs: Pairs, bounded: bool | None = None) -> None:
        self.pairs = pairs
        self.bounded = pairs.bounded() if bounded is None else bounded
        self._kernel = load_kernel(op, pairs.backend)
        self._threads = allowed(torch.get_num_threads())

    def forward(
        self, similarity: Tensor, down: slice, across: slice, rows: States,
        columns: States | None, score: Tensor | None,
    ) -> None:  # fmt: skip
        """Merge a tile into the states of its rows and columns; note its positives' scores."""
        self._kernel.forward(
            tile_arguments(self.pairs, similarity, down, across, self.bounded),
            address(rows.maximum, down.start), address(rows.sum, down.start),
            0 if columns is None else address(columns.maximum, across.start),
            0 if columns is None else address(columns.sum, across.start),
            address(score, down.start), self._threads,
        )  # fmt: skip

    def backward(
        self, similarity: Tensor, down: slice, across: slice, up: Upstream, out: Tensor
    ) -> None:
        """Write the gradient of a tile's scores; `out` may be where the similarities lie."""
        self._kernel.backward(
            tile_arguments(self.pairs, similarity, down, across, self.bounded),
            up.row.addresses(down.start, down.start),
            (0, 0, 0, 0) if up.column is None else up.column.addresses(across.start, down.start),
            address(up.score, down.start), out.data_ptr(), out.stride(0), self._threads,
        )  # fmt: skip

    def sigmoid(
        self, similarity: Tensor, down: slice, across: slice, loss: Tensor, slopes: Tensor
    ) -> None:
        """Add the rows' losses by sigmoids, and the sums of their gradients, to doubles; write the
        gradient over the similarities."""
        self._kernel.sigmoid(
            tile_arguments(self.pairs, similarity, down, across, self.bounded), 1.0,
            address(loss, down.start), address(slopes, down.start), similarity.data_ptr(),
            similarity.stride(0), self._threads,
        )  # fmt: skip


# CUDA's


class CudaTiles:
    """By ops, which find the device and its stream; nothing waits for them."""

    bounded = False  # to know it would be to wait
    ops = torch.ops.neglog

    def __init__(self, op: str, pairs: Pairs, bounded: bool | None = None) -> None:
        self.pairs = pairs
        dispatch.ran(op, "cuda")

    def _tile(self, similarity: Tensor, down: slice, across: slice) -> tuple:
        def part(x: Tensor | None, at: slice) -> Tensor | None:
            return x if x is None or x.dim() == 0 else x[at]

        pairs = self.pairs
        return (
            similarity, part(pairs.scale, down), part(pairs.bias, across),
            part(pairs.positive, down), part(pairs.excluded, down), part(pairs.query_group, down),
            part(pairs.key_group, across), across.start,
        )  # fmt: skip

    def forward(
        self, similarity: Tensor, down: slice, across: slice, rows: States,
        columns: States | None, score: Tensor | None,
    ) -> None:  # fmt: skip
        self.ops.pairs_tile(
            *self._tile(similarity, down, across), rows.maximum[down], rows.sum[down],
            None if columns is None else columns.maximum[across],
            None if columns is None else columns.sum[across],
            None if score is None else score[down],
        )  # fmt: skip

    def backward(
        self, similarity: Tensor, down: slice, across: slice, up: Upstream, out: Tensor
    ) -> None:
        nothing = (None, None, None, None)
        self.ops.pairs_tile_backward(
            *self._tile(similarity, down, across), *up.row.parts(down, down),
            *(nothing if up.column is None else up.column.parts(across, down)),
            None if up.score is None else up.score[down], out,
        )  # fmt: skip

    def sigmoid(
        self, similarity: Tensor, down: slice, across: slice, loss: Tensor, slopes: Tensor
    ) -> None:
        self.ops.pairs_tile_sigmoid(
            *self._tile(similarity, down, across), loss[down], slopes[down], similarity
        )


Tiles: TypeAlias = type[CpuTiles] | type[CudaTiles]
