"""nll as eager calls on CUDA take it where the loss is one number: formed with its gradient in one
pass, for the upstream of the last backward, as on the CPU (remembered.py).

But here that number lies on the device, and the host never waits for it. The forward reads it
there, and keeps which number it read. The backward compares that with its own upstream on the
device, and where they differ forms the gradient again, in the same memory. Of backwards whose
upstreams differ the device keeps count, of forwards without a backward the host.

So nothing depends on when the remembered number is written, nor on which stream: whatever a forward
reads, the gradient is right. It is never freed, because CUDA graphs that were captured with its
address write to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from neglog import availability, settings, torch_state
from neglog.ops.dtypes import real_dtype
from neglog.ops.nll.autograd import Wanted, gradients
from neglog.ops.nll.schema import NONE, Options

ops = torch.ops.neglog


def takes(logits: Tensor, target: Tensor, options: Options, stats: bool) -> bool:
    """Whether `nll` is for this call; otherwise the registered op is."""
    if not torch_state.eager_on_cuda(logits) or options.reduction == NONE or stats:
        return False
    learns = logits.requires_grad and torch.is_grad_enabled()
    # Columns that are not adjacent would be copied in both passes.
    return learns and not target.requires_grad and logits.stride(1) == 1


def nll(
    logits: Tensor, target: Tensor, weight: Tensor | None, token_weight: Tensor | None,
    num_items: Tensor | None, options: Options,
) -> Tensor:  # fmt: skip
    """The loss ()."""
    return torch_state.apply(CudaNLL, logits, (target, weight, token_weight, num_items, options))


class Record:
    """Of calls that are alike: what the device remembers of upstreams (schema.py), and the forwards
    since the last backward."""

    __slots__ = ("misses", "remembered")

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.misses = 0
        self.remembered = torch.zeros(2, dtype=dtype, device=device)
        self.remembered[0].fill_(1)


_records: dict[tuple[torch.device, torch.dtype, int], Record] = {}


def _record(logits: Tensor, reduction: int) -> Record | None:
    """None in a graph that is captured before any call outside: its memory would be the graph's."""
    key = (logits.device, logits.dtype, reduction)
    found = _records.get(key)
    if found is None and not torch_state.capturing(logits.device):
        found = _records.setdefault(key, Record(logits.device, real_dtype(logits.dtype)))
    return found


class CudaNLL(Function):
    """The loss alone."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rest: tuple) -> Tensor:
        target, weight, token_weight, num_items, options = rest
        ctx.save_for_backward(logits, target, weight, token_weight)
        ctx.options, ctx.backend = options, ""
        ctx.record, forms = None, False
        # Where hooks take the logits away, a gradient as large would stay in their place.
        if not torch_state.saved_tensors_hooked():
            ctx.record = _record(logits, options.reduction)
            forms = (ctx.record.misses if ctx.record else 0) < settings.patience
        on_device = None
        if ctx.record is not None:
            ctx.record.misses += 1
            on_device = ctx.record.remembered
        loss, ctx.kept, formed = ops.nll_with_gradient.default(
            logits, target, weight, token_weight, num_items, on_device, *options, forms
        )
        ctx.formed = formed if forms else None
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Any) -> Any:
        tensors = ctx.saved_tensors  # asked for in any case, and once: see EagerNLL
        formed, ctx.formed = ctx.formed, None
        if not torch_state.plain_upstream(grad_loss):
            ctx.wanted = Wanted(True, False)
            return gradients(ctx, grad_loss, None, None, _kept(ctx, tensors))["logits"], None
        availability.ran("nll_backward", "cuda")
        on_device = None
        if ctx.record is not None:
            ctx.record.misses, on_device = 0, ctx.record.remembered
        # What was handed over is the user's: a second backward has memory of its own.
        gradient = _new_gradient(tensors[0]) if formed is None else formed
        ops.nll_gradient_for_.default(
            gradient, grad_loss, ctx.kept, on_device, *tensors, *ctx.options, formed is not None
        )
        return gradient, None


def _new_gradient(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _kept(ctx: Any, tensors: tuple) -> dict[str, Any]:
    """What the backward of the op neglog::nll takes from its forward."""
    lse, lse_low, _ = ctx.kept[:-2].view(3, len(tensors[0]))
    names = ("logits", "target", "weight", "token_weight", "lse", "lse_low", "entropy")
    found = dict(zip(names, (*tensors, lse, lse_low, None), strict=True))
    return {**found, "total_weight": ctx.kept[-2]}
