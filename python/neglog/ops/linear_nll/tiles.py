"""Tiles of logits, and the gradients that they add up to: on every device the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from neglog.ops.dtypes import divides_late, real_dtype
from neglog.ops.memory import contiguous, new_gradient, new_rows
from neglog.ops.nll.formula import counted_rows
from neglog.tiles import gemm, plan

NARROW = (False, False, False)
# The share of columns below which copying them out costs less than multiplying the others.
WORTH_A_COPY = 0.8


class Head(NamedTuple):
    """The projection to the vocabulary, and what is projected."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    def contiguous(self, *names: str) -> Head:
        """names: of the parts, for errors, if they are other than linear_nll's."""
        names = names or ("input", "linear_weight", "linear_bias")
        parts = zip(self, names, strict=True)
        return Head(*(None if x is None else contiguous(x, name) for x, name in parts))  # type: ignore[arg-type]


class Tile(NamedTuple):
    """Some rows: which of the counted ones, which of all, their input, target, token_weight and
    logits."""

    part: slice
    rows: Tensor | slice
    input: Tensor
    target: Tensor
    token_weight: Tensor | None
    logits: Tensor


class Tiles:
    """The rows that count, tile by tile, over a workspace that holds the logits of one."""

    def __init__(
        self, head: Head, target: Tensor, token_weight: Tensor | None, ignore_index: int,
        workspace: int, dtype: torch.dtype, learns: bool, compact: bool = True, wide: bool = False,
        columns: int | None = None, beside: int = 0,
    ) -> None:  # fmt: skip
        """target (N,) or (N, V), token_weight (N,). dtype: of the logits. learns: the weight's
        gradient is wanted; wide: in the accumulation dtype. Not compact: rows that do not count
        stay, as 0. columns: of a weight that is shared out to processes, the most of any. Then a
        tile has as many rows in all of them: it depends neither on this one's columns nor on
        `dtype`, which each finds out by itself. beside: bytes for each row that lie in the
        workspace beside its logits.

        single: one tile, whose product is rounded to the weight's gradient, with no wider sum
        beside it.
        """
        self.head, self.target, self.token_weight = head, target, token_weight
        self.count = len(target)
        self.kept = self.rows = None
        counted = counted_rows(target, token_weight, ignore_index)
        if counted is not None and not compact:
            self.kept = counted[:, None]
        elif counted is not None:
            rows = counted.nonzero().squeeze(1)
            if len(rows) != self.count:
                self.rows, self.count = rows, len(rows)
        itemsize = dtype.itemsize if columns is None else real_dtype(head.input.dtype).itemsize
        row_bytes = plan.row_stride(head.vocab if columns is None else columns, itemsize) * itemsize
        row_bytes += beside
        self.height = plan.rows_per_tile(self.count, row_bytes, workspace)
        self.single = dtype == head.weight.dtype and not divides_late(head.input.dtype) and not wide
        # A single tile may have the memory of the sum that it makes needless.
        spared = head.weight.numel() * real_dtype(dtype).itemsize if dtype.itemsize == 2 else 0
        fits = self.count * row_bytes <= workspace + spared
        if self.single and learns and columns is None and fits:
            self.height = self.count
        self.single = self.single and self.count <= self.height
        self.logits = new_rows(self.height, head.vocab, head.input, dtype)

    def __iter__(self) -> Iterator[Tile]:
        for part in plan.row_tiles(self.count, self.height):
            rows = part if self.rows is None else self.rows[part]
            x = self.head.input[rows]
            if self.kept is not None:  # what does not count may be NaN
                x = torch.where(self.kept[part], x, 0)
            logits = self.logits[: x.shape[0]]
            gemm.linear(x, self.head.weight, self.head.bias, logits)
            of_rows = None if self.token_weight is None else self.token_weight[rows]
            target = self.target[rows]
            if target.dim() == 2:
                target = target.to(logits.dtype)
            yield Tile(part, rows, x, target, of_rows, logits)

    def of_counted(self, of_all: Tensor) -> Tensor:
        """Of numbers of all rows, those of the counted ones."""
        return of_all if self.rows is None else of_all[self.rows]

    def among_all(self, of_counted: Tensor, rows: int) -> Tensor:
        """Numbers of the counted rows among all rows; 0 for the others."""
        if self.kept is not None:
            return of_counted.masked_fill(~self.kept.squeeze(1), 0)
        if self.rows is None:
            return of_counted
        return of_counted.new_zeros(rows).index_copy_(0, self.rows, of_counted)


class Gradients:
    """What the tiles add up to. Those not wanted stay empty.

    wide: which are wanted in the accumulation dtype, as parameters are that autocast rounded.
    """

    def __init__(
        self, tiles: Tiles, wanted: Sequence[bool], filter_eps: float,
        wide: Sequence[bool] = NARROW,
    ) -> None:  # fmt: skip
        head = tiles.head
        real = real_dtype(head.input.dtype)
        new = head.input.new_zeros
        self.dtypes = [real if it else head.input.dtype for it in wide]
        self.input = new(head.input.shape if wanted[0] else 0, dtype=self.dtypes[0])
        self.weight = new_gradient(
            head.weight.shape if wanted[1] else (0,), head.weight, None if tiles.single else real
        )
        self.bias = new(head.vocab if wanted[2] else 0, dtype=real)
        self.head_weight = head.weight
        self.wanted = wanted
        self.filter_eps = filter_eps
        self._first = True

    def add(self, tile: Tile, s: Tensor, upstream: float | Tensor) -> None:
        """A tile: s is the gradient of its logits, upstream the largest of a row's loss."""
        weight = self.head_weight
        if self.wanted[2]:
            self.bias += s.sum(0, dtype=self.bias.dtype)
        columns = self._columns_that_count(s, upstream)
        if columns is not None:
            s, weight = s[:, columns], weight[columns]
        if self.wanted[0] and isinstance(tile.rows, slice):
            gemm.product(s, weight, self.input[tile.rows])
        elif self.wanted[0]:
            part = torch.empty_like(tile.input, dtype=self.dtypes[0])
            gemm.product(s, weight, part)
            self.input[tile.rows] = part
        if self.wanted[1] and columns is None:
            gemm.add_outer(s, tile.input, self.weight, self._first)
        elif self.wanted[1]:
            self._add_to_columns(columns, s, tile.input)
        self._first = False

    def _add_to_columns(self, columns: Tensor | None, s: Tensor, x: Tensor) -> None:
        assert columns is not None
        if self._first:
            self.weight.zero_()
        part = self.weight.new_empty(len(columns), x.shape[1])
        gemm.add_outer(s, x, part, True)
        self.weight.index_add_(0, columns, part)

    def _columns_that_count(self, s: Tensor, upstream: float | Tensor) -> Tensor | None:
        """Those with a gradient of at least filter_eps times the upstream; None for all."""
        if not self.filter_eps:
            return None
        largest = torch.maximum(s.amax(0), -s.amin(0))  # twice as fast as abs().amax(0)
        columns = (~(largest < self.filter_eps * upstream)).nonzero().squeeze(1)  # NaN counts
        return columns if len(columns) < WORTH_A_COPY * len(largest) else None

    def finished(self, late: bool) -> tuple[Tensor, Tensor, Tensor]:
        """In the dtype of the parameters, but for float16, whose division comes later."""
        if self._first:  # no tile: nothing was written over what the memory held
            self.weight.zero_()
        if late:
            return self.input, self.weight, self.bias
        return self.input, self.weight.to(self.dtypes[1]), self.bias.to(self.dtypes[2])
