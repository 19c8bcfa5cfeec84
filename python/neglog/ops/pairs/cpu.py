"""A tile of pairs on the CPU: the addresses that the kernels of kernels/cython/pairs.pyx want."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neglog import availability, kernels
from neglog.kernels.threads import allowed
from neglog.ops.dtypes import DTYPE_CODES
from neglog.ops.memory import address
from neglog.ops.pairs.schema import Marginal, Pairs, Upstream
from neglog.ops.pairs.states import States


def _step(tensor: Tensor | None) -> int:
    """Between the numbers of a vector; 0 where one number stands for all."""
    return int(tensor is not None and tensor.dim() == 1)


def _marginal(given: Marginal | None, at: int, rows: int) -> tuple[int, int, int, int]:
    if given is None:
        return 0, 0, 0, 0
    lse, low, softmax_weight, target_weight = given
    return (
        address(lse, at), address(low, at), address(softmax_weight, at),
        address(target_weight, rows),
    )  # fmt: skip


class CpuTiles:
    """By kernels that are given addresses."""

    def __init__(self, op: str, pairs: Pairs, bounded: bool | None = None) -> None:
        self.pairs = pairs
        self.bounded = pairs.bounded() if bounded is None else bounded
        availability.ran(op, pairs.backend)
        self._kernel: Any = kernels.load("pairs", pairs.backend or None)
        self._threads = allowed(torch.get_num_threads())

    def forward(
        self, similarity: Tensor, down: slice, across: slice, rows: States,
        columns: States | None, positive_score: Tensor | None,
    ) -> None:  # fmt: skip
        """Merge a tile into the states of its rows and columns; note its positives' scores."""
        self._kernel.forward(
            self._tile(similarity, down, across),
            address(rows.maximum, down.start), address(rows.sum, down.start),
            0 if columns is None else address(columns.maximum, across.start),
            0 if columns is None else address(columns.sum, across.start),
            address(positive_score, down.start), self._threads,
        )  # fmt: skip

    def backward(
        self, similarity: Tensor, down: slice, across: slice, up: Upstream, out: Tensor
    ) -> None:
        """Write the gradient of a tile's scores; `out` may be where the similarities lie."""
        self._kernel.backward(
            self._tile(similarity, down, across), _marginal(up.row, down.start, down.start),
            _marginal(up.column, across.start, down.start),
            address(up.positive_score, down.start), out.data_ptr(), out.stride(0), self._threads,
        )  # fmt: skip

    def sigmoid(
        self, similarity: Tensor, down: slice, across: slice, loss: Tensor, slopes: Tensor
    ) -> None:
        """Add the rows' losses by sigmoids, and the sums of their gradients, to doubles; write the
        gradient over the similarities."""
        self._kernel.sigmoid(
            self._tile(similarity, down, across), 1.0, address(loss, down.start),
            address(slopes, down.start), similarity.data_ptr(), similarity.stride(0),
            self._threads,
        )  # fmt: skip

    def _tile(self, similarity: Tensor, rows: slice, columns: slice) -> tuple:
        """The `tile` of the kernels."""
        pairs, i, j = self.pairs, rows.start, columns.start
        by_row, by_column = _step(pairs.scale), _step(pairs.bias)
        return (
            DTYPE_CODES[similarity.dtype], *similarity.shape, j,
            similarity.data_ptr(), similarity.stride(0),
            address(pairs.scale, i * by_row), by_row,
            address(pairs.bias, j * by_column), by_column,
            address(pairs.positive, i), address(pairs.excluded, i),
            address(pairs.query_group, i), address(pairs.key_group, j), self.bounded,
        )  # fmt: skip
