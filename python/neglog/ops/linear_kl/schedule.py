"""The schedule of linear_kl, one for the CPU and CUDA: as that of linear_nll, whose tiles it takes.

A tile of the student's logits lies beside the same rows of the teacher: a slice of what is given,
or logits of its hidden states, made in a workspace of their own. The kernel of kl turns the
student's into their gradient where they lie. With hidden states on both sides there are 4 matmuls:
two of scores, and the student's two gradients; with reduction "none" 6, as the backward makes both
scores again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from neglog import availability
from neglog.ops.dtypes import divides_late, real_dtype
from neglog.ops.kl import cpu, cuda
from neglog.ops.kl import schema as of_rows
from neglog.ops.kl.schema import Options
from neglog.ops.linear_kl import schema
from neglog.ops.linear_nll.schedule import ROWS, nothing_formed, times_upstream
from neglog.ops.linear_nll.tiles import NARROW, Gradients, Head, Tile, Tiles
from neglog.ops.memory import aligned, contiguous, new_rows
from neglog.ops.nll.schema import MEAN, NONE
from neglog.tiles import gemm, plan

# run(arguments, grad, gradient, rows of the call) -> losses, divergences, cross-entropies
RUN: dict[str, Callable[..., tuple[Tensor, ...]]] = {"cpu": cpu.run_rows, "cuda": cuda.run_rows}


class _Teacher:
    """The teacher's numbers for a tile of rows."""

    def __init__(self, a: Any) -> None:
        self._a, self._head = a, None
        if a.teacher_weight is not None:
            head = Head(a.teacher, a.teacher_weight, a.teacher_bias)
            self._head = head.contiguous("teacher", "teacher_weight", "teacher_bias")
            alike = a.teacher.dtype == a.input.dtype
            self._dtype = a.tile_dtype if alike else gemm.tile_dtype(a.teacher)

    def row_bytes(self) -> int:
        """Of the logits that it makes."""
        if self._head is None:
            return 0
        return plan.row_stride(self._head.vocab, self._dtype.itemsize) * self._dtype.itemsize

    def make_room(self, height: int) -> None:
        if self._head is not None:
            self._logits = new_rows(height, self._head.vocab, self._head.input, self._dtype)

    def of(self, tile: Tile, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Its numbers and ids. kept: as in Tiles, what counts where other rows stay."""
        ids = None if self._a.ids is None else self._a.ids[tile.rows]
        if self._head is None:
            return self._a.teacher[tile.rows], ids
        x = self._head.input[tile.rows]
        if kept is not None:  # what does not count may be NaN
            x = torch.where(kept[tile.part], x, 0)
        logits = self._logits[: x.shape[0]]
        gemm.linear(x, self._head.weight, self._head.bias, logits)
        return logits, ids


class _Rows:
    """Losses and parts of the counted rows, a tile at a time."""

    def __init__(self, op: str, a: Any, wide: bool) -> None:
        device = a.input.device
        a = a._replace(target=contiguous(a.target, "target"))
        head = Head(a.input, a.linear_weight, a.linear_bias).contiguous()
        self._teacher = _Teacher(a)
        self.tiles = Tiles(
            head, a.target, a.token_weight, a.ignore_index, a.workspace, a.tile_dtype, a.wanted[1],
            ROWS[device.type].compacts(device), wide, beside=self._teacher.row_bytes(),
        )  # fmt: skip
        self._teacher.make_room(self.tiles.height)
        self._a, self._run, self._options = a, RUN[device.type], Options.of(a)
        self._found: list[tuple[Tensor, ...]] = []
        availability.ran(op, "cuda" if device.type == "cuda" else a.backend)

    def run(self, tile: Tile, grad: Tensor | None = None, forms: bool = True) -> Tensor:
        """With `forms` the gradient of the logits for the upstream grad () or (n,), where they
        lay."""
        teacher, ids = self._teacher.of(tile, self.tiles.kept)
        given = of_rows.forward.Arguments(
            tile.logits, teacher, ids, tile.target, tile.token_weight, None, NONE, *self._options,
            self._a.backend,
        )  # fmt: skip
        self._found.append(self._run(given, grad, tile.logits if forms else None, tile.rows))
        return tile.logits

    def divisor(self) -> Tensor:
        """Of the mean, as a tensor ()."""
        a, vocab = self._a, self.tiles.head.vocab
        find = cpu.total_weight_of if a.input.is_cpu else cuda.total_weight_of
        given = (a.target, a.token_weight, a.ignore_index, vocab, a.input.dtype, a.backend)
        total = find(*given)  # in any case: on the CPU it checks that targets are in range
        return total if a.num_items is None else a.num_items

    def results(self) -> tuple[Tensor, ...]:
        """Losses, divergences, cross-entropies among all rows."""
        none = self._a.input.new_empty(0, dtype=real_dtype(self._a.input.dtype))
        parts = zip(*self._found, strict=True) if self._found else [(none,)] * 3
        count = len(self._a.target)
        return tuple(self.tiles.among_all(torch.cat(part), count) for part in parts)


def forward(a: Any, wide: Sequence[bool] = NARROW) -> tuple[Tensor, ...]:
    """As the op. wide: which gradients are wanted in the accumulation dtype."""
    rows = _Rows("linear_kl", a, wide[1])
    divisor, late = rows.divisor(), divides_late(a.input.dtype)
    upstream = torch.ones_like(divisor)
    if a.reduction == MEAN and late:  # by 0 at once: an ignored row's 0 must not become 0 / 0 later
        upstream = torch.where(divisor == 0, 1 / divisor, upstream)
    elif a.reduction == MEAN:
        upstream = 1 / divisor
    gradients = Gradients(rows.tiles, a.wanted, a.filter_eps, wide) if any(a.wanted) else None
    for tile in rows.tiles:
        s = rows.run(tile, upstream, gradients is not None)
        if gradients is not None:
            gradients.add(tile, s, upstream)
    loss, *parts = rows.results()
    if a.reduction != NONE:
        total = loss.sum(dtype=torch.float64)
        loss = (total / divisor if a.reduction == MEAN else total).to(loss.dtype)
    formed = nothing_formed(a.input) if gradients is None else gradients.finished(late)
    return loss, divisor.clone(), *parts, *formed


def backward(a: Any) -> tuple[Tensor, ...]:
    """As the op: what the forward formed, times the upstream, or formed anew."""
    formed = times_upstream(a, a.total_weight)
    if formed is not None:
        return formed
    rows = _Rows("linear_kl_backward", a, False)
    upstream = aligned(a.grad_loss, "grad_loss")
    upstream = upstream / a.total_weight if a.reduction == MEAN else upstream
    upstream = upstream.expand(len(a.target))
    largest = upstream.abs().amax() if len(upstream) else 0.0
    gradients = Gradients(rows.tiles, a.wanted, a.filter_eps)
    for tile in rows.tiles:
        gradients.add(tile, rows.run(tile, upstream[tile.rows]), largest)
    return gradients.finished(False)


for _device in RUN:
    schema.forward.implement(_device, forward)
    schema.backward.implement(_device, backward)
