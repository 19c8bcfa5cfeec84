"""Embeddings of all processes of a group, with their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import Function

from neglog.ops.dtypes import DTYPE_CODES


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


def check_alike(x: Tensor, exclude: Tensor | None, group: Any) -> None:
    """Raises RuntimeError if the processes have not embeddings of one shape and dtype, or `exclude`
    in some of them alone: torch would wait, abort, or read one dtype as another.

    In one collective, which has one size whatever they have. While torch.compile traces, it is not
    asked.
    """
    if torch.compiler.is_compiling():
        return
    mine = (*x.shape, DTYPE_CODES[x.dtype], int(exclude is not None))
    sent = torch.tensor(mine, device=x.device)
    received = [torch.empty_like(sent) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(received, sent, group)
    found = torch.stack(received).tolist()
    if any(one != found[0] for one in found):
        raise RuntimeError(
            "group: expected one shape and dtype of embeddings in all processes, and exclude in "
            f"all or none, got {', '.join(map(_described, found))}"
        )


def _described(numbers: list[int]) -> str:
    *shape, code, excludes = numbers
    dtype = next(dtype for dtype, number in DTYPE_CODES.items() if number == code)
    return f"{shape} of {dtype}{' with exclude' if excludes else ''}"


def gathered(x: Tensor, group: Any) -> tuple[Tensor, int]:
    """The embeddings (N, D), or ids (N,), of all processes, by rank, and the row at which this
    process's begin.

    Each process's gradient of the whole comes back to whom the rows belong, summed.
    """
    return _Gather.apply(x, group), distributed.get_rank(group) * x.shape[0]
