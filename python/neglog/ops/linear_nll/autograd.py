"""The derivative of linear_nll, and the shorter form that eager calls take.

eager      gives the gradients formed in the forward away, where the registered op copies them
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from neglog import torch_state
from neglog.ops.define import save, saved, second_derivative
from neglog.ops.linear_nll import schema
from neglog.ops.linear_nll.schedule import ROWS, forward, nothing_formed, scaled_in_place
from neglog.ops.nll import formula
from neglog.ops.nll.autograd import Rows
from neglog.ops.nll.schema import NONE, Options

HEAD = ("input", "linear_weight", "linear_bias")
# Of EagerLinearNLL: those of the op, and the dtype.
ARGUMENTS = 1 + len(schema.forward.Arguments._fields)


def linear_nll(head: Sequence[Tensor | None], dtype: torch.dtype, *others: Any) -> Rows:
    """Loss and statistics of a head (input, linear_weight, linear_bias) that is rounded to `dtype`.
    Other arguments as the op neglog::linear_nll."""
    input: Any = head[0]
    stats = schema.forward.Arguments(*head, *others).stats
    # Hooks of saved tensors (checkpointing, offloading) get all that is saved, gradients too.
    plain = input.device.type in ROWS
    plain = plain and not torch_state.traced(input) and not torch_state.transforming()
    if plain and not torch_state.saved_tensors_hooked():
        return Rows.of(Rows(*EagerLinearNLL.apply(*head, dtype, *others)), stats)
    return Rows.of(schema.forward(*cast(head, dtype), *others), stats)


def cast(head: Sequence[Tensor | None], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(None if part is None else part.to(dtype) for part in head)


def _setup(ctx: Any, a: Any, results: Any) -> None:
    formed = (results.grad_input, results.grad_weight, results.grad_bias)
    ctx.mark_non_differentiable(results.total_weight, results.correct, results.argmax, *formed)
    save(
        ctx, input=a.input, linear_weight=a.linear_weight, linear_bias=a.linear_bias,
        target=a.target, weight=a.weight, token_weight=a.token_weight,
        total_weight=results.total_weight, grad_input=formed[0], grad_weight=formed[1],
        grad_bias=formed[2],
    )  # fmt: skip
    ctx.options = Options.of(a)
    ctx.tiles = (a.workspace, a.tile_dtype, a.filter_eps, a.backend)


def _backward(ctx: Any, grad: Any) -> dict[str, Any]:
    upstream = (grad.loss, grad.lse, grad.entropy)
    return _gradients(ctx, upstream, tuple(saved(ctx).values()), ctx.wanted[:3])


def _gradients(
    ctx: Any, upstream: tuple[Any, Any, Any], kept: tuple, wanted: Sequence[bool]
) -> dict[str, Any]:
    """By the registered op, which is itself differentiable. upstream: of loss, lse and entropy."""
    grad_loss, *others = upstream
    if grad_loss is None:
        total_weight = kept[6]
        grad_loss = total_weight.new_zeros(())
    made = schema.backward(grad_loss, *others, *kept, *ctx.options, list(wanted), *ctx.tiles)
    return {name: g for name, g, want in zip(HEAD, made, wanted, strict=True) if want}


def _setup_backward(ctx: Any, a: Any, results: Any) -> None:
    save(
        ctx, grad_loss=a.grad_loss, grad_lse=a.grad_lse, grad_entropy=a.grad_entropy,
        input=a.input, linear_weight=a.linear_weight, linear_bias=a.linear_bias, target=a.target,
        weight=a.weight, token_weight=a.token_weight, total_weight=a.total_weight,
    )  # fmt: skip
    ctx.options = Options.of(a)


def _double_backward(ctx: Any, grad: Any) -> dict[str, Any]:
    """By the formula, with the logits in memory."""
    kept, options = saved(ctx), ctx.options

    upstream = formula.upstream_of(kept)

    def of_logits(logits: Tensor) -> tuple[Tensor, ...]:
        given = (kept["target"], kept["weight"], kept["token_weight"], kept["total_weight"])
        return formula.differentiable(upstream, logits, *given, options)

    counted = formula.counted_rows(kept["target"], kept["token_weight"], options.ignore_index)
    return second_derivative_of_head(of_logits, upstream, kept, counted, grad)


def second_derivative_of_head(
    of_logits: Callable[[Tensor], tuple[Tensor, ...]], upstream: dict[str, Tensor],
    kept: dict[str, Any], counted: Tensor | None, grad: Any,
) -> dict[str, Any]:  # fmt: skip
    """Of the results that `of_logits` gives, for each of which `upstream` has a gradient, a loss
    first. kept: HEAD. counted: which rows do, None for all. grad: what arrives for the gradients of
    HEAD."""
    inputs = {name: kept[name] for name in HEAD if kept[name] is not None}

    def forward(input: Tensor, *projection: Tensor) -> tuple[Tensor, ...]:
        if counted is None:
            return of_logits(torch.nn.functional.linear(input, *projection))
        rows = torch.where(counted[:, None], input, 0)  # what does not count may be NaN
        loss, *others = of_logits(torch.nn.functional.linear(rows, *projection))
        # The op computes no log-sum-exp of ignored rows.
        return loss, *(torch.where(counted, x, 0) for x in others)

    arrived = {name: g for name, g in grad._asdict().items() if name in inputs}
    return second_derivative(forward, upstream, inputs, arrived)


schema.forward.differentiable(_setup, _backward)
schema.backward.differentiable(_setup_backward, _double_backward)


class EagerLinearNLL(Function):
    """Loss, lse, correct, entropy, argmax of a head, which is rounded to `dtype` here: so the
    gradients of what autocast rounds are never rounded themselves.

    The first backward has the memory of what the forward formed: a copy would be as large as the
    weight. For one after it (retain_graph) the forward runs again.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        head, dtype, others = inputs[:3], inputs[3], inputs[4:]
        a = schema.forward.Arguments(*head, *others)
        loss, lse, total_weight, correct, entropy, argmax, *ctx.formed = _formed(
            head, dtype, others
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(correct, argmax)
        given = (a.target, a.weight, a.token_weight, a.num_items)
        ctx.save_for_backward(*head, *given, total_weight)
        ctx.dtype, ctx.rest = dtype, others[len(given) :]
        ctx.options = Options.of(a)
        ctx.tiles = (a.workspace, a.tile_dtype, a.filter_eps, a.backend)
        return loss, lse, correct, entropy, argmax

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Any, grad_lse: Any, correct: Any, grad_entropy: Any, *undefined: Any
    ) -> tuple:
        none = (None,) * ARGUMENTS
        if grad_loss is None and grad_lse is None and grad_entropy is None:
            return none
        *head, target, weight, token_weight, num_items, total_weight = ctx.saved_tensors
        wanted, dtypes = ctx.needs_input_grad[:3], [None if x is None else x.dtype for x in head]
        formed, ctx.formed = ctx.formed, None
        # With create_graph the gradients have a graph of their own.
        alone = grad_lse is None and grad_entropy is None
        alone = alone and torch_state.plain_upstream(grad_loss)
        if alone and ctx.options.reduction != NONE:
            if formed is None:
                given = (target, weight, token_weight, num_items, *ctx.rest)
                formed = _formed(head, ctx.dtype, given)[-3:]
            scaled = scaled_in_place(
                grad_loss, formed, total_weight, ctx.options.reduction, wanted, dtypes, ctx.dtype
            )
            if scaled is not None:
                return *scaled, *none[3:]
        rounded = cast(head, ctx.dtype)
        given = (target, weight, token_weight, total_weight)
        kept = (*rounded, *given, *(formed or nothing_formed(rounded[0])))
        found = _gradients(ctx, (grad_loss, grad_lse, grad_entropy), kept, wanted)
        wide = (
            found[name].to(dtype) if name in found else None
            for name, dtype in zip(HEAD, dtypes, strict=True)
        )
        return *wide, *none[3:]


def _formed(
    head: Sequence[Tensor | None], dtype: torch.dtype, others: Sequence[Any]
) -> tuple[Tensor, ...]:
    """The op, but that gradients are as wide as what they are of."""
    wide = [part is not None and part.dtype != dtype for part in head]
    a = schema.forward.Arguments(*cast(head, dtype), *others)
    return forward(ROWS[a.input.device.type], a, wide)
