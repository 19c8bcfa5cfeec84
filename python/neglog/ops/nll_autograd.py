"""Autograd of nll: one formula behind four doors.

registered   torch.ops.neglog.nll, for torch.compile, export and whoever calls the op itself
functional   the same as a Function with setup_context, which torch.func demands
eager        no dispatcher and one output: 30 microseconds a call less than the registered op
in place     the gradient formed in the forward, over the logits
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from neglog import dispatch
from neglog.ops import nll_composite as composite
from neglog.ops.nll import (
    MEAN,
    Options,
    divides_late,
    library,
    run_backward,
    run_forward,
    scale_in_place,
)

ARGUMENTS = 12  # of neglog::nll and neglog::nll_
NO_GRADIENTS = (None,) * ARGUMENTS


def nll(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, lse, correct and entropy, by the door that fits. Arguments as the op neglog::nll."""
    if torch.compiler.is_compiling() or _needs_dispatcher(arguments[0]):
        loss, lse, _, _, correct, entropy = torch.ops.neglog.nll.default(*arguments)
    elif torch._C._are_functorch_transforms_active():
        loss, lse, _, _, correct, entropy = FunctionalNLL.apply(*arguments)
    elif arguments[-2]:
        loss, lse, correct, entropy = EagerNLL.apply(*arguments)
    else:
        loss = EagerNLL.apply(*arguments)
        lse = correct = entropy = loss.new_empty(0)
    return loss, lse, correct, entropy


def traced(x: Tensor) -> bool:
    """Whether a tracer or a dispatch mode must see the op itself."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or type(x) in dispatch.TRACED
    )


def _needs_dispatcher(logits: Tensor) -> bool:
    """Whether it is traced, or the logits are not in the CPU's memory."""
    return traced(logits) or not logits.is_cpu


def one_upstream(grad: Tensor) -> bool:
    """Not many at once, as with is_grads_batched=True, nor one that a transform watches."""
    batched = torch._C._functorch.is_legacy_batchedtensor(grad)
    return not batched and not torch._C._are_functorch_transforms_active()


# Registered


def _setup(ctx, inputs, output):
    logits, target, weight, _, *options = inputs
    _, lse, lse_low, total_weight, correct, entropy = output
    ctx.mark_non_differentiable(lse_low, total_weight, correct, entropy)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, weight, lse, lse_low, total_weight)
    ctx.options = Options(*options[:6])
    ctx.backend = options[-1]


def _backward(ctx, grad_loss, grad_lse, *undefined):
    if grad_loss is None and grad_lse is None:
        return NO_GRADIENTS
    logits, target, weight, lse, lse_low, total_weight = ctx.saved_tensors
    if grad_loss is None:
        grad_loss = lse.new_zeros(())
    grads: list[Tensor | None] = [*NO_GRADIENTS]
    if ctx.needs_input_grad[0]:
        grads[0] = _differentiable_backward(
            grad_loss, grad_lse, logits, target, weight, lse, lse_low, total_weight,
            *ctx.options, ctx.backend,
        )  # fmt: skip
    if ctx.needs_input_grad[1]:
        grads[1] = composite.target_gradient(
            grad_loss, logits, target, weight, total_weight, *ctx.options
        )
    return tuple(grads)


def _differentiable_backward(*arguments: Any) -> Tensor:
    if torch._C._are_functorch_transforms_active():
        return FunctionalBackward.apply(*arguments)
    return torch.ops.neglog.nll_backward.default(*arguments)


def _setup_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], inputs[7])
    ctx.options = Options(*inputs[8:14])


def _double_backward(ctx, grad):
    grad_loss, grad_lse, logits, target, weight, total_weight = ctx.saved_tensors
    probs = target if target.dim() == 2 else None
    # lse and lse_low follow from the logits: the composite recomputes them, so the whole of their
    # derivative arrives through the logits and nothing is returned for them.
    inputs = {"grad_loss": grad_loss, "grad_lse": grad_lse, "logits": logits, "target": probs}
    wanted = {name: value for name, value in inputs.items() if value is not None}
    fixed: dict[str, Any] = {"grad_lse": None} if grad_lse is None else {}
    if probs is None:
        fixed["target"] = target

    def gradient(*values: Tensor) -> Tensor:
        named = fixed | dict(zip(wanted, values, strict=True))
        return composite.gradient(
            **named, weight=weight, total_weight=total_weight, options=ctx.options
        )

    pullback = torch.func.vjp(gradient, *wanted.values())[1]
    second = dict(zip(wanted, pullback(grad), strict=True))
    return tuple(second.get(name) for name in inputs) + (None,) * 11


torch.library.register_autograd("neglog::nll", _backward, setup_context=_setup, lib=library)
torch.library.register_autograd(
    "neglog::nll_backward", _double_backward, setup_context=_setup_backward, lib=library
)


# Functional


def _vmap_by_loop(function: Any) -> Any:
    """vmap as the loop it stands for; one call of the kernel already fills the machine."""

    def vmap(info, in_dims, *inputs):
        calls = [
            function.apply(
                *(  # a list's dim is a list
                    value.select(dim, index) if isinstance(dim, int) else value
                    for value, dim in zip(inputs, in_dims, strict=True)
                )
            )
            for index in range(info.batch_size)
        ]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        stacked = tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True))
        return stacked, (0,) * len(stacked)

    return vmap


def as_function(name: str, op: Any, setup_context: Any, backward: Any) -> Any:
    members = {
        "forward": staticmethod(lambda *inputs: op(*inputs)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
    }
    function = type(name, (Function,), members)
    function.vmap = staticmethod(_vmap_by_loop(function))  # type: ignore[attr-defined]
    return function


FunctionalNLL = as_function("FunctionalNLL", torch.ops.neglog.nll.default, _setup, _backward)
FunctionalBackward = as_function(
    "FunctionalBackward", torch.ops.neglog.nll_backward.default, _setup_backward, _double_backward
)


# Eager


class EagerNLL(Function):
    """Loss alone, or (loss, lse, correct, entropy) with stats."""

    @staticmethod
    def forward(ctx, logits, target, weight, num_items, *rest):
        *values, stats, backend = rest
        options = Options(*values)
        out = run_forward(logits, target, weight, num_items, options, stats, backend)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, weight)
        ctx.lse, ctx.lse_low, ctx.divisor = out.lse, out.lse_low, out.divisor
        ctx.options, ctx.backend = options, backend
        loss = out.loss(options.reduction)
        if not stats:
            return loss
        ctx.mark_non_differentiable(out.correct, out.entropy)
        # A copy: what the user does to it must not reach the backward.
        return loss, out.lse.clone(), out.correct, out.entropy

    @staticmethod
    def backward(ctx, grad_loss, grad_lse=None, *undefined):
        if grad_loss is None and grad_lse is None:
            return NO_GRADIENTS
        logits, target, weight = ctx.saved_tensors
        if grad_loss is None:
            grad_loss = ctx.lse.new_zeros(())
        grad = _eager_backward(ctx, grad_loss, grad_lse, logits, target, weight)
        grad_target = None
        if ctx.needs_input_grad[1]:
            grad_target = composite.target_gradient(
                grad_loss, logits, target, weight, _total_weight(ctx), *ctx.options
            )
        return grad, grad_target, *NO_GRADIENTS[2:]


def _total_weight(ctx: Any) -> Tensor:
    return torch.scalar_tensor(ctx.divisor, dtype=ctx.lse.dtype)


def _eager_backward(ctx, grad_loss, grad_lse, logits, target, weight):
    if not ctx.needs_input_grad[0]:
        return None
    # Many upstreams have no memory, and the dispatcher takes them apart. With create_graph the
    # gradient has a graph of its own.
    if not one_upstream(grad_loss) or torch.is_grad_enabled() or _needs_dispatcher(logits):
        return _differentiable_backward(
            grad_loss, grad_lse, logits, target, weight, ctx.lse, ctx.lse_low, _total_weight(ctx),
            *ctx.options, ctx.backend,
        )  # fmt: skip
    return run_backward(
        grad_loss, grad_lse, logits, target, weight, ctx.lse, ctx.lse_low, ctx.divisor,
        ctx.options, ctx.backend,
    )  # fmt: skip


# In place


def _count_version(keyset: Any, logits: Tensor, *arguments: Any) -> Any:
    """nll_ writes its argument: every tensor saved before must learn of it."""
    with torch._C._AutoDispatchBelowADInplaceOrView():
        outputs = torch.ops.neglog.nll_.default.redispatch(
            keyset & torch._C._after_ADInplaceOrView_keyset, logits, *arguments
        )
    torch.autograd.graph.increment_version(logits)
    return outputs


library.impl("nll_", _count_version, "ADInplaceOrView", with_keyset=True)


class InplaceNLL(Function):
    """Loss, lse, correct, entropy; the logits become their gradient for upstream 1."""

    @staticmethod
    def forward(ctx, logits, target, weight, num_items, *options):
        ctx.set_materialize_grads(False)
        loss, lse, total_weight, correct, entropy = torch.ops.neglog.nll_.default(
            logits, target, weight, num_items, *options
        )
        ctx.mark_non_differentiable(lse, correct, entropy)
        # Saved after the write, so that any later one, by us or by the user, is caught. Detached,
        # which shares the version: a view that was written has no history to restore.
        ctx.save_for_backward(logits.detach())
        # A divisor of 0 was not put off: an ignored row's 0 must not become 0 / 0.
        late = options[0] == MEAN and divides_late(logits)
        ctx.late = torch.where(total_weight == 0, 1, total_weight) if late else None
        return loss, lse, correct, entropy

    @staticmethod
    def backward(ctx, grad_loss, *undefined):
        if torch.is_grad_enabled():
            # create_graph: the logits are gone, and a graph without them would be silently wrong.
            raise RuntimeError(
                "inplace_backward: the gradient has no derivative of its own: expected "
                "inplace_backward=False with create_graph=True"
            )
        if grad_loss is None:
            return NO_GRADIENTS
        (grad,) = ctx.saved_tensors
        if ctx.late is not None:
            grad_loss = grad_loss / ctx.late
        scale_in_place(grad, grad_loss)
        return grad, *NO_GRADIENTS[1:]
