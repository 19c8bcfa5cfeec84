"""Embeddings of all processes of a group, with their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import Function


class _Gather(Function):
    """(N, D) of each process to (processes * N, D)."""

    @staticmethod
    def forward(x, group):
        parts = [torch.empty_like(x) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(parts, x.contiguous(), group)
        return torch.cat(parts)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return _SumOfOwn.apply(grad, ctx.group), None


class _SumOfOwn(Function):
    """(processes * N, D) of each process to its own (N, D) of their sum: what a gather's gradient
    is, and whose gradient is a gather."""

    @staticmethod
    def forward(grad, group):
        total = grad.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=group)
        rows = len(grad) // distributed.get_world_size(group)
        start = distributed.get_rank(group) * rows
        return total[start : start + rows].clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return _Gather.apply(grad, ctx.group), None


def check_group(group: Any) -> None:
    if not isinstance(group, getattr(distributed, "ProcessGroup", ())):
        raise TypeError(
            "group: expected a ProcessGroup of torch.distributed or None, "
            f"got {type(group).__name__}"
        )


def gathered(x: Tensor, group: Any) -> tuple[Tensor, int]:
    """The embeddings (N, D), or ids (N,), of all processes, by rank, and the row at which this
    process's begin.

    Each process's gradient of the whole comes back to whom the rows belong, summed.

    Raises RuntimeError if the processes do not have one shape: torch would wait or read past ends.
    While torch.compile traces, that is not asked.
    """
    if not torch.compiler.is_compiling():
        mine = torch.tensor(x.shape, device=x.device)
        shapes = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(shapes, mine, group)
        found = [shape.tolist() for shape in shapes]
        if any(shape != found[0] for shape in found):
            raise RuntimeError(
                f"group: expected one shape of embeddings in all processes, got {found}"
            )
    return _Gather.apply(x, group), distributed.get_rank(group) * x.shape[0]
