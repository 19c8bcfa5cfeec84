"""Autograd of pairs: by the registered op, and as a Function for torch.func."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from neglog.ops import pairs_composite as composite
from neglog.ops.nll_autograd import as_function
from neglog.ops.pairs import library
from neglog.ops.pairs_tile import Pairs

PAIRS = len(Pairs._fields)
UPSTREAMS = 5
SAVED = 5  # four log-sum-exps and the similarities


def log_sum_exps(pairs: Pairs, keep: bool = False) -> tuple[Tensor, ...]:
    """The op's outputs."""
    if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
        return FunctionalPairs.apply(*pairs, keep)
    return torch.ops.neglog.pairs.default(*pairs, keep)


def _setup(ctx, inputs, output):
    row_lse, column_lse, _, row_low, column_low, kept = output[2:]
    ctx.mark_non_differentiable(row_low, column_low, kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:8], row_lse, column_lse, row_low, column_low, kept)
    ctx.flags = inputs[8:PAIRS]


def _backward(ctx, *grads):
    nothing = (None,) * (PAIRS + 1)
    if all(grad is None for grad in grads[:UPSTREAMS]):
        return nothing
    tensors = ctx.saved_tensors
    pairs = Pairs(*tensors[:8], *ctx.flags)
    wanted = list(ctx.needs_input_grad[:3])
    if pairs.symmetric:  # key is query, which takes the gradient of both
        wanted = [wanted[0] or wanted[1], False, wanted[2]]
    arguments = (*grads[:UPSTREAMS], *pairs, *tensors[8:], wanted)
    if torch._C._are_functorch_transforms_active():
        made = FunctionalBackward.apply(*arguments)
    else:
        made = torch.ops.neglog.pairs_backward.default(*arguments)
    kept = (grad if want else None for grad, want in zip(made, wanted, strict=True))
    return (*kept, *nothing[3:])


def _setup_backward(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[: UPSTREAMS + 8])
    ctx.flags = inputs[UPSTREAMS + 8 : UPSTREAMS + PAIRS]
    ctx.wanted = inputs[-1]


def _double_backward(ctx, *grads):
    *upstream, query, key, scale = ctx.saved_tensors[: UPSTREAMS + 3]
    others = ctx.saved_tensors[UPSTREAMS + 3 :]

    def forward(query: Tensor, key: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return composite.pairs(Pairs(query, key, scale, *others, *ctx.flags))

    if ctx.flags[1]:  # symmetric: key is query, and its gradient is that of both
        of_upstream, made = second_derivative(
            lambda query, scale: forward(query, query, scale), upstream, (query, scale),
            (grads[0], grads[2]),
        )  # fmt: skip
        made = [made[0], None, made[1]]
    else:
        of_upstream, made = second_derivative(forward, upstream, (query, key, scale), grads)
    rest = (None,) * (len(others) + len(ctx.flags) + SAVED + 1)
    return (*of_upstream, *made, *rest)


def second_derivative(
    forward: Callable[..., tuple[Tensor, ...]],
    upstream: list[Tensor | None],
    inputs: tuple[Tensor, ...],
    grads: tuple[Tensor | None, ...],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of the upstreams and inputs of forward's own gradient, for `grads` of the latter.

    None among the upstreams means zero, and so does None, or an empty tensor, among the grads.
    """
    given = [index for index, grad in enumerate(upstream) if grad is not None]
    used = [index for index, grad in enumerate(grads) if grad is not None and grad.numel()]
    if not used:
        return [None] * len(upstream), [None] * len(inputs)

    def gradient(*values: Tensor) -> tuple[Tensor, ...]:
        outputs, pull, *_ = torch.func.vjp(forward, *values[len(given) :])
        flowing = [torch.zeros_like(output) for output in outputs]
        for index, value in zip(given, values, strict=False):
            flowing[index] = value
        made = pull(tuple(flowing))
        return tuple(made[index] for index in used)

    pullback = torch.func.vjp(gradient, *(upstream[index] for index in given), *inputs)[1]
    second = pullback(tuple(grads[index] for index in used))
    of_upstream: list[Tensor | None] = [None] * len(upstream)
    for index, value in zip(given, second, strict=False):
        of_upstream[index] = value
    return of_upstream, list(second[len(given) :])


torch.library.register_autograd("neglog::pairs", _backward, setup_context=_setup, lib=library)
torch.library.register_autograd(
    "neglog::pairs_backward", _double_backward, setup_context=_setup_backward, lib=library
)

FunctionalPairs = as_function("FunctionalPairs", torch.ops.neglog.pairs.default, _setup, _backward)
FunctionalBackward = as_function(
    "FunctionalBackward", torch.ops.neglog.pairs_backward.default, _setup_backward,
    _double_backward,
)  # fmt: skip
