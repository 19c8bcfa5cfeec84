"""The head's output as a node of autograd, and the way from a fused loss back to it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from neglog.integrations.deferred.recipe import Product, Recipe
from neglog.integrations.deferred.report import Report
from neglog.integrations.deferred.state import Family, State, asking
from neglog.integrations.deferred.tensor import DeferredLogits, Read, wrap


def deferred_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, report: Report
) -> DeferredLogits:
    """hidden @ weight.T + bias, not made."""
    product = Product.of(hidden, weight, bias, report)
    dtype = product.autocast or weight.dtype
    shape = (*hidden.shape[:-1], weight.shape[0])

    def replay() -> Tensor:
        product.check()
        report.made[asking()] += 1
        with torch.autocast(hidden.device.type, enabled=False):
            return product.logits()

    meta = torch.empty(shape, dtype=dtype, device="meta")
    state = State(Recipe((product,), len(shape) - 1), meta, replay)
    Family().add(state)
    return _Head.apply(hidden, weight, bias, state)


class _Head(Function):
    """A linear layer's own backward, of a forward that computes nothing.

    Logits must be some node's output: a Function of a user's finds no graph behind a leaf.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, state: State
    ) -> DeferredLogits:  # fmt: skip
        ctx.save_for_backward(hidden, weight)
        ctx.set_materialize_grads(False)  # where a loss was fused there is none, not zeros
        assert state.recipe is not None
        ctx.autocast = state.recipe.products[0].autocast
        ctx.bias_dtype = None if bias is None else bias.dtype
        return wrap(state)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:
            return None, None, None, None
        hidden, weight = ctx.saved_tensors
        of_hidden, of_weight, of_bias, _ = ctx.needs_input_grad
        dtype = grad.dtype if ctx.autocast is None else ctx.autocast
        rows = grad.reshape(-1, grad.shape[-1])
        grads: list[Tensor | None] = [None, None, None]
        if of_hidden:
            grads[0] = (rows @ weight.to(dtype)).view(hidden.shape).to(hidden.dtype)
        if of_weight:
            columns = hidden.to(dtype).reshape(-1, hidden.shape[-1])
            grads[1] = (rows.t() @ columns).to(weight.dtype)
        if of_bias:
            grads[2] = rows.sum(0).to(ctx.bias_dtype)
        return (*grads, None)


def linked(result: Tensor, logits: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
    """A fused result, of which a user may still ask the gradient of the logits.

    plain(logits) is the same result of real logits, by torch's own functions.
    """
    if not result.requires_grad or not logits.requires_grad:
        return result
    return _Link.apply(result, logits, plain)


class _Link(Function):
    """The gradient goes to the fused loss, or, where someone waits for it there, to the logits.

    The edge to the logits stays in both cases: DistributedDataParallel counts on its nodes.
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, logits: DeferredLogits, plain: Any) -> Tensor:
        ctx.logits, ctx.plain = logits, plain
        ctx.seen = [weakref.ref(x) for x in (logits, *logits._state.ancestors())]
        return result.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        family = [x for ref in ctx.seen if (x := ref()) is not None]
        fused = ctx.next_functions[0][0]
        if not _awaited(family) and (fused is None or _to_be_run(fused)):
            # A loss that is kept is not to keep the hidden states.
            ctx.logits = None
            return grad, None, None
        logits = ctx.logits if ctx.logits is not None else ctx.seen[0]()
        if logits is None:
            raise RuntimeError(
                "logits: their gradient was asked for in a second backward, and they are gone; ask "
                "for it in the first (retain_grad, a hook, torch.autograd.grad), or keep them"
            )
        more = torch.is_grad_enabled()  # create_graph
        with torch.enable_grad():
            real = Read.apply(logits)
            (gradient,) = torch.autograd.grad(ctx.plain(real), real, grad, create_graph=more)
        return None, gradient, None


def _awaited(family: list[Any]) -> bool:
    """Whether someone asked for the gradient of one of these logits."""
    with torch._C.DisableTorchFunctionSubclass():
        return any(x.retains_grad or x._state.captured or _hooked(x) for x in family)


def _hooked(x: Tensor) -> bool:
    hooks = x._backward_hooks or {}
    return any(
        not getattr(h, "__module__", "").startswith("torch.distributed") for h in hooks.values()
    )


def _to_be_run(node: Any) -> bool:
    """Whether the backward that goes on will come to a node."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # of a backward that was given no inputs it cannot be asked
        return True
