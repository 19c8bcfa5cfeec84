"""Rows of the processes of a group: brought to all, summed to their owners, or sent round.

    gather_rows   all rows everywhere, (total, ...); its derivative is sum_rows
    sum_rows      (total, ...) of each process to the owners of the rows, summed; its derivative is
                  gather_rows
    rotate        one block visits all processes, and what it gathers there comes home

Processes may have unlike numbers of rows, which all know (`Ranks.rows`). What a process sends in
either op is (world - 1) / world of `total` rows, which is the least. gloo's own gather takes four
times as long, and its reduce-scatter is an all-reduce of twice the bytes: so here each process
sends to each other, but for NCCL, whose collectives are used where the rows are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed

from neglog.distributed.groups import Ranks, group_named
from neglog.ops.define import Op
from neglog.ops.dtypes import real_dtype

gather_rows = Op("gather_rows(Tensor x, SymInt[] rows, str group) -> Tensor")
sum_rows = Op("sum_rows(Tensor x, SymInt[] rows, str group) -> Tensor")
# Of what is sent round at once. Half a dozen buffers have this size: it bounds a ring's memory. On
# CUDA, not measured yet: small pieces would leave the device idle, and each costs two messages.
PIECE_BYTES, CUDA_PIECE_BYTES = 2 << 20, 16 << 20


def ranks_of(a: Any) -> Ranks:
    """Of the arguments rows and group of an op."""
    group = group_named(a.group)
    return Ranks(group, distributed.get_rank(group), tuple(a.rows))


# To all, and to the owners


def with_others(x: Tensor, ranks: Ranks) -> Tensor:
    """Rows of all processes, of which this one's own have their gradient; the others' have none."""
    parts = list(gather_rows(x.detach(), ranks.rows, ranks.name).split(list(ranks.rows)))
    parts[ranks.rank] = x
    return torch.cat(parts)


def _gather(a: Any) -> Tensor:
    return all_rows(a.x, ranks_of(a))


def _sum(a: Any) -> Tensor:
    return sum_of_own(a.x, ranks_of(a))


def all_rows(x: Tensor, ranks: Ranks) -> Tensor:
    """The rows of all processes, by rank."""
    x = x.contiguous()
    found = x.new_empty(ranks.total, *x.shape[1:])
    if _alike_on_nccl(x, ranks):
        distributed.all_gather(list(found.split(ranks.rows)), x, ranks.group)
        return found
    parts = found.split(ranks.rows)
    parts[ranks.rank].copy_(x)
    pending = []
    for step in range(1, ranks.world):
        to, source = (ranks.rank + step) % ranks.world, (ranks.rank - step) % ranks.world
        pending.append(Exchange(ranks, x, to, parts[source], source, step))
    for exchange in pending:
        exchange.wait()
    return found


def sum_of_own(x: Tensor, ranks: Ranks) -> Tensor:
    """This process's rows of the sum over processes, in the order of their distance."""
    real = real_dtype(x.dtype) if x.is_floating_point() else x.dtype
    if _alike_on_nccl(x, ranks):
        total = x.new_empty(ranks.rows[ranks.rank], *x.shape[1:], dtype=real)
        parts = list(x.to(real).contiguous().split(ranks.rows))
        distributed.reduce_scatter(total, parts, group=ranks.group)
        return total.to(x.dtype)
    return to_owners(x, ranks, Tensor.add_, real).to(x.dtype)


def to_owners(
    x: Tensor, ranks: Ranks, merge: Callable[[Tensor, Tensor], Tensor],
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """(total, ...) of each process to the owners of the rows, who merge them one after the other.

    One buffer of this process's rows is needed, and while one is merged the next arrives.
    """
    parts = x.contiguous().split(ranks.rows)
    mine = parts[ranks.rank]
    total = mine.to(dtype or x.dtype, copy=True)
    arriving: list[tuple[Exchange, Tensor]] = []
    for step in range(1, ranks.world):
        to, source = (ranks.rank + step) % ranks.world, (ranks.rank - step) % ranks.world
        part = torch.empty_like(mine)
        arriving.append((Exchange(ranks, parts[to], to, part, source, step), part))
        if len(arriving) == 2:
            total = _merged(arriving.pop(0), total, merge)
    for each in arriving:
        total = _merged(each, total, merge)
    return total


def _merged(arriving: Any, total: Tensor, merge: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    exchange, part = arriving
    exchange.wait()
    return merge(total, part)


def _alike_on_nccl(x: Tensor, ranks: Ranks) -> bool:
    return x.is_cuda and len(set(ranks.rows)) == 1


class Exchange:
    """A tensor on its way to one process, and one from another into `received`."""

    def __init__(
        self, ranks: Ranks, sent: Tensor, to: int, received: Tensor, source: int, tag: int
    ) -> None:
        group = ranks.group
        there, here = (distributed.get_global_rank(group, rank) for rank in (to, source))
        operations = []
        if sent.numel():
            operations.append(distributed.P2POp(distributed.isend, sent, there, group, tag))
        if received.numel():
            operations.append(distributed.P2POp(distributed.irecv, received, here, group, tag))
        self._sent = sent  # must outlive the call
        self._pending = distributed.batch_isend_irecv(operations) if operations else []

    def wait(self) -> None:
        """On the CPU until both are done. On CUDA it is torch's current stream that waits."""
        for each in self._pending:
            each.wait()


# Round


def pieces(ranks: Ranks, row_bytes: int, cuda: bool) -> Iterator[list[slice]]:
    """The rows of each process in some pieces, as many for all: by rank, its rows of a piece."""
    size = CUDA_PIECE_BYTES if cuda else PIECE_BYTES
    number = max(1, -(-max(ranks.rows) * row_bytes // size))
    for piece in range(number):
        yield [slice(rows * piece // number, rows * (piece + 1) // number) for rows in ranks.rows]


def rotate(
    block: Tensor, of_ranks: list[slice], ranks: Ranks,
    visit: Callable[[int, Tensor], Tensor | None],
    merge: Callable[[Tensor, Tensor], Tensor] | None,
) -> Tensor | None:  # fmt: skip
    """This process's block goes round, and so do all others'.

    visit(owner, block) is called for each block, and gives what the block takes along: (rows, ...),
    merged with what it had from others. Returned is what this process's own block comes home with;
    None without `merge`.

    While a block is worked on the next one arrives, and so does what it has gathered so far: its
    owner's left neighbour adds to it last.
    """
    world, right, left = ranks.world, (ranks.rank + 1) % ranks.world, (ranks.rank - 1) % ranks.world
    carried: Tensor | None = None
    bringing: Exchange | None = None
    for step in range(world):
        owner, following = (ranks.rank - step) % world, (ranks.rank - step - 1) % world
        arriving = None
        if step + 1 < world:
            size = of_ranks[following].stop - of_ranks[following].start
            coming = block.new_empty(size, *block.shape[1:])
            arriving = Exchange(ranks, block, right, coming, left, 2 * step)
        part = visit(owner, block)
        if merge is not None:
            assert part is not None
            if bringing is not None:
                bringing.wait()
                assert carried is not None
                part = merge(carried, part)
            size = of_ranks[following].stop - of_ranks[following].start
            if world == 1:
                return part
            carried = part.new_empty(size, *part.shape[1:])
            bringing = Exchange(ranks, part, right, carried, left, 2 * step + 1)
        if arriving is not None:
            arriving.wait()
            block = coming
    if bringing is not None:
        bringing.wait()
    return carried


def _set_up(ctx: Any, a: Any, results: Any) -> None:
    ctx.rows, ctx.group = a.rows, a.group


gather_rows.shapes(lambda a: a.x.new_empty(sum(a.rows), *a.x.shape[1:]))
gather_rows.differentiable(
    _set_up, lambda ctx, grad: {"x": sum_rows(grad.result, ctx.rows, ctx.group)}
)
sum_rows.shapes(
    lambda a: a.x.new_empty(a.rows[distributed.get_rank(group_named(a.group))], *a.x.shape[1:])
)
sum_rows.differentiable(
    _set_up, lambda ctx, grad: {"x": gather_rows(grad.result, ctx.rows, ctx.group)}
)
for _device in ("cpu", "cuda"):
    gather_rows.implement(_device, _gather)
    sum_rows.implement(_device, _sum)
