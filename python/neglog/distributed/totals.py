"""Sums over the keys of the processes of a group that name a query's id, and statistics of scores.

neglog::group_sums          of each query, the sum of the keys of all processes that have its id
neglog::group_sums_back     its transpose: of each key, the sum over the queries that have its id
neglog::group_statistics    correct, entropy, best and highest of each query's scores

Sums are formed in double where the device has it. Like group_pairs they take the keys a block at a
time: gathered, or as they go round; the transpose needs no keys, and only sums go round.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neglog.distributed.blocks import PAIRS, Blocks, visit_blocks
from neglog.distributed.exchange import ranks_of
from neglog.ops.define import Op
from neglog.ops.dtypes import real_dtype
from neglog.ops.pairs import formula
from neglog.ops.pairs.schedule import TILES
from neglog.tiles import plan

SUMS = "Tensor query_ids, Tensor key_ids, SymInt[] rows, str exchange, str group"
sums = Op(f"group_sums(Tensor keys, {SUMS}) -> Tensor")
transposed = Op(f"group_sums_back(Tensor grad, SymInt own_keys, {SUMS}) -> Tensor")
statistics = Op(
    f"group_statistics({PAIRS}, Tensor lse, Tensor positive_score) -> "
    "(Tensor correct, Tensor entropy, Tensor best, Tensor highest)"
)


# Sums


def sums_by_id(query_ids: Tensor, key_ids: Tensor, keys: Tensor) -> Tensor:
    """Of each query, the sum of the keys with its id, (N, D), in the order of the keys."""
    if not keys.shape[0]:
        return keys.new_zeros(query_ids.shape[0], *keys.shape[1:])
    found = key_ids.sort(stable=True)[0]
    place = torch.searchsorted(found, key_ids.contiguous())
    of_ids = add_rows(torch.zeros_like(keys), place, keys)
    place = torch.searchsorted(found, query_ids.contiguous()).clamp(max=found.shape[0] - 1)
    return torch.where((found[place] == query_ids)[:, None], of_ids[place], 0)


def add_rows(total: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """`total` with x_i added to its row index_i, in one order: on CUDA threads race in
    index_add."""
    if x.is_cuda:
        return total.index_put((index,), x, accumulate=True)
    return total.index_add(0, index, x)


def _sums(a: Any) -> Tensor:
    ranks = ranks_of(a)
    total = a.keys.new_zeros(a.query_ids.shape[0], a.keys.shape[1], dtype=torch.float64)

    def visit(columns: slice, keys: Tensor) -> None:
        total.add_(sums_by_id(a.query_ids, a.key_ids[columns], keys.double()))

    row_bytes = a.keys.shape[1] * real_dtype(a.keys.dtype).itemsize
    gathers = a.exchange == "gather"
    visit_blocks(ranks, gathers, a.keys.contiguous(), row_bytes, None, visit, None)
    return total


def _transposed(a: Any) -> Tensor:
    ranks, grad = ranks_of(a), a.grad.double()

    def visit(columns: slice, _: Tensor) -> Tensor:
        return sums_by_id(a.key_ids[columns], a.query_ids, grad)

    nothing = grad.new_empty(ranks.rows[ranks.rank], 0)
    gathers, row_bytes = a.exchange == "gather", grad.shape[1] * grad.itemsize
    found = visit_blocks(ranks, gathers, nothing, row_bytes, None, visit, Tensor.add_)
    assert found is not None
    return found


def _set_up(ctx: Any, a: Any, results: Any) -> None:
    ctx.save_for_backward(a.query_ids, a.key_ids)
    ctx.dtype, ctx.flags = a[0].dtype, (a.rows, a.exchange, a.group)
    ctx.own_keys = a[0].shape[0] if "keys" in a._fields else a.own_keys


def _of_keys(ctx: Any, grad: Any) -> dict[str, Any]:
    found = transposed(grad.result, ctx.own_keys, *ctx.saved_tensors, *ctx.flags)
    return {"keys": found.to(ctx.dtype)}


def _of_grad(ctx: Any, grad: Any) -> dict[str, Any]:
    return {"grad": sums(grad.result, *ctx.saved_tensors, *ctx.flags)}


def _sum_shape(a: Any) -> Tensor:
    return a.keys.new_empty(a.query_ids.shape[0], a.keys.shape[1], dtype=torch.float64)


sums.shapes(_sum_shape)
transposed.shapes(lambda a: a.grad.new_empty(a.own_keys, a.grad.shape[1], dtype=torch.float64))
sums.differentiable(_set_up, _of_keys)
transposed.differentiable(_set_up, _of_grad)


# Statistics


def _statistics(a: Any) -> tuple[Tensor, ...]:
    """lse (N,): of all scores of a row, the positive's among them. positive_score is used where the
    positives are not among the keys."""
    blocks = Blocks("group_pairs", a)
    pairs, among = blocks.pairs, blocks.pairs.positive is not None
    count = pairs.shape[0]
    own = a.positive_score.clone()
    entropy, highest = torch.zeros_like(a.lse), torch.full_like(a.lse, -torch.inf)
    best = torch.zeros(count, dtype=torch.int64, device=a.lse.device)
    shift = torch.where(a.lse == -torch.inf, 0, a.lse)

    def visit(columns: slice, keys: Tensor) -> None:
        if not keys.shape[0]:
            return
        part = blocks.part(columns, keys)
        height = plan.rows_per_tile(count, keys.shape[0] * own.itemsize, formula.STATISTICS_BYTES)
        for rows in plan.row_tiles(count, height):
            some = part.rows(rows)
            plain, z = formula.scores(some)
            entropy[rows] += formula.entropy_terms(z - shift[rows, None]).sum(1)
            largest, place = z.max(1)
            # A NaN is the highest, as torch.max has it.
            above = (largest > highest[rows]) | (largest.isnan() & ~highest[rows].isnan())
            best[rows] = torch.where(above, place + columns.start, best[rows])
            highest[rows] = torch.where(above, largest, highest[rows])
            if some.positive is not None:
                here = (some.positive >= 0) & (some.positive < keys.shape[0])
                index = torch.where(here, some.positive, 0)[:, None]
                # From this product: another may round differently, and would seem to be beaten.
                own[rows] = torch.where(here, plain.gather(1, index).squeeze(1), own[rows])

    blocks.visit(None, visit, None)
    if not among:
        entropy += formula.entropy_terms(own - shift)
        best = torch.where(own >= highest, -1, best)
        highest = torch.where(highest > own, highest, own)
    return own >= highest, entropy, best, highest


def _statistics_shapes(a: Any) -> tuple[Tensor, ...]:
    rows, new = a.query.shape[0], a.lse.new_empty
    return (
        new(rows, dtype=torch.bool), torch.empty_like(a.lse), new(rows, dtype=torch.int64),
        torch.empty_like(a.lse),
    )  # fmt: skip


statistics.shapes(_statistics_shapes)
for _device in TILES:
    sums.implement(_device, _sums)
    transposed.implement(_device, _transposed)
    statistics.implement(_device, _statistics)
