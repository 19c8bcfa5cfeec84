"""Embeddings of all processes of a group, with their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import Function, once_differentiable


class _Gather(Function):
    """(N, D) of each process to (processes * N, D), and the sum of their gradients back."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.rows = group, len(x)
        parts = [torch.empty_like(x) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(parts, x.contiguous(), group)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        total = grad.clone()
        distributed.all_reduce(total, group=ctx.group)
        start = distributed.get_rank(ctx.group) * ctx.rows
        return total[start : start + ctx.rows], None


def gathered(x: Tensor, group: Any) -> tuple[Tensor, int]:
    """The embeddings (N, D) of all processes, by rank, and the row at which this process's begin.

    Each process's gradient of the whole comes back to whom the rows belong, summed.

    Raises RuntimeError if the processes do not have one shape: torch would wait or read past ends.
    """
    mine = torch.tensor(x.shape, device=x.device)
    shapes = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(shapes, mine, group)
    found = [shape.tolist() for shape in shapes]
    if any(shape != found[0] for shape in found):
        raise RuntimeError(f"group: expected one shape of embeddings in all processes, got {found}")
    return _Gather.apply(x, group), distributed.get_rank(group) * len(x)
