"""pairs over the processes of a group: this one's queries with the keys of all.

neglog::group_pairs            as neglog::pairs: of this process's queries, and of its own keys
neglog::group_pairs_backward   gradients of query, key and scale

Each score is made by one process, that of its query. What it adds to the log-sum-exp of a column,
and to the gradient of a key, goes to the key's process. So both directions of a symmetric loss take
one product of each pair of blocks, and the queries stay where they are.

exchange "gather": the keys of all processes come here, (total, D), and gradients of that size go
back. "ring": some rows of keys at a time go round, and their gradients come home with them; nothing
here has the size of all keys, and the backward sends them round again.

Arguments as neglog::pairs, but: positive and excluded (N,) count columns over the keys of all
processes, -1 for none; bias (total,) and key_group (total,) are those of all keys. With `columns` a
process has as many queries as keys, and the positive of each is a key of its own. rows: how many
keys each process has. Of the results column_loss is by row, and column_lse and column_low (M,) are
of this process's keys. keys: those of all, for the backward of "gather", else (0,).

The gradients are those of the sum over processes of what flows in: each process has those of its
own queries and keys, and of `scale` the part that its own queries have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from neglog.distributed import exchange
from neglog.distributed.blocks import FLAGS, PAIRS, Blocks, pairs_of
from neglog.distributed.exchange import gather_rows, ranks_of
from neglog.ops.define import Op, save, saved, second_derivative
from neglog.ops.dtypes import real_dtype
from neglog.ops.memory import contiguous
from neglog.ops.pairs import formula, schema
from neglog.ops.pairs.autograd import LEARNED, OTHERS, named
from neglog.ops.pairs.schedule import TILES, Sums, dot_rows, largest_of, total_of
from neglog.ops.pairs.schema import UPSTREAM, Marginal, Upstream
from neglog.ops.pairs.states import States

forward = Op(
    f"group_pairs({PAIRS}) -> (Tensor row_loss, Tensor column_loss, Tensor row_lse, "
    "Tensor column_lse, Tensor positive_score, Tensor row_low, Tensor column_low, Tensor keys)"
)
backward = Op(
    "group_pairs_backward(Tensor? grad_row_loss, Tensor? grad_column_loss, Tensor? grad_row_lse, "
    f"Tensor? grad_column_lse, Tensor? grad_positive_score, {PAIRS}, Tensor row_lse, "
    "Tensor column_lse, Tensor row_low, Tensor column_low, Tensor keys, int[3] wanted) -> "
    "(Tensor query, Tensor key, Tensor scale)"
)
STATE = ("row_lse", "column_lse", "row_low", "column_low", "keys")


# Forward


def _forward(a: Any) -> tuple[Tensor, ...]:
    blocks = Blocks("group_pairs", a)
    pairs, ranks = blocks.pairs, blocks.ranks
    rows = _new_states(pairs.query, pairs.shape[0])
    score = rows.maximum.new_zeros(pairs.shape[0] if pairs.positive is not None else 0)

    def visit(columns: slice, keys: Tensor) -> Tensor | None:
        part = blocks.part(columns, keys)
        of_columns = _new_states(keys, keys.shape[0]) if pairs.columns else None
        for kernels, similarity, down, across in blocks.tiles(part, False):
            kernels.forward(
                similarity, down, across, rows, of_columns,
                None if pairs.positive is None else score,
            )  # fmt: skip
        return None if of_columns is None else _packed(of_columns)

    keys = exchange.all_rows(pairs.key, ranks) if blocks.gathers else None
    found = blocks.visit(keys, visit, _merged if pairs.columns else None)
    row_lse, row_low = rows.finish()
    column_lse, column_low = _nothing(score), _nothing(score)
    if found is not None:
        column_lse, column_low = _unpacked(found, pairs.query).finish()
    row_loss = column_loss = None
    if pairs.positive is not None:
        row_loss = (row_lse - score).add_(row_low)
        if pairs.columns:
            own = pairs.positive - ranks.first
            column_loss = (column_lse[own] - score).add_(column_low[own])
    row_loss, column_loss = (_nothing(score) if x is None else x for x in (row_loss, column_loss))
    kept = pairs.query.new_empty(0) if keys is None else keys
    return row_loss, column_loss, row_lse, column_lse, score, row_low, column_low, kept


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0)  # the results of an op are not each other's


def _new_states(like: Tensor, count: int) -> States:
    """For scores of any size: whether all are small would be another question to all processes."""
    return States.of_both((count, 0), like, False)[0]


def _packed(states: States) -> Tensor:
    """(M, 2), as they travel."""
    return torch.stack([states.maximum.double(), states.sum], 1)


def _unpacked(found: Tensor, like: Tensor) -> States:
    return States(found[:, 0].to(real_dtype(like.dtype)), found[:, 1].contiguous())


def _merged(found: Tensor, part: Tensor) -> Tensor:
    """The states of the same columns over the rows of two processes."""
    maximum = torch.maximum(found[:, 0], part[:, 0])
    shift = torch.where(maximum == -torch.inf, 0, maximum)[:, None]
    states = torch.stack([found, part])
    total = (states[:, :, 1] * torch.exp(states[:, :, 0] - shift.squeeze(1))).sum(0)
    return torch.stack([maximum, total], 1)


# Backward


def _backward(a: Any) -> tuple[Tensor, ...]:
    blocks, wanted = Blocks("group_pairs_backward", a), a.wanted
    pairs = blocks.pairs
    row, weights, score, size = _upstream(blocks, a)
    by_rows = wanted[0] or wanted[2]
    onto = torch.zeros_like(pairs.query, dtype=pairs.real)

    def visit(columns: slice, keys: Tensor) -> Tensor | None:
        part = blocks.part(columns, keys)
        sums = Sums(part, by_rows, wanted[1], onto)
        up = Upstream(row, _of_columns(weights, columns), score, 1.0)
        for kernels, gradient, down, across in blocks.tiles(part):
            kernels.backward(gradient, down, across, up, gradient)
            sums.add(gradient, down, across)
        if not wanted[1]:
            return None
        # With this process's own scale, before it is added to what others found.
        return sums.by_column if pairs.scale.dim() else sums.by_column.mul_(pairs.scale)

    kept = a.keys if blocks.gathers else None
    of_keys = blocks.visit(kept, visit, Tensor.add_ if wanted[1] else None)
    query, key, scale = (_nothing(row.lse) for _ in range(3))
    if wanted[2]:
        scale = dot_rows(pairs.query, onto).mul_(size)
        scale = scale if pairs.scale.dim() else scale.sum()
    if wanted[0]:
        factor = pairs.scale * size
        query = onto.mul_(factor[:, None] if pairs.scale.dim() else factor)
    if of_keys is not None:
        key = of_keys.mul_(size)
    return query.to(pairs.query.dtype), key.to(pairs.query.dtype), scale


def _upstream(
    blocks: Blocks, a: Any
) -> tuple[Marginal, tuple[Tensor, Tensor | None] | None, Tensor | None, Any]:
    """Of rows; of all columns (total, 3) and of this process's by row; of the positives' scores;
    and the number that all of them were divided by, in each process the same."""
    pairs, ranks = blocks.pairs, blocks.ranks
    given = ((name, getattr(a, name)) for name in UPSTREAM)
    grads = [None if g is None or not g.numel() else contiguous(g, name) for name, g in given]
    size: Any = 1.0
    if pairs.query.itemsize == 2:  # products of small gradients and small probabilities vanish
        size = torch.as_tensor(largest_of(grads), dtype=pairs.real, device=pairs.query.device)
        size = size.clone()
        distributed.all_reduce(size, distributed.ReduceOp.MAX, ranks.group)
        grads = [None if g is None else g / size for g in grads]
    row_loss, column_loss, through_rows, through_columns, score = grads
    by_row = total_of(through_rows, row_loss)
    by_row = torch.zeros_like(a.row_lse) if by_row is None else by_row
    row = Marginal(
        contiguous(a.row_lse, "row_lse"), contiguous(a.row_low, "row_low"), by_row, row_loss
    )
    if not pairs.columns:
        return row, None, score, size
    by_column = torch.zeros_like(a.column_lse)
    if through_columns is not None:
        by_column = by_column + through_columns
    if column_loss is not None:
        assert pairs.positive is not None
        # Not index_add_: on CUDA its order is not determined.
        by_column.index_put_((pairs.positive - ranks.first,), column_loss, accumulate=True)
    own = torch.stack([a.column_lse, a.column_low, by_column], 1)
    return row, (exchange.all_rows(own, ranks), column_loss), score, size


def _of_columns(weights: tuple[Tensor, Tensor | None] | None, columns: slice) -> Marginal | None:
    if weights is None:
        return None
    of_all, by_row = weights
    lse, low, weight = (x.contiguous() for x in of_all[columns].unbind(1))
    return Marginal(lse, low, weight, by_row)


# In torch's functions, and derivatives


def by_formula(a: Any) -> tuple[Tensor, ...]:
    """The five results that have a gradient, each rank's scores in memory: its queries with all
    keys and, with columns, all queries with its keys."""
    rows, name = a.rows, a.group
    pairs = pairs_of(a)._replace(columns=False)
    of_rows = formula.pairs(pairs._replace(key=gather_rows(a.key, rows, name)))
    if not a.columns:
        return of_rows
    ranks = ranks_of(a)
    # The scale first: its gradient is that of this process's queries.
    real = pairs.real
    scaled = a.query.to(real) * (a.scale[:, None] if a.scale.dim() else a.scale)

    def of_all(x: Tensor | None, start: int = 0) -> Tensor | None:
        return None if x is None else gather_rows(x, rows, name) - start

    def own(x: Tensor | None) -> Tensor | None:
        return x[ranks.own] if x is not None and x.dim() else x

    columns = pairs._replace(
        query=gather_rows(scaled, rows, name), key=a.key.to(real), scale=a.scale.new_ones(()),
        bias=own(a.bias), positive=of_all(a.positive, ranks.first),
        excluded=of_all(a.excluded, ranks.first), query_group=of_all(a.query_group),
        key_group=own(a.key_group),
    )  # fmt: skip
    column_lse = formula.log_sum_exp(formula.scores(columns)[1], 0)
    row_loss, column_loss, row_lse, _, score = of_rows
    if a.positive is not None:
        column_loss = column_lse[a.positive - ranks.first] - score
    return row_loss, column_loss, row_lse, column_lse, score


def _set_up(ctx: Any, a: Any, results: Any) -> None:
    ctx.mark_non_differentiable(results.row_low, results.column_low, results.keys)
    save(ctx, **named(a, LEARNED + OTHERS), **named(results, STATE))
    ctx.flags = named(a, FLAGS)


def _derivative(ctx: Any, grad: Any) -> dict[str, Any]:
    wanted = named(ctx.wanted, LEARNED)
    kept = saved(ctx)
    pairs = [kept.pop(name) for name in LEARNED + OTHERS]
    made = backward(
        *grad[: len(UPSTREAM)], *pairs, *ctx.flags.values(), *kept.values(), list(wanted.values())
    )
    return {name: getattr(made, name) for name, want in wanted.items() if want}


def _set_up_backward(ctx: Any, a: Any, results: Any) -> None:
    save(ctx, **named(a, UPSTREAM + LEARNED + OTHERS))
    ctx.flags = named(a, FLAGS)


def _second(ctx: Any, grad: Any) -> dict[str, Any]:
    kept = saved(ctx)
    upstream, inputs = ({name: kept[name] for name in names} for names in (UPSTREAM, LEARNED))
    others = {name: kept[name] for name in OTHERS} | ctx.flags

    def run(*learned: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(inputs, learned, strict=True))
        return by_formula(forward.Arguments(**given, **others))

    return second_derivative(run, upstream, inputs, named(grad, LEARNED))


def _shapes(a: Any) -> tuple[Tensor, ...]:
    gathers = a.exchange == "gather"
    keys = a.query.new_empty((sum(a.rows), a.key.shape[1]) if gathers else 0)
    return *schema.by_row_and_column(a), keys


forward.shapes(_shapes)
backward.shapes(schema.backward_shapes)
forward.differentiable(_set_up, _derivative)
backward.differentiable(_set_up_backward, _second)
for _device in TILES:
    forward.implement(_device, _forward)
    backward.implement(_device, _backward)
