"""The derivatives of the ops of pairs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from neglog.ops.define import save, saved, second_derivative
from neglog.ops.pairs import (
    formula,
    schedule,  # noqa: F401 - implements the ops
    schema,
)
from neglog.ops.pairs.schema import UPSTREAM, Pairs

forward, sigmoid = schema.forward, schema.sigmoid

LEARNED = ("query", "key", "scale")
OTHERS = ("bias", "positive", "excluded", "query_group", "key_group")
FLAGS = ("columns", "symmetric", "workspace", "tile_dtype", "backend")


def named(a: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(a, name) for name in names}


def _setup(ctx: Any, a: Any, results: Any) -> None:
    ctx.mark_non_differentiable(results.row_low, results.column_low, results.kept)
    kept = ("row_lse", "column_lse", "row_low", "column_low", "kept")
    save(ctx, **named(a, LEARNED + OTHERS), **named(results, kept))
    ctx.flags = named(a, FLAGS)


def _backward(ctx: Any, grad: Any) -> dict[str, Any]:
    wanted = named(ctx.wanted, LEARNED)
    if ctx.flags["symmetric"]:  # key is query, which takes the gradient of both
        wanted |= {"query": wanted["query"] or wanted["key"], "key": False}
    kept, pairs = saved(ctx), {}
    for name in LEARNED + OTHERS:
        pairs[name] = kept.pop(name)
    made = schema.backward(
        *grad[: len(UPSTREAM)], *pairs.values(), *ctx.flags.values(), *kept.values(),
        list(wanted.values()),
    )  # fmt: skip
    return {name: getattr(made, name) for name, want in wanted.items() if want}


def _setup_backward(ctx: Any, a: Any, results: Any) -> None:
    save(ctx, **named(a, UPSTREAM + LEARNED + OTHERS))
    ctx.flags = named(a, FLAGS)


def _double_backward(ctx: Any, grad: Any) -> dict[str, Any]:
    kept = saved(ctx)
    upstream = {name: kept[name] for name in UPSTREAM}
    inputs = {name: kept[name] for name in LEARNED}
    others = {name: kept[name] for name in OTHERS} | ctx.flags
    if ctx.flags["symmetric"]:  # key is query, and its gradient is that of both
        del inputs["key"]

    def forward(*learned: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(inputs, learned, strict=True))
        return formula.pairs(Pairs(**{"key": given["query"]} | given | others))

    return second_derivative(forward, upstream, inputs, named(grad, tuple(inputs)))


schema.forward.differentiable(_setup, _backward)
schema.backward.differentiable(_setup_backward, _double_backward)


def statistics(positive_score: Tensor, *pairs: Any) -> Any:
    """correct, entropy and best (N,), without gradient."""
    return schema.statistics(
        *(x.detach() if isinstance(x, Tensor) else x for x in (positive_score, *pairs))
    )


# The loss by sigmoids

SIGMOID = ("query", "key", "scale", "bias")
SIGMOID_OTHERS = ("positive", "query_group", "key_group")


def _setup_sigmoid(ctx: Any, a: Any, results: Any) -> None:
    ctx.mark_non_differentiable(*results[1:])
    formed = results._asdict()
    del formed["loss"]
    save(ctx, **named(a, SIGMOID + SIGMOID_OTHERS), **formed)
    ctx.tiles = (a.workspace, a.tile_dtype, a.backend)


def _sigmoid_backward(ctx: Any, grad: Any) -> dict[str, Any]:
    wanted = named(ctx.wanted, SIGMOID)
    made = schema.sigmoid_backward(
        grad.loss, *saved(ctx).values(), *ctx.tiles, list(wanted.values())
    )
    return {name: getattr(made, name) for name, want in wanted.items() if want}


def _setup_sigmoid_backward(ctx: Any, a: Any, results: Any) -> None:
    save(ctx, **named(a, ("grad", *SIGMOID, *SIGMOID_OTHERS)))


def _sigmoid_double_backward(ctx: Any, grad: Any) -> dict[str, Any]:
    kept = saved(ctx)
    inputs = {name: kept[name] for name in SIGMOID}
    others = {name: kept[name] for name in SIGMOID_OTHERS}

    def forward(*learned: Any) -> tuple[Tensor, ...]:
        return (formula.sigmoid(Pairs.of_sigmoid(*learned, **others)),)

    return second_derivative(forward, {"grad": kept["grad"]}, inputs, grad._asdict())


schema.sigmoid.differentiable(_setup_sigmoid, _sigmoid_backward)
schema.sigmoid_backward.differentiable(_setup_sigmoid_backward, _sigmoid_double_backward)
