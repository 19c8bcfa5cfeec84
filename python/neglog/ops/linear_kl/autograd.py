"""The derivative of linear_kl, and the shorter form that eager calls take: as those of linear_nll.

eager      gives the gradients formed in the forward away, where the registered op copies them
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from neglog import torch_state
from neglog.ops.define import save, saved
from neglog.ops.kl import formula
from neglog.ops.kl.autograd import Compared
from neglog.ops.kl.schema import Options
from neglog.ops.linear_kl import schema
from neglog.ops.linear_kl.schedule import RUN, forward
from neglog.ops.linear_nll.autograd import HEAD, cast, second_derivative_of_head
from neglog.ops.linear_nll.schedule import nothing_formed, scaled_in_place
from neglog.ops.nll.formula import counted_rows
from neglog.ops.nll.schema import NONE

TAUGHT = ("teacher", "teacher_weight", "teacher_bias", "ids", "target", "token_weight")
TILES = ("workspace", "tile_dtype", "filter_eps", "backend")
ARGUMENTS = 1 + len(schema.forward.Arguments._fields)


def linear_kl(head: Sequence[Tensor | None], dtype: torch.dtype, *others: Any) -> Compared:
    """Of a head (input, linear_weight, linear_bias) that is rounded to `dtype`. Other arguments as
    the op neglog::linear_kl."""
    input: Any = head[0]
    plain = input.device.type in RUN
    plain = plain and not torch_state.traced(input) and not torch_state.transforming()
    if plain and not torch_state.saved_tensors_hooked():
        return Compared(*EagerLinearKL.apply(*head, dtype, *others))
    found = schema.forward(*cast(head, dtype), *others)
    return Compared(found.loss, found.divergence, found.cross_entropy)


def _named(a: Any, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(a, name) for name in names}


def _setup(ctx: Any, a: Any, results: Any) -> None:
    formed = _named(results, ("grad_input", "grad_weight", "grad_bias"))
    parts = (results.divergence, results.cross_entropy)
    ctx.mark_non_differentiable(results.total_weight, *parts, *formed.values())
    save(ctx, **_named(a, (*HEAD, *TAUGHT)), total_weight=results.total_weight, **formed)
    ctx.reduction, ctx.options = a.reduction, Options.of(a)
    ctx.tiles = _named(a, TILES).values()


def _backward(ctx: Any, grad: Any) -> dict[str, Any]:
    return _gradients(ctx, grad.loss, tuple(saved(ctx).values()), ctx.wanted[:3])


def _gradients(ctx: Any, grad_loss: Tensor, kept: tuple, wanted: Sequence[bool]) -> dict[str, Any]:
    """By the registered op, which is itself differentiable."""
    given = (*kept, ctx.reduction, *ctx.options, list(wanted), *ctx.tiles)
    made = schema.backward(grad_loss, *given)
    return {name: g for name, g, want in zip(HEAD, made, wanted, strict=True) if want}


def _setup_backward(ctx: Any, a: Any, results: Any) -> None:
    save(ctx, grad_loss=a.grad_loss, **_named(a, (*HEAD, *TAUGHT, "total_weight")))
    ctx.reduction, ctx.options = a.reduction, Options.of(a)


def _double_backward(ctx: Any, grad: Any) -> dict[str, Any]:
    """By the formula, with the logits in memory."""
    kept, options = saved(ctx), ctx.options
    teacher = kept["teacher"]
    if kept["teacher_weight"] is not None:
        head = (kept["teacher_weight"], kept["teacher_bias"])
        teacher = torch.nn.functional.linear(teacher, *head)

    def of_logits(logits: Tensor) -> tuple[Tensor]:
        given = (teacher, kept["ids"], kept["target"], kept["token_weight"], kept["total_weight"])
        return (formula.kl(logits, *given, ctx.reduction, options)[0],)

    counted = counted_rows(kept["target"], kept["token_weight"], options.ignore_index)
    upstream = {"grad_loss": kept["grad_loss"]}
    return second_derivative_of_head(of_logits, upstream, kept, counted, grad)


schema.forward.differentiable(_setup, _backward)
schema.backward.differentiable(_setup_backward, _double_backward)


class EagerLinearKL(Function):
    """Loss, divergence, cross_entropy of a head, which is rounded to `dtype` here; see
    EagerLinearNLL."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        head, dtype, others = inputs[:3], inputs[3], inputs[4:]
        a = schema.forward.Arguments(*head, *others)
        loss, total_weight, *parts, _, _, _ = made = _formed(head, dtype, others)
        ctx.formed = made[-3:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*parts)
        taught = tuple(_named(a, TAUGHT).values())
        ctx.save_for_backward(*head, *taught, a.num_items, total_weight)
        ctx.dtype, ctx.rest = dtype, others[len(taught) + 1 :]
        ctx.reduction, ctx.options, ctx.tiles = (
            a.reduction,
            Options.of(a),
            _named(a, TILES).values(),
        )
        return loss, *parts

    @staticmethod
    def backward(ctx: Any, grad_loss: Any, *undefined: Any) -> tuple:
        none = (None,) * ARGUMENTS
        if grad_loss is None:
            return none
        *tensors, num_items, total_weight = ctx.saved_tensors
        head, taught = tensors[:3], tensors[3:]
        wanted, dtypes = ctx.needs_input_grad[:3], [None if x is None else x.dtype for x in head]
        formed, ctx.formed = ctx.formed, None
        if torch_state.plain_upstream(grad_loss) and ctx.reduction != NONE:
            if formed is None:
                formed = _formed(head, ctx.dtype, (*taught, num_items, *ctx.rest))[-3:]
            scaled = scaled_in_place(
                grad_loss, formed, total_weight, ctx.reduction, wanted, dtypes, ctx.dtype
            )
            if scaled is not None:
                return *scaled, *none[3:]
        rounded = cast(head, ctx.dtype)
        kept = (*rounded, *taught, total_weight, *(formed or nothing_formed(rounded[0])))
        found = _gradients(ctx, grad_loss, kept, wanted)
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
    return forward(schema.forward.Arguments(*cast(head, dtype), *others), wide)
