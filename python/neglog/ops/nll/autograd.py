"""The derivative of nll, and the form whose gradient is written over the logits in the forward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from neglog import torch_state
from neglog.ops.define import library, save, saved, second_derivative
from neglog.ops.dtypes import divides_late
from neglog.ops.nll import formula, schema
from neglog.ops.nll.schema import MEAN, NONE, Options

ARGUMENTS = len(schema.forward.Arguments._fields)


class Wanted(NamedTuple):
    """Which gradients are."""

    logits: bool
    target: bool


class Rows(NamedTuple):
    """Loss () or (N,); the rest by row, or None where no statistics were asked for."""

    loss: Tensor
    lse: Any = None
    correct: Any = None
    entropy: Any = None
    argmax: Any = None

    @classmethod
    def of(cls, results: Any, stats: bool) -> Rows:
        if not stats:
            return cls(results.loss)
        return cls(results.loss, results.lse, results.correct, results.entropy, results.argmax)


def nll_in_place(*arguments: Any) -> Rows:
    """As `nll` of eager.py, and the gradient for an upstream of 1 written over the logits."""
    *tensors, options, stats, backend = arguments
    found = Rows(*InPlaceNLL.apply(*tensors, *options, stats, backend))
    return Rows.of(found, stats)


# Derivatives


def _setup(ctx: Any, a: Any, results: Any) -> None:
    ctx.mark_non_differentiable(
        results.lse_low, results.total_weight, results.correct, results.argmax
    )
    save(
        ctx, logits=a.logits, target=a.target, weight=a.weight, token_weight=a.token_weight,
        lse=results.lse, lse_low=results.lse_low, entropy=results.entropy,
        total_weight=results.total_weight,
    )  # fmt: skip
    ctx.options, ctx.backend = Options.of(a), a.backend


def _backward(ctx: Any, grad: Any) -> dict[str, Any]:
    return gradients(ctx, grad.loss, grad.lse, grad.entropy, saved(ctx))


def gradients(
    ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, grad_entropy: Tensor | None,
    kept: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """By the registered ops, which are themselves differentiable."""
    if grad_loss is None:
        grad_loss = kept["lse"].new_zeros(())
    found = {}
    if ctx.wanted.logits:
        found["logits"] = schema.backward(
            grad_loss, grad_lse, grad_entropy, *kept.values(), *ctx.options, ctx.backend
        )
    if ctx.wanted.target:
        found["target"] = formula.target_gradient(
            grad_loss, kept["logits"], kept["target"], kept["weight"], kept["token_weight"],
            kept["total_weight"], ctx.options,
        )  # fmt: skip
    return found


def _setup_backward(ctx: Any, a: Any, results: Any) -> None:
    save(
        ctx, grad_loss=a.grad_loss, grad_lse=a.grad_lse, grad_entropy=a.grad_entropy,
        logits=a.logits, target=a.target, weight=a.weight, token_weight=a.token_weight,
        total_weight=a.total_weight,
    )  # fmt: skip
    ctx.options = Options.of(a)


def _double_backward(ctx: Any, grad: Any) -> dict[str, Any]:
    """lse, lse_low and entropy follow from the logits: formula.py makes them again, so that the
    whole of their derivative arrives through the logits."""
    kept = saved(ctx)
    target = kept["target"]
    upstream = formula.upstream_of(kept)
    inputs = {"logits": kept["logits"]}
    if target.dim() > 1:
        inputs["target"] = target

    def forward(logits: Tensor, target: Tensor = target) -> tuple[Tensor, ...]:
        given = (kept["weight"], kept["token_weight"], kept["total_weight"], ctx.options)
        return formula.differentiable(upstream, logits, target, *given)

    return second_derivative(forward, upstream, inputs, {"logits": grad.result})


schema.forward.differentiable(_setup, _backward)
schema.backward.differentiable(_setup_backward, _double_backward)
for _op in (schema.forward, schema.backward):
    _op.implemented_by_library("cuda")  # csrc/nll/nll.cu


# In place


def _count_version(keyset: Any, logits: Tensor, *arguments: Any) -> Any:
    """nll_ writes its argument: every tensor saved before must learn of it."""
    with torch._C._AutoDispatchBelowADInplaceOrView():
        outputs = schema.in_place.registered.redispatch(
            keyset & torch._C._after_ADInplaceOrView_keyset, logits, *arguments
        )
    torch.autograd.graph.increment_version(logits)
    return outputs


library.impl("nll_", _count_version, "ADInplaceOrView", with_keyset=True)


def scale_in_place(grad: Tensor, factor: Tensor) -> None:
    """grad, as logits, times factor () or (N,), over itself; by 1, as mostly, none is written."""
    if grad.is_cuda:  # to ask whether it is 1 would be to wait for the device
        schema.scale_in_place(grad, factor)
        torch.autograd.graph.increment_version(grad)
    elif factor.dim():
        grad.mul_(factor.view(grad.shape[0], 1, *grad.shape[2:]))
    elif not torch_state.readable(factor) or float(factor) != 1:
        grad.mul_(factor)


def late_divisor(total_weight: Tensor, dtype: torch.dtype, reduction: int) -> Tensor | None:
    """What a mean's gradient is divided by in the backward; see `divides_late`. A divisor of 0 was
    not put off: an ignored row's 0 must not become 0 / 0."""
    if reduction != MEAN or not divides_late(dtype):
        return None
    return torch.where(total_weight == 0, 1, total_weight)


def refuse_create_graph() -> None:
    """The logits are gone, and a graph without them would be silently wrong."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "inplace_backward: the gradient has no derivative of its own: expected "
            "inplace_backward=False with create_graph=True"
        )


def gradient_in_place(ctx: Any) -> tuple[Tensor, ...]:
    """What was saved after the gradient was written."""
    try:
        kept: tuple[Tensor, ...] = ctx.saved_tensors
    except RuntimeError as error:
        raise RuntimeError(
            "inplace_backward: the gradient that lies in the input's memory was handed over to an "
            "earlier backward, or overwritten since: expected one backward, and one loss of each "
            f"input. {error}"
        ) from None
    return kept


class InPlaceNLL(Function):
    """Loss, lse, correct, entropy; the logits become their gradient for an upstream of 1."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        a = schema.in_place.Arguments(*inputs)
        ctx.set_materialize_grads(False)
        made = schema.in_place.Results(*schema.in_place.registered(*inputs))
        stats = (made.lse, made.correct, made.entropy, made.argmax)
        ctx.mark_non_differentiable(*stats)
        # Saved after the write, so that any later one, by us or by the user, is caught. Detached,
        # which shares the version: a view that was written has no history to restore.
        ctx.save_for_backward(a.logits.detach())
        ctx.divisor = late_divisor(made.total_weight, a.logits.dtype, a.reduction)
        # Of an ignored row the upstream may be anything, and its gradient stays 0.
        ctx.counted = None
        if a.reduction == NONE:
            ctx.counted = formula.counted_rows(a.target, a.token_weight, a.ignore_index)
        return made.loss, *stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Any, *undefined: Any) -> Any:
        refuse_create_graph()
        if grad_loss is None:
            return (None,) * ARGUMENTS
        (grad,) = gradient_in_place(ctx)
        if ctx.counted is not None:
            grad_loss = torch.where(ctx.counted, grad_loss, 1)
        scale_in_place(grad, grad_loss if ctx.divisor is None else grad_loss / ctx.divisor)
        return grad, *(None,) * (ARGUMENTS - 1)
