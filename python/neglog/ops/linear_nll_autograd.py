"""Autograd of linear_nll: one formula behind three doors.

registered   torch.ops.neglog.linear_nll, for torch.compile, export and whoever calls the op itself
functional   the same as a Function with setup_context, which torch.func demands
eager        gives the gradients formed in the forward away, where the others copy them
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from neglog.ops import linear_nll as linear_nll_cpu
from neglog.ops import linear_nll_cuda
from neglog.ops import nll_composite as composite
from neglog.ops.linear_nll import formed_once, library, nothing_formed
from neglog.ops.nll import NONE, Options
from neglog.ops.nll_autograd import as_function, one_upstream, traced

NO_GRADIENTS = (None,) * 17
NO_EAGER_GRADIENTS = (None,) * 18
FORWARDS = {"cpu": linear_nll_cpu.forward, "cuda": linear_nll_cuda.forward}


def linear_nll(
    head: Sequence[Tensor | None], dtype: torch.dtype, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, lse, correct and entropy of a head (input, linear_weight, linear_bias) that is rounded
    to `dtype`. Other arguments as the op neglog::linear_nll."""
    alone = not torch.compiler.is_compiling() and not traced(head[0])  # type: ignore[arg-type]
    if alone and torch._C._are_functorch_transforms_active():
        outputs = FunctionalLinearNLL.apply(*rounded(head, dtype), *others)
    elif alone and not _hooked():
        return EagerLinearNLL.apply(*head, dtype, *others)
    else:
        outputs = torch.ops.neglog.linear_nll.default(*rounded(head, dtype), *others)
    loss, lse, _, correct, entropy, *_ = outputs
    return loss, lse, correct, entropy


def _hooked() -> bool:
    """Whether someone takes what is saved (checkpointing, offloading): then all of it is saved."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _setup(ctx, inputs, output):
    input, linear_weight, linear_bias, target, weight, _, *rest = inputs
    _, _, total_weight, correct, entropy, *formed = output
    ctx.mark_non_differentiable(total_weight, correct, entropy, *formed)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, linear_weight, linear_bias, target, weight, total_weight, *formed)
    ctx.options = Options(*rest[:6])
    ctx.how = rest[-3:]  # workspace, filter_eps, backend


def _backward(ctx, grad_loss, grad_lse, *undefined):
    if grad_loss is None and grad_lse is None:
        return NO_GRADIENTS
    *problem, total_weight, grad_input, grad_weight, grad_bias = ctx.saved_tensors
    formed = (grad_input, grad_weight, grad_bias)
    return _gradients(ctx, grad_loss, grad_lse, problem, total_weight, formed)


def _gradients(ctx, grad_loss, grad_lse, problem, total_weight, formed):
    if grad_loss is None:
        grad_loss = total_weight.new_zeros(())
    wanted = list(ctx.needs_input_grad[:3])
    arguments = (
        grad_loss, grad_lse, *problem, total_weight, *formed, *ctx.options, wanted, *ctx.how,
    )  # fmt: skip
    if torch._C._are_functorch_transforms_active():
        grads = FunctionalLinearBackward.apply(*arguments)
    else:
        grads = torch.ops.neglog.linear_nll_backward.default(*arguments)
    kept = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
    return (*kept, *NO_GRADIENTS[3:])


def _setup_backward(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:8])
    ctx.options = Options(*inputs[11:17])
    ctx.count = len(inputs)


def _gradient(
    grad_loss: Tensor, grad_lse: Tensor | None, input: Tensor, linear_weight: Tensor,
    linear_bias: Tensor | None, target: Tensor, weight: Tensor | None, total_weight: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As the op neglog::linear_nll_backward, differentiable and with the logits in memory."""
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
    if grad_lse is not None:  # the op computes no lse of ignored rows
        grad_lse = torch.where(target == options.ignore_index, 0, grad_lse)
    dz = composite.gradient(grad_loss, grad_lse, logits, target, weight, total_weight, options)
    return dz @ linear_weight, dz.t() @ input, dz.sum(0)


def _double_backward(ctx, *grads):
    names = ("grad_loss", "grad_lse", "input", "linear_weight", "linear_bias")
    *saved, target, weight, total_weight = ctx.saved_tensors
    inputs = dict(zip(names, saved, strict=True))
    wanted = {name: value for name, value in inputs.items() if value is not None}
    # Which of the three came with an upstream; an empty one stands for a gradient nobody wanted.
    used = [index for index, grad in enumerate(grads) if grad is not None and grad.numel()]

    def chosen(*values: Tensor) -> tuple[Tensor, ...]:
        named: dict[str, Any] = dict.fromkeys(names) | dict(zip(wanted, values, strict=True))
        made = _gradient(
            **named, target=target, weight=weight, total_weight=total_weight, options=ctx.options
        )
        return tuple(made[index] for index in used)

    if not used:
        return (None,) * ctx.count
    pullback = torch.func.vjp(chosen, *wanted.values())[1]
    second = dict(zip(wanted, pullback(tuple(grads[index] for index in used)), strict=True))
    return tuple(second.get(name) for name in names) + (None,) * (ctx.count - len(names))


torch.library.register_autograd("neglog::linear_nll", _backward, setup_context=_setup, lib=library)
torch.library.register_autograd(
    "neglog::linear_nll_backward", _double_backward, setup_context=_setup_backward, lib=library
)

FunctionalLinearNLL = as_function(
    "FunctionalLinearNLL", torch.ops.neglog.linear_nll.default, _setup, _backward
)
FunctionalLinearBackward = as_function(
    "FunctionalLinearBackward", torch.ops.neglog.linear_nll_backward.default, _setup_backward,
    _double_backward,
)  # fmt: skip


# Eager


class EagerLinearNLL(Function):
    """Loss, lse, correct, entropy of a head, which is rounded to `dtype` here: so the gradients of
    what autocast rounds are never rounded themselves.

    The first backward has the memory of what the forward formed: a copy would be as large as the
    weight. For one after it (retain_graph) the forward runs again.
    """

    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, dtype, target, weight, num_items, *rest):
        head, others = (input, linear_weight, linear_bias), (target, weight, num_items)
        loss, lse, total_weight, correct, entropy, *ctx.formed = _formed(head, dtype, others, rest)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(correct, entropy)
        ctx.save_for_backward(*head, *others, total_weight)
        ctx.dtype, ctx.rest = dtype, rest
        ctx.options, ctx.how = Options(*rest[:6]), rest[-3:]
        return loss, lse, correct, entropy

    @staticmethod
    def backward(ctx, grad_loss, grad_lse, *undefined):
        if grad_loss is None and grad_lse is None:
            return NO_EAGER_GRADIENTS
        *head, target, weight, num_items, total_weight = ctx.saved_tensors
        formed, ctx.formed = ctx.formed, None
        # With create_graph the gradients have a graph of their own.
        alone = grad_lse is None and not torch.is_grad_enabled() and not traced(head[0])
        if alone and ctx.options.reduction != NONE and one_upstream(grad_loss):
            if formed is None:
                others = (target, weight, num_items)
                formed = _formed(head, ctx.dtype, others, ctx.rest)[-3:]
            given = formed_once(
                grad_loss, formed, total_weight, ctx.options, ctx.needs_input_grad[:3],
                [None if part is None else part.dtype for part in head],
                late=ctx.dtype == torch.float16,
            )  # fmt: skip
            if given is not None:
                return (*given, *NO_EAGER_GRADIENTS[3:])
        problem = (*rounded(head, ctx.dtype), target, weight)
        formed = formed or nothing_formed(problem[0])
        grads = _gradients(ctx, grad_loss, grad_lse, problem, total_weight, formed)[:3]
        wide = (
            None if grad is None else grad.to(part.dtype)
            for grad, part in zip(grads, head, strict=True)
        )
        return (*wide, *NO_EAGER_GRADIENTS[3:])


def rounded(head: Sequence[Tensor | None], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(None if part is None else part.to(dtype) for part in head)


def _formed(
    head: Sequence[Tensor | None], dtype: torch.dtype, others: tuple, rest: tuple
) -> tuple[Tensor, ...]:
    """The op, but that gradients are as wide as what they are of."""
    forward = FORWARDS[head[0].device.type]  # type: ignore[union-attr]
    wide = [part is not None and part.dtype != dtype for part in head]
    return forward(*rounded(head, dtype), *others, *rest, wide=wide)
