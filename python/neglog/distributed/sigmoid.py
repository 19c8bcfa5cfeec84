"""The loss by sigmoids over the processes of a group, with keys that go round.

neglog::group_sigmoid            the sum of this process's queries with the keys of all
neglog::group_sigmoid_backward   gradients of query, key, scale and bias

What each process's sum is multiplied with is known in the backward alone, and a key's gradient is
made of all of them: so the backward makes the scores again, while the keys go round again.
Arguments as neglog::pairs_sigmoid; positive counts columns over the keys of all processes, and
key_group (total,) is theirs.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from neglog.distributed.blocks import Blocks
from neglog.distributed.exchange import gather_rows
from neglog.ops.define import Op, save, saved, second_derivative
from neglog.ops.dtypes import real_dtype
from neglog.ops.pairs import formula, schema
from neglog.ops.pairs.autograd import SIGMOID, SIGMOID_OTHERS, named
from neglog.ops.pairs.schedule import TILES, Sums, dot_rows
from neglog.ops.pairs.schema import Pairs

ARGUMENTS = (
    "Tensor query, Tensor key, Tensor scale, Tensor bias, Tensor positive, Tensor? query_group, "
    "Tensor? key_group, int workspace, ScalarType tile_dtype, str backend, SymInt[] rows, str group"
)
forward = Op(f"group_sigmoid({ARGUMENTS}) -> Tensor")
backward = Op(
    f"group_sigmoid_backward(Tensor grad, {ARGUMENTS}, int[4] wanted) -> "
    "(Tensor query, Tensor key, Tensor scale, Tensor bias)"
)
FLAGS = ("workspace", "tile_dtype", "backend", "rows", "group")


def _blocks(op: str, a: Any) -> Blocks:
    """With what group_pairs has besides."""
    return Blocks(op, SimpleNamespace(**a._asdict(), excluded=None, columns=False, exchange="ring"))


def _forward(a: Any) -> Tensor:
    blocks = _blocks("group_sigmoid", a)
    loss, slopes = _two_sums(blocks.pairs.query)

    def visit(columns: slice, keys: Tensor) -> None:
        part = blocks.part(columns, keys)
        for kernels, similarity, down, across in blocks.tiles(part, False):
            kernels.sigmoid(similarity, down, across, loss, slopes)

    blocks.visit(None, visit, None)
    return loss.sum().to(blocks.pairs.real)


def _two_sums(query: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row, its loss and the sum of the gradients of its scores."""
    loss, slopes = (query.new_zeros(len(query), dtype=torch.float64) for _ in range(2))
    return loss, slopes


def _backward(a: Any) -> tuple[Tensor, ...]:
    blocks, wanted = _blocks("group_sigmoid_backward", a), a.wanted
    pairs, by_rows = blocks.pairs, a.wanted[0] or a.wanted[2]
    loss, slopes = _two_sums(pairs.query)
    onto = torch.zeros_like(pairs.query, dtype=pairs.real)
    grad = a.grad.to(pairs.real)

    def visit(columns: slice, keys: Tensor) -> Tensor | None:
        part = blocks.part(columns, keys)
        sums = Sums(part, by_rows, wanted[1], onto)
        for kernels, gradient, down, across in blocks.tiles(part, False):
            kernels.sigmoid(gradient, down, across, loss, slopes)
            sums.add(gradient, down, across)
        return sums.by_column.mul_(pairs.scale * grad) if wanted[1] else None

    of_keys = blocks.visit(None, visit, Tensor.add_ if wanted[1] else None)
    query, key, scale, bias = (grad.new_empty(0) for _ in range(4))
    if wanted[2]:
        scale = (dot_rows(pairs.query, onto).sum() * grad).reshape(a.scale.shape)
    if wanted[0]:
        query = onto.mul_(pairs.scale * grad)
    if of_keys is not None:
        key = of_keys
    if wanted[3]:
        bias = (slopes.sum() * grad).to(pairs.real)
    return query.to(pairs.query.dtype), key.to(pairs.query.dtype), scale, bias


def _set_up(ctx: Any, a: Any, results: Any) -> None:
    save(ctx, **named(a, SIGMOID + SIGMOID_OTHERS))
    ctx.flags = named(a, FLAGS)


def _derivative(ctx: Any, grad: Any) -> dict[str, Any]:
    wanted = named(ctx.wanted, SIGMOID)
    made = backward(
        grad.result, *saved(ctx).values(), *ctx.flags.values(), list(wanted.values())
    )  # fmt: skip
    return {name: getattr(made, name) for name, want in wanted.items() if want}


def _set_up_backward(ctx: Any, a: Any, results: Any) -> None:
    save(ctx, **named(a, ("grad", *SIGMOID, *SIGMOID_OTHERS)))
    ctx.flags = named(a, FLAGS)


def _second(ctx: Any, grad: Any) -> dict[str, Any]:
    kept = saved(ctx)
    inputs, others = ({name: kept[name] for name in names} for names in (SIGMOID, SIGMOID_OTHERS))

    def run(query: Tensor, key: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        keys = gather_rows(key, ctx.flags["rows"], ctx.flags["group"])
        return (formula.sigmoid(Pairs.of_sigmoid(query, keys, scale, bias, *others.values())),)

    return second_derivative(run, {"grad": kept["grad"]}, inputs, grad._asdict())


forward.shapes(lambda a: a.query.new_empty((), dtype=real_dtype(a.query.dtype)))
backward.shapes(schema.sigmoid_backward_shapes)
forward.differentiable(_set_up, _derivative)
backward.differentiable(_set_up_backward, _second)
for _device in TILES:
    forward.implement(_device, _forward)
    backward.implement(_device, _backward)
