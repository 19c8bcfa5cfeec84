"""The upstream that the next backward is expected to have: that of the last one.

A gradient that is formed in the forward, while its row is in cache, costs no second read of the
logits: one pass takes 0.6 of the time of two. But it is a multiple of the upstream, which comes
later. This is nearly always that of the step before: 1, 1 / accumulation, a loss scale. So calls
that are alike, by shape, dtype and reduction, share a record of the last one.

A gradient that is formed for nothing costs what it saves otherwise. So after two forwards without a
backward of the upstream expected no more are formed, until a backward has the upstream of the one
before it. That ends it in an evaluation with grad mode on, and where a loss has another weight at
each step. And where many losses have one backward, two gradients at most wait for it.

Batches of language models have new shapes all the time. A shape that was not seen yet begins with
the last upstream of any shape, and with the misses of other shapes at their beginning.

Records decide when a gradient is formed, and not its bits: threads may write to them at once.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch

from neglog import settings

KEPT = 256


class Record:
    """Of calls that are alike: the last upstream, and the forwards since a backward that had the
    one expected."""

    __slots__ = ("any_shape", "misses", "new_shape", "upstream")

    def __init__(self, any_shape: Record | None = None) -> None:
        """any_shape: the record of all shapes together, whose misses are those of new shapes."""
        self.any_shape = self.new_shape = any_shape
        self.misses: int = 0 if any_shape is None else any_shape.misses
        self.upstream: float = 1.0 if any_shape is None else any_shape.upstream

    def forward(self) -> float | None:
        """Count a forward; the upstream to form its gradient for, or None."""
        expected = self.upstream if self.misses < settings.patience else None
        self.misses += 1
        if self.new_shape is not None:
            self.new_shape.misses += 1
        return expected

    def backward(self, upstream: float) -> None:
        if upstream == self.upstream:
            self.misses = 0
        elif upstream:  # 0 equals -0, whose gradient has other signs
            self.upstream = upstream
        if self.new_shape is not None:
            self.new_shape.backward(upstream)
            self.new_shape = None
        elif self.any_shape is not None:
            self.any_shape.upstream = self.upstream


@lru_cache(KEPT)
def record(shape: torch.Size, dtype: torch.dtype, reduction: int) -> Record:
    return Record(_any_shape(dtype, reduction))


@cache
def _any_shape(dtype: torch.dtype, reduction: int) -> Record:
    return Record()


def forget() -> None:
    """All upstreams, as in a new process."""
    record.cache_clear()
    _any_shape.cache_clear()
