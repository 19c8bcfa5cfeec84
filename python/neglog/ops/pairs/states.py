"""The state of log-sum-exps that tiles are merged into."""

from __future__ import annotations

import torch
from torch import Tensor

from neglog.ops.dtypes import real_dtype


class States:
    """Maximum and sum of rows or columns; the maximum is 0 where none is needed."""

    def __init__(self, maximum: Tensor, total: Tensor) -> None:
        self.maximum, self.sum = maximum, total

    @classmethod
    def of_both(cls, shape: tuple[int, int], like: Tensor, bounded: bool) -> tuple[States, States]:
        """Of all rows and of all columns, in one memory."""
        start, rows = 0.0 if bounded else -torch.inf, shape[0]
        maximum = like.new_full((sum(shape),), start, dtype=real_dtype(like.dtype))
        total = like.new_zeros(sum(shape), dtype=torch.float64)
        return cls(maximum[:rows], total[:rows]), cls(maximum[rows:], total[rows:])

    def finish(self) -> tuple[Tensor, Tensor]:
        """The log-sum-exp as the unevaluated sum of two numbers."""
        lse = self.sum.log().add_(self.maximum)
        high = lse.to(self.maximum.dtype)
        return high, (lse - high).nan_to_num_(0.0).to(high.dtype)
