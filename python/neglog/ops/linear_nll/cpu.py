"""A tile of linear_nll on the CPU, by the kernels of nll."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neglog.kernels.threads import allowed
from neglog.ops.dtypes import DTYPE_CODES, divides_late, number, quotient, real_dtype, rounded
from neglog.ops.linear_nll.tiles import Tile, Tiles
from neglog.ops.memory import address, contiguous
from neglog.ops.nll import cpu as nll_cpu
from neglog.ops.nll.schema import MEAN, NONE


class CpuRows:
    """Loss and statistics of the counted rows, a tile at a time."""

    def __init__(self, op: str, a: Any, tiles: Tiles) -> None:
        self.a, self.tiles = a, tiles
        self._kernel = nll_cpu.load_kernel(op, a.backend)
        self._threads = allowed(torch.get_num_threads())
        count, real = tiles.count, real_dtype(a.input.dtype)
        new = a.input.new_empty
        self.loss, self.lse, self.lse_low = (new(count, dtype=real) for _ in range(3))
        stats, through_entropy = getattr(a, "stats", False), getattr(a, "grad_entropy", None)
        self.correct = new(count, dtype=torch.bool) if stats else None
        self.entropy = new(count, dtype=real) if stats or through_entropy is not None else None
        self.argmax = new(count, dtype=torch.int64) if stats else None

    @staticmethod
    def compacts(device: torch.device) -> bool:
        """Whether rows that do not count may be left out: their number is asked for."""
        return True

    def begin(self) -> None:
        """Find the divisor of the mean and what the gradients are formed for."""
        a = self.a
        of_class = a.target.dim() == 1
        index, probabilities = (a.target, None) if of_class else (None, a.target)
        # Formed in any case: it checks that targets are in range.
        total = self._kernel.total_weight(
            len(a.target), self.tiles.head.vocab, address(index), address(probabilities),
            address(a.weight), address(a.token_weight), a.ignore_index,
            DTYPE_CODES[a.input.dtype],
        )  # fmt: skip
        total = rounded(total, real_dtype(a.input.dtype))
        self._divisor = total if a.num_items is None else float(a.num_items)
        late = divides_late(a.input.dtype) and self._divisor
        self.largest = quotient(1.0, self._divisor) if a.reduction == MEAN and not late else 1.0

    def forward(self, tile: Tile) -> None:
        self._kernel.forward(*self._problem(tile), *self._outputs(tile), self._threads)

    def forward_backward(self, tile: Tile) -> Tensor:
        """The gradient of the logits, where they lay, for an upstream of `largest`."""
        self._kernel.forward_backward(
            *self._problem(tile), *self._outputs(tile), self.largest,
            tile.logits.data_ptr(), tile.logits.stride(0), self._threads,
        )  # fmt: skip
        return tile.logits

    def backward(
        self, tile: Tile, grad_loss: Tensor, grad_lse: Tensor | None, grad_entropy: Tensor | None
    ) -> Tensor:
        """The gradient of the logits, where they lay."""
        self.forward(tile)
        grad = contiguous(grad_loss[tile.rows], "grad_loss")
        through_lse, through_entropy = (
            None if g is None else contiguous(g[tile.rows], name)
            for name, g in (("grad_lse", grad_lse), ("grad_entropy", grad_entropy))
        )
        _, lse, lse_low, _, entropy, _ = self._outputs(tile)
        self._kernel.backward(
            *self._problem(tile), lse, lse_low, address(grad), 1, 1.0, address(through_lse),
            address(through_entropy), entropy, tile.logits.data_ptr(), tile.logits.stride(0),
            self._threads,
        )  # fmt: skip
        return tile.logits

    def results(self) -> tuple[Any, ...]:
        """Loss () or of the counted rows, lse, total_weight, correct, entropy, argmax."""
        reduction, loss = self.a.reduction, self.loss
        if reduction != NONE:
            total = float(loss.sum(dtype=torch.float64))
            value = quotient(total, self._divisor) if reduction == MEAN else total
            loss = number(value, loss.dtype)
        total_weight = number(self._divisor, loss.dtype)
        return loss, self.lse, total_weight, self.correct, self.entropy, self.argmax

    def _problem(self, tile: Tile) -> tuple:
        given = (tile.logits, tile.target, self.a.weight, tile.token_weight)
        return nll_cpu.problem(*given, self.a)

    def _outputs(self, tile: Tile) -> tuple[int, ...]:
        stats = (self.correct, self.entropy, self.argmax)
        numbers = (self.loss, self.lse, self.lse_low, *stats)
        return tuple(address(x, tile.part.start) for x in numbers)
