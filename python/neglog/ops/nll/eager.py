"""nll as eager calls take it: with the gradient formed in the forward where one number is its
upstream. On the CPU without the dispatcher, 30 microseconds a call less than the registered op; on
CUDA see eager_cuda.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from neglog import availability, torch_state
from neglog.ops.dtypes import number, real_dtype
from neglog.ops.memory import aligned
from neglog.ops.nll import cpu, eager_cuda, remembered, schema
from neglog.ops.nll.autograd import Rows, Wanted, gradients
from neglog.ops.nll.schema import NONE, Options, count_rows


def nll(
    logits: Tensor, target: Tensor, weight: Tensor | None, token_weight: Tensor | None,
    num_items: Tensor | None, options: Options, stats: bool, backend: str,
) -> Rows:  # fmt: skip
    """Loss and statistics. Arguments as the op neglog::nll."""
    given = (logits, target, weight, token_weight, num_items)
    if torch_state.eager_on_cpu(logits):
        found = nll_on_cpu(*given, options, stats, backend)
        return Rows(*found) if stats else Rows(found)
    if eager_cuda.takes(logits, target, options, stats):
        return Rows(eager_cuda.nll(*given, options))
    return Rows.of(schema.forward(*given, *options, stats, backend), stats)


def nll_on_cpu(
    logits: Tensor, target: Tensor, weight: Tensor | None, token_weight: Tensor | None,
    num_items: Tensor | None, options: Options, stats: bool, backend: str,
) -> Any:  # fmt: skip
    """The same of logits that are `eager_on_cpu`: the loss, or with stats a tuple of all."""
    record = _record(logits, target, options.reduction)
    rest = (weight, token_weight, num_items, options, stats, backend, record)
    return torch_state.apply(EagerNLL, logits, target, rest)


def _record(logits: Tensor, target: Tensor, reduction: int) -> remembered.Record | None:
    """None where no gradient may be formed in the forward: of each row's loss there is an upstream,
    and where hooks take the logits away, a gradient as large would stay in their place."""
    learns = torch.is_grad_enabled() and logits.requires_grad and not target.requires_grad
    if reduction == NONE or not learns or torch_state.saved_tensors_hooked():
        return None
    return remembered.record(logits.shape, logits.dtype, reduction)


@torch_state.called_directly
class EagerNLL(Function):
    """Loss alone, or loss, lse, correct, entropy and argmax with stats."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, rest: tuple) -> Any:
        weight, token_weight, num_items, options, stats, backend, record = rest
        ctx.save_for_backward(logits, target, weight, token_weight)
        ctx.options, ctx.backend, ctx.record = options, backend, record
        ctx.upstream = upstream = None if record is None else record.forward()
        given = (logits, target, weight, token_weight, num_items)
        lses: Any
        if upstream is None:
            out = cpu.forward(schema.forward.Arguments(*given, *options, stats, backend))
            loss, lses, of_rows = out.loss(options.reduction), out.lses, out[2:5]
            ctx.formed, ctx.divisor = None, out.divisor
        else:
            loss, ctx.formed, lses, ctx.divisor, of_rows = cpu.forward_with_gradient(
                *given, options, stats, backend, upstream
            )
        # Never the loss, whose grad_fn this is: it would live until the next garbage collection.
        ctx.lses, ctx.entropy = lses, None
        if not stats:
            return loss
        correct, ctx.entropy, argmax = of_rows
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(correct, argmax)
        # Copies: what the user does to them must not reach the backward.
        lse = cpu.lse_and_low(lses, count_rows(logits), loss.dtype)[0].clone()
        return loss, lse, correct, ctx.entropy.clone(), argmax

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Any, grad_lse: Any = None, correct: Any = None,
        grad_entropy: Any = None, *undefined: Any,
    ) -> Any:  # fmt: skip
        if grad_loss is None and grad_lse is None and grad_entropy is None:
            return None, None, None
        # Asked for in any case: it raises if one was changed in place. And once: activation
        # checkpointing refuses to unpack a tensor twice.
        tensors = ctx.saved_tensors
        formed, ctx.formed = ctx.formed, None
        # A batch of upstreams has no memory: the dispatcher takes it apart. With create_graph the
        # gradient has a graph of its own.
        if not torch_state.plain_upstream(grad_loss) or ctx.needs_input_grad[1]:
            ctx.wanted = Wanted(*ctx.needs_input_grad[:2])
            found = gradients(ctx, grad_loss, grad_lse, grad_entropy, _kept(ctx, tensors))
            return found.get("logits"), found.get("target"), None
        alone = grad_lse is None and grad_entropy is None
        if ctx.record is not None and alone:
            upstream = float(aligned(grad_loss, "grad_loss"))
            ctx.record.backward(upstream)
            if upstream == ctx.upstream and formed is not None:
                availability.ran("nll_backward", ctx.backend)
                return formed, None, None
        kept = _kept(ctx, tensors).values()
        grads = (grad_loss, grad_lse, grad_entropy)
        given = schema.backward.Arguments(*grads, *kept, *ctx.options, ctx.backend)
        return cpu.backward(given, ctx.divisor, formed), None, None


def _kept(ctx: Any, tensors: tuple) -> dict[str, Any]:
    """What the backward of the op neglog::nll takes from its forward."""
    logits, target, weight, token_weight = tensors
    lse, lse_low = cpu.lse_and_low(ctx.lses, count_rows(logits), real_dtype(logits.dtype))
    return {
        "logits": logits, "target": target, "weight": weight, "token_weight": token_weight,
        "lse": lse, "lse_low": lse_low, "entropy": ctx.entropy,
        "total_weight": number(ctx.divisor, lse.dtype),
    }  # fmt: skip
