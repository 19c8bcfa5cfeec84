"""The derivative of kl, and the form that eager calls on the CPU take: with the gradient formed in
the forward where one number is its upstream, as in ops/nll/eager.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from neglog import availability, torch_state
from neglog.ops.define import save, saved, second_derivative
from neglog.ops.dtypes import number, quotient, real_dtype
from neglog.ops.kl import (
    cpu,
    cuda,  # noqa: F401 - implements the ops
    formula,
    schema,
)
from neglog.ops.kl.schema import Options
from neglog.ops.memory import aligned
from neglog.ops.nll import remembered
from neglog.ops.nll.cpu import new_gradient_of
from neglog.ops.nll.schema import MEAN, NONE


class Compared(NamedTuple):
    """Loss () or (N,), and the two parts of each row's (N,), detached."""

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor


def kl(
    logits: Tensor, teacher: Tensor, ids: Tensor | None, target: Tensor,
    token_weight: Tensor | None, num_items: Tensor | None, reduction: int, options: Options,
    backend: str,
) -> Compared:  # fmt: skip
    """Arguments as the op neglog::kl."""
    given = (logits, teacher, ids, target, token_weight, num_items, reduction)
    if torch_state.eager_on_cpu(logits):
        record = _record(logits, reduction)
        return Compared(*torch_state.apply(EagerKL, logits, (*given[1:], options, backend, record)))
    found = schema.forward(*given, *options, backend)
    return Compared(found.loss, found.divergence, found.cross_entropy)


def _record(logits: Tensor, reduction: int) -> remembered.Record | None:
    """As in ops/nll/eager.py; apart from that of nll."""
    learns = torch.is_grad_enabled() and logits.requires_grad
    if reduction == NONE or not learns or torch_state.saved_tensors_hooked():
        return None
    return remembered.record(logits.shape, logits.dtype, -1 - reduction)


def _setup(ctx: Any, a: Any, results: Any) -> None:
    ctx.mark_non_differentiable(results.total_weight, results.divergence, results.cross_entropy)
    save(
        ctx, logits=a.logits, teacher=a.teacher, ids=a.ids, target=a.target,
        token_weight=a.token_weight, total_weight=results.total_weight,
    )  # fmt: skip
    ctx.reduction, ctx.options, ctx.backend = a.reduction, Options.of(a), a.backend


def _backward(ctx: Any, grad: Any) -> dict[str, Any]:
    return _gradient(ctx, grad.loss, tuple(saved(ctx).values()))


def _gradient(ctx: Any, grad_loss: Tensor, kept: tuple) -> dict[str, Any]:
    """By the registered op, which is itself differentiable."""
    made = schema.backward(grad_loss, *kept, ctx.reduction, *ctx.options, ctx.backend)
    return {"logits": made}


def _setup_backward(ctx: Any, a: Any, results: Any) -> None:
    save(
        ctx, grad_loss=a.grad_loss, logits=a.logits, teacher=a.teacher, ids=a.ids,
        target=a.target, token_weight=a.token_weight, total_weight=a.total_weight,
    )  # fmt: skip
    ctx.reduction, ctx.options = a.reduction, Options.of(a)


def _double_backward(ctx: Any, grad: Any) -> dict[str, Any]:
    kept = saved(ctx)
    upstream, inputs = ({name: kept.pop(name)} for name in ("grad_loss", "logits"))

    def forward(logits: Tensor) -> tuple[Tensor]:
        others: Any = (*kept.values(), ctx.reduction, ctx.options)
        return (formula.kl(logits, *others)[0],)

    return second_derivative(forward, upstream, inputs, {"logits": grad.result})


schema.forward.differentiable(_setup, _backward)
schema.backward.differentiable(_setup_backward, _double_backward)


@torch_state.called_directly
class EagerKL(Function):
    """Loss, divergence, cross_entropy of logits that are `eager_on_cpu`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rest: tuple) -> Any:
        teacher, ids, target, token_weight, num_items, reduction, options, backend, record = rest
        tensors = (logits, teacher, ids, target, token_weight)
        ctx.save_for_backward(*tensors)
        ctx.reduction, ctx.options, ctx.backend, ctx.record = reduction, options, backend, record
        ctx.upstream = None if record is None else record.forward()
        given = schema.forward.Arguments(*tensors, num_items, reduction, *options, backend)
        availability.ran("kl", backend)
        ctx.divisor, ctx.formed, taught = cpu.divisor_of(given), None, cpu.Taught(given)
        if ctx.upstream is None:
            rows = taught.run()
        else:
            ctx.formed = new_gradient_of(logits)
            scale = ctx.upstream * (quotient(1.0, ctx.divisor) if reduction == MEAN else 1.0)
            rows = taught.run(None, scale, ctx.formed)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(rows.divergence, rows.cross_entropy)
        loss = cpu.reduced(rows, ctx.divisor, reduction)
        return loss, rows.divergence, rows.cross_entropy

    @staticmethod
    def backward(ctx: Any, grad_loss: Any, *undefined: Any) -> Any:
        if grad_loss is None:
            return None, None
        # Asked for in any case, and once: see EagerNLL.
        tensors = ctx.saved_tensors
        formed, ctx.formed = ctx.formed, None
        if not torch_state.plain_upstream(grad_loss):
            total = number(ctx.divisor, real_dtype(tensors[0].dtype))
            return _gradient(ctx, grad_loss, (*tensors, total))["logits"], None
        if ctx.record is not None:
            upstream = float(aligned(grad_loss, "grad_loss"))
            ctx.record.backward(upstream)
            if upstream == ctx.upstream and formed is not None:
                availability.ran("kl_backward", ctx.backend)
                return formed, None
        rest = (None, ctx.reduction, *ctx.options, ctx.backend)
        given = schema.backward.Arguments(grad_loss, *tensors, *rest)
        return cpu.backward(given, ctx.divisor, formed), None
