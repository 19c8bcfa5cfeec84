"""A tile of linear_nll on CUDA, by the ops nll and nll_ of csrc/nll/nll.cu.

The divisor stays on the device. What makes the host wait is the number of rows that count, which
the matmuls must know, and the columns that filter_eps leaves. While a graph is captured the host
cannot wait: all rows are multiplied then, and filter_eps is an error of CUDA's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neglog import availability, torch_state
from neglog.ops.dtypes import divides_late, real_dtype
from neglog.ops.linear_nll.tiles import Tile, Tiles
from neglog.ops.nll import formula
from neglog.ops.nll.schema import MEAN, NONE, Options

ops = torch.ops.neglog


class CudaRows:
    """Loss and statistics of the counted rows, a tile at a time."""

    def __init__(self, op: str, a: Any, tiles: Tiles) -> None:
        self.a, self.options = a, Options.of(a)
        self.real = real_dtype(a.input.dtype)
        self._found: list[tuple[Tensor, ...]] = []
        availability.ran(op, "cuda")

    @staticmethod
    def compacts(device: torch.device) -> bool:
        return not torch_state.capturing(device)

    def begin(self) -> None:
        a = self.a
        self._divisor = a.num_items
        if self._divisor is None:
            counted = formula.counted_rows(a.target, a.token_weight, a.ignore_index)
            given = (a.target, counted, a.weight, self.real, a.token_weight)
            self._divisor = formula.total_weight(*given)
        late = divides_late(a.input.dtype)
        self.largest = 1 / self._divisor if a.reduction == MEAN and not late else 1.0

    def forward(self, tile: Tile) -> None:
        loss, lse, _, _, *stats = ops.nll(*self._given(tile))
        self._found.append((loss.reshape(-1), lse, *stats))

    def forward_backward(self, tile: Tile) -> Tensor:
        """The gradient of the logits, where they lay; of a mean, that of the tile's sum over the
        divisor of all rows."""
        loss, lse, _, *stats = ops.nll_(*self._given(tile))
        self._found.append((loss.reshape(-1), lse, *stats))
        return tile.logits

    def backward(
        self, tile: Tile, grad_loss: Tensor, grad_lse: Tensor | None, grad_entropy: Tensor | None
    ) -> Tensor:
        of_rows = self.options._replace(reduction=NONE)
        given = (tile.logits, tile.target, self.a.weight, tile.token_weight)
        stats = grad_entropy is not None
        _, lse, lse_low, one, _, entropy, _ = ops.nll(*given, None, *of_rows, stats, "")
        upstream = (grad_loss, grad_lse, grad_entropy)
        grads = (None if g is None else g[tile.rows] for g in upstream)
        return ops.nll_backward(*grads, *given, lse, lse_low, entropy, one, *of_rows, "")

    def results(self) -> tuple[Tensor, ...]:
        """Loss () or of the counted rows, lse, total_weight, correct, entropy, argmax."""
        a = self.a
        none = a.input.new_empty(0, dtype=self.real)
        parts = zip(*self._found, strict=True)
        nothing = (none, none, none.bool(), none, none.long())
        loss, lse, *stats = map(torch.cat, parts) if self._found else nothing
        if a.reduction != NONE:
            loss = loss.sum(dtype=torch.float64).to(self.real)
            if not self._found and a.reduction == MEAN:
                loss = loss / self._divisor
        return loss, lse, self._divisor.clone(), *stats

    def _given(self, tile: Tile) -> tuple:
        return (
            tile.logits, tile.target, self.a.weight, tile.token_weight, self._divisor,
            *self.options, self.a.stats, "",
        )  # fmt: skip
