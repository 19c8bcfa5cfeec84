"""nll as eager calls take it: with the gradient formed in the forward where one number is its
upstream. On the CPU without the dispatcher, 30 microseconds a call less than the registered op; on
CUDA see eager_cuda.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from neglog import availability, torch_state
from neglog.ops.dtypes import number
from neglog.ops.memory import aligned
from neglog.ops.nll import cpu, eager_cuda, remembered, schema
from neglog.ops.nll.autograd import Rows, Wanted, gradients
from neglog.ops.nll.schema import NONE, Options, count_rows


def nll(
    logits: Tensor, target: Tensor, weight: Tensor | None, num_items: Tensor | None,
    options: Options, stats: bool, backend: str,
) -> Rows:  # fmt: skip
    """Loss and statistics. Arguments as the op neglog::nll."""
    if eager_cuda.takes(logits, target, options, stats):
        return Rows(eager_cuda.nll(logits, target, weight, num_items, options))
    if not torch_state.eager_on_cpu(logits):
        given = (logits, target, weight, num_items, *options, stats, backend)
        return Rows.of(schema.forward(*given), stats)
    rest = (weight, num_items, options, stats, backend, torch.is_grad_enabled())
    found = torch_state.apply(EagerNLL, logits, target, rest)
    return Rows(*found) if stats else Rows(found)


class EagerNLL(Function):
    """Loss alone, or loss, lse, correct and entropy with stats."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        logits, target, (weight, num_items, options, stats, backend, learns) = inputs
        ctx.save_for_backward(logits, target, weight)
        ctx.options, ctx.backend = options, backend
        ctx.record = _record(ctx, logits) if learns else None
        ctx.upstream = None if ctx.record is None else ctx.record.forward()
        ctx.formed = None if ctx.upstream is None else cpu.new_gradient_of(logits)
        given = (logits, target, weight, num_items)
        out: Any
        if ctx.formed is None:
            out = cpu.forward(schema.forward.Arguments(*given, *options, stats, backend))
            loss = out.loss(options.reduction)
        else:
            out = cpu.forward_with_gradient(
                *given, options, stats, backend, ctx.upstream, ctx.formed
            )
            loss = out.loss
        # Never the loss, whose grad_fn this is: it would live until the next garbage collection.
        ctx.lses, ctx.divisor = out.lses, out.divisor
        if not stats:
            return loss
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(out.correct, out.entropy)
        # A copy: what the user does to it must not reach the backward.
        lse = cpu.lse_and_low(out.lses, count_rows(logits))[0].clone()
        return loss, lse, out.correct, out.entropy

    @staticmethod
    def backward(ctx: Any, grad_loss: Any, grad_lse: Any = None, *undefined: Any) -> Any:
        if grad_loss is None and grad_lse is None:
            return None, None, None
        # Asked for in any case: it raises if one was changed in place. And once: activation
        # checkpointing refuses to unpack a tensor twice.
        tensors = ctx.saved_tensors
        formed, ctx.formed = ctx.formed, None
        # A batch of upstreams has no memory: the dispatcher takes it apart. With create_graph the
        # gradient has a graph of its own.
        if not torch_state.plain_upstream(grad_loss) or ctx.needs_input_grad[1]:
            ctx.wanted = Wanted(*ctx.needs_input_grad[:2])
            found = gradients(ctx, grad_loss, grad_lse, _kept(ctx, tensors))
            return found.get("logits"), found.get("target"), None
        if ctx.record is not None and grad_lse is None:
            upstream = float(aligned(grad_loss, "grad_loss"))
            ctx.record.backward(upstream)
            if upstream == ctx.upstream and formed is not None:
                availability.ran("nll_backward", ctx.backend)
                return formed, None, None
        kept = _kept(ctx, tensors).values()
        given = schema.backward.Arguments(grad_loss, grad_lse, *kept, *ctx.options, ctx.backend)
        return cpu.backward(given, ctx.divisor, formed), None, None


def _record(ctx: Any, logits: Tensor) -> remembered.Record | None:
    """None where no gradient may be formed in the forward: of each row's loss there is an upstream,
    and where hooks take the logits away, a gradient as large would stay in their place."""
    of_logits, of_target = ctx.needs_input_grad[:2]
    reduction = ctx.options.reduction
    if reduction == NONE or not of_logits or of_target or torch_state.saved_tensors_hooked():
        return None
    return remembered.record(logits.shape, logits.dtype, reduction)


def _kept(ctx: Any, tensors: tuple) -> dict[str, Any]:
    """What the backward of the op neglog::nll takes from its forward."""
    logits, target, weight = tensors
    lse, lse_low = cpu.lse_and_low(ctx.lses, count_rows(logits))
    return {
        "logits": logits, "target": target, "weight": weight, "lse": lse, "lse_low": lse_low,
        "total_weight": number(ctx.divisor, lse.dtype),
    }  # fmt: skip
