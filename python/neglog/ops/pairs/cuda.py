"""A tile of pairs on CUDA: the ops of csrc/pairs/pairs.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from neglog import availability
from neglog.ops.pairs.schema import Pairs, Upstream
from neglog.ops.pairs.states import States


class CudaTiles:
    """By ops, which find the device and its stream; nothing waits for them."""

    bounded = False  # to know it would be to wait
    ops = torch.ops.neglog

    def __init__(self, op: str, pairs: Pairs, bounded: bool | None = None) -> None:
        self.pairs = pairs
        availability.ran(op, "cuda")

    def forward(
        self, similarity: Tensor, down: slice, across: slice, rows: States,
        columns: States | None, positive_score: Tensor | None,
    ) -> None:  # fmt: skip
        self.ops.pairs_tile(
            *self._tile(similarity, down, across), rows.maximum[down], rows.sum[down],
            None if columns is None else columns.maximum[across],
            None if columns is None else columns.sum[across],
            None if positive_score is None else positive_score[down],
        )  # fmt: skip

    def backward(
        self, similarity: Tensor, down: slice, across: slice, up: Upstream, out: Tensor
    ) -> None:
        self.ops.pairs_tile_backward(
            *self._tile(similarity, down, across), *up.row.parts(down, down),
            *([None] * 4 if up.column is None else up.column.parts(across, down)),
            None if up.positive_score is None else up.positive_score[down], out,
        )  # fmt: skip

    def sigmoid(
        self, similarity: Tensor, down: slice, across: slice, loss: Tensor, slopes: Tensor
    ) -> None:
        self.ops.pairs_tile_sigmoid(
            *self._tile(similarity, down, across), loss[down], slopes[down], similarity
        )

    def _tile(self, similarity: Tensor, down: slice, across: slice) -> tuple:
        def part(x: Tensor | None, at: slice) -> Tensor | None:
            return x if x is None or x.dim() == 0 else x[at]

        pairs = self.pairs
        return (
            similarity, part(pairs.scale, down), part(pairs.bias, across),
            part(pairs.positive, down), part(pairs.excluded, down), part(pairs.query_group, down),
            part(pairs.key_group, across), across.start,
        )  # fmt: skip
