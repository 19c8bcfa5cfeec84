"""The keys of the processes of a group, a block at a time, and this process's queries with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from neglog.distributed.exchange import all_rows, pieces, ranks_of, rotate, to_owners
from neglog.distributed.groups import Ranks
from neglog.ops.pairs.schedule import TILES, Workspace, tiles_of
from neglog.ops.pairs.schema import Pairs

# The arguments with which the schemas begin.
PAIRS = (
    "Tensor query, Tensor key, Tensor scale, Tensor? bias, Tensor? positive, Tensor? excluded, "
    "Tensor? query_group, Tensor? key_group, bool columns, int workspace, ScalarType tile_dtype, "
    "str backend, SymInt[] rows, str exchange, str group"
)
FLAGS = ("columns", "workspace", "tile_dtype", "backend", "rows", "exchange", "group")
# Of similarities on a CPU. A ring is for memory; half of what a tile has elsewhere costs no time.
RING_TILE_BYTES = 8 << 20
Visit = Callable[[slice, Tensor], Any]
Merge = Callable[[Tensor, Tensor], Tensor]


class Blocks:
    """The keys of all processes, a block at a time: which columns of all they are, and their
    numbers."""

    def __init__(self, op: str, a: Any) -> None:
        self.op = op
        self.ranks: Ranks = ranks_of(a)
        self.pairs = pairs_of(a).ready()
        if a.exchange == "ring" and not self.pairs.query.is_cuda:
            tile = min(self.pairs.workspace, RING_TILE_BYTES)
            self.pairs = self.pairs._replace(workspace=tile)
        self.kind = TILES[self.pairs.query.device.type]
        self.gathers = a.exchange == "gather"

    def visit(self, keys: Tensor | None, visit: Visit, merge: Merge | None) -> Tensor | None:
        """As `visit_blocks`, with this process's keys."""
        row_bytes = self.pairs.key.shape[1] * self.pairs.real.itemsize
        own = self.pairs.key
        return visit_blocks(self.ranks, self.gathers, own, row_bytes, keys, visit, merge)

    def part(self, columns: slice, keys: Tensor) -> Pairs:
        """This process's queries with the keys of these columns."""
        pairs, start = self.pairs, columns.start

        def moved(x: Tensor | None) -> Tensor | None:
            return x if x is None or start == 0 else x - start

        def of_columns(x: Tensor | None) -> Tensor | None:
            return x[columns] if x is not None and x.dim() else x

        return pairs._replace(
            key=keys, bias=of_columns(pairs.bias), positive=moved(pairs.positive),
            excluded=moved(pairs.excluded), key_group=of_columns(pairs.key_group),
        )  # fmt: skip

    def tiles(
        self, part: Pairs, bounded: bool | None = None
    ) -> Iterator[tuple[Any, Tensor, slice, slice]]:
        """The tiles of a part: their kernels, their similarities until the next, rows, columns."""
        kernels, workspace = self.kind(self.op, part, bounded), Workspace(part, None)
        if part.query.numel() and part.key.numel():
            for down, across in tiles_of(part):
                yield kernels, workspace.filled(down, across), down, across


def pairs_of(a: Any) -> Pairs:
    """The arguments that the ops of pairs have too; key is this process's."""
    given = {name: getattr(a, name) for name in Pairs._fields if name != "symmetric"}
    return Pairs(**given, symmetric=False)


def visit_blocks(
    ranks: Ranks, gathers: bool, own: Tensor, row_bytes: int, keys: Tensor | None, visit: Visit,
    merge: Merge | None,
) -> Tensor | None:  # fmt: skip
    """visit(columns, keys) of each block. What it gives, by column, comes to the columns' own
    process, merged.

    own: this process's keys; keys: those of all, where they are here already. row_bytes: of what is
    sent for a key, in all processes the same.
    """
    if gathers:
        keys = all_rows(own, ranks) if keys is None else keys
        found = visit(slice(0, ranks.total), keys)
        return None if merge is None else to_owners(found, ranks, merge)
    starts = ranks.starts
    home: Tensor | None = None
    for of_ranks in pieces(ranks, row_bytes, own.is_cuda):

        def at(owner: int, block: Tensor, of_ranks: list[slice] = of_ranks) -> Any:
            part = of_ranks[owner]
            return visit(slice(starts[owner] + part.start, starts[owner] + part.stop), block)

        mine = own[of_ranks[ranks.rank]]
        found = rotate(mine, of_ranks, ranks, at, merge)
        if found is not None:
            if home is None:
                home = found.new_empty(own.shape[0], *found.shape[1:])
            home[of_ranks[ranks.rank]] = found
    return home
