"""The state of log-sum-exps that tiles are merged into."""

from __future__ import annotations

import torch
from torch import Tensor

from neglog.ops.dtypes import real_dtype


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
