"""Several positives a query: which keys they are, and what is summed over them.

Nothing here has a number for each query and key, unless the caller's mask has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neglog import torch_state
from neglog.checks import check_dense
from neglog.checks_of_pairs import check_groups, check_integers
from neglog.distributed import totals
from neglog.distributed.exchange import gather_rows
from neglog.distributed.groups import Ranks
from neglog.distributed.totals import add_rows
from neglog.losses._pairs import Columns
from neglog.losses._result import reduce
from neglog.losses._together import Together, mean_of, of_all
from neglog.ops.dtypes import real_dtype

UNKNOWN = 1 << 62  # a number of keys that no row reaches


class PositiveKeys(ABC):
    """The keys, of M, that are the positives of each of N queries."""

    number: Tensor  # (N,) how many
    first: Tensor  # (N,) one of them; 0 where there is none

    @abstractmethod
    def sums(self, keys: Tensor) -> Tensor:
        """Over each query's positives, (N, D), of `keys` (M, D), wider than these."""

    @abstractmethod
    def holds(self, column: Tensor) -> Tensor:
        """Whether the key `column` (N,) is a positive of each query."""

    @abstractmethod
    def transposed(self) -> PositiveKeys:
        """Of each key, the queries that it is a positive of."""

    def mean(self, keys: Tensor) -> Tensor:
        """Of each query's positives, (N, D) in the accumulation dtype; 0 where there is none."""
        total = self.sums(keys) / self.number.clamp(min=1)[:, None]
        return total.to(real_dtype(keys.dtype))

    def reduced(self, loss: Tensor, reduction: str, together: Together | None) -> Tensor:
        """Over the queries that have a positive: the others' losses are 0."""
        if reduction == "mean":
            return mean_of(loss, self.number > 0, together)
        value = reduce(loss, reduction)
        return value if together is None or reduction == "none" else value * together.world


class _OfMask(PositiveKeys):
    def __init__(self, mask: Tensor) -> None:
        self.mask, self.number = mask, mask.sum(1)
        self.first = mask.to(torch.uint8).argmax(1)

    def sums(self, keys: Tensor) -> Tensor:
        # In double it would be twice the memory and, on CUDA, many times as slow.
        keys = keys.to(real_dtype(keys.dtype))
        return self.mask.to(keys.dtype) @ keys

    def holds(self, column: Tensor) -> Tensor:
        inside = column < self.mask.shape[1]
        found = self.mask.gather(1, column.clamp(max=self.mask.shape[1] - 1)[:, None])
        return found.squeeze(1) & inside

    def transposed(self) -> PositiveKeys:
        return _OfMask(self.mask.t())


class OfIds(PositiveKeys):
    """The keys with a query's id; `place` (N,) is that of the first one in the order of all.

    With `over`, the keys of each process, key_ids are those of all keys; `of_queries` has the
    queries of each process, and the ids of all.
    """

    def __init__(
        self, query_ids: Tensor, key_ids: Tensor, over: Columns | None = None,
        of_queries: tuple[Columns, Tensor] | None = None,
    ) -> None:  # fmt: skip
        # torch.searchsorted warns of strided ones.
        self.query_ids, self.key_ids = (x.long().contiguous() for x in (query_ids, key_ids))
        self.over, self.of_queries = over, of_queries
        # torch.unique, whose result's size depends on the values, would break a graph that is
        # being compiled.
        found, self.order = self.key_ids.sort(stable=True)
        start = torch.searchsorted(found, self.query_ids)
        self.number = torch.searchsorted(found, self.query_ids, right=True) - start
        # That of an id without a key is another's or none.
        self.place = start.clamp(max=found.shape[0] - 1)
        self.place_of_key = torch.searchsorted(found, self.key_ids)
        self.first = torch.where(self.number > 0, self.order[self.place], 0)

    def sums(self, keys: Tensor) -> Tensor:
        if self.over is not None:
            ranks, exchange = self.over
            given = (self.query_ids, self.key_ids, ranks.rows, exchange, ranks.name)
            return totals.sums(keys, *given)
        keys = widened(keys)
        of_ids = add_rows(torch.zeros_like(keys), self.place_of_key, keys)
        return torch.where((self.number > 0)[:, None], take_rows(of_ids, self.place), 0)

    def holds(self, column: Tensor) -> Tensor:
        keys = self.key_ids.shape[0]
        return (self.key_ids[column.clamp(max=keys - 1)] == self.query_ids) & (column < keys)

    def transposed(self) -> PositiveKeys:
        if self.over is None or self.of_queries is None:
            return OfIds(self.key_ids, self.query_ids)
        queries, all_query_ids = self.of_queries
        own = self.key_ids[self.over.ranks.own]
        return OfIds(own, all_query_ids, queries, (self.over, self.key_ids))


class _OfRows(PositiveKeys):
    """Of (N, P) rows of keys, -1 where a query has fewer."""

    def __init__(self, rows: Tensor, keys: Any) -> None:
        self.rows, self.keys = rows.long(), keys
        self.named = self.rows >= 0
        self.number = self.named.sum(1)
        self.key_of = self.rows.clamp(min=0)
        self.first = self.key_of.amax(1)

    def sums(self, keys: Tensor) -> Tensor:
        # By columns: all at once would be N x P x D numbers.
        keys = widened(keys)
        columns = zip(self.key_of.unbind(1), self.named.unbind(1), strict=True)
        parts = (torch.where(named[:, None], take_rows(keys, key), 0) for key, named in columns)
        return sum(parts, start=keys.new_zeros(()))

    def holds(self, column: Tensor) -> Tensor:
        return (self.rows == column[:, None]).any(1)

    def transposed(self) -> PositiveKeys:
        return _Named(self)


class _Named(PositiveKeys):
    """Of each key, the queries that name it."""

    def __init__(self, naming: _OfRows) -> None:
        self.naming = naming
        key, named = naming.key_of.flatten(), naming.named.flatten()
        none = key.new_zeros(naming.keys)
        self.number = none.index_add(0, key, named.long())
        query = torch.arange(naming.rows.shape[0], device=key.device)[:, None]
        query = torch.where(naming.named, query, 0).flatten()
        self.first = none.scatter_reduce(0, key, query, "amax")

    def sums(self, keys: Tensor) -> Tensor:
        keys = widened(keys)
        total = keys.new_zeros(self.naming.keys, keys.shape[1])
        columns = zip(self.naming.key_of.unbind(1), self.naming.named.unbind(1), strict=True)
        for key, named in columns:
            total = add_rows(total, key, torch.where(named[:, None], keys, 0))
        return total

    def holds(self, column: Tensor) -> Tensor:
        raise NotImplementedError("asked of queries alone")

    def transposed(self) -> PositiveKeys:
        return self.naming


class _OverGathered(PositiveKeys):
    """Positives among the keys of all processes, for whose sums the keys are gathered."""

    def __init__(
        self, own: PositiveKeys, keys: Ranks, transpose: Callable[[], PositiveKeys]
    ) -> None:
        self.own, self.ranks, self.transposed_of = own, keys, transpose
        self.number, self.first = own.number, own.first

    def sums(self, keys: Tensor) -> Tensor:
        return self.own.sums(gather_rows(keys, self.ranks.rows, self.ranks.name))

    def holds(self, column: Tensor) -> Tensor:
        return self.own.holds(column)

    def transposed(self) -> PositiveKeys:
        return self.transposed_of()


class _Part(PositiveKeys):
    """Some queries of others."""

    def __init__(self, whole: PositiveKeys, part: slice) -> None:
        self.whole, self.part = whole, part
        self.number, self.first = whole.number[part], whole.first[part]

    def sums(self, keys: Tensor) -> Tensor:
        return self.whole.sums(keys)[self.part]

    def holds(self, column: Tensor) -> Tensor:
        raise NotImplementedError("asked of queries alone")

    def transposed(self) -> PositiveKeys:
        return self.whole.transposed()


def positives_of(given: Any, keys: Tensor, together: Together | None = None) -> PositiveKeys:
    """What was checked. Over processes rows and a mask count the keys of all."""
    if together is not None:
        return _positives_over(given, together)
    if not isinstance(given, Tensor):
        return OfIds(*given)
    return _of_tensor(given, keys.shape[0])


def _of_tensor(given: Tensor, keys: int) -> PositiveKeys:
    if given.dtype == torch.bool:
        return _OfMask(given)
    if not given.shape[1]:  # which has no maximum
        given = given.new_full((given.shape[0], 1), -1, dtype=torch.int64)
    return _OfRows(given, keys)


def _positives_over(given: Any, together: Together) -> PositiveKeys:
    queries, keys, exchange = together.queries, together.keys, together.exchange
    if not isinstance(given, Tensor):
        query_ids, key_ids = (x.long() for x in given)
        all_queries, all_keys = of_all(query_ids, queries), of_all(key_ids, keys)
        assert all_queries is not None
        assert all_keys is not None
        beside = (Columns(queries, exchange), all_queries)
        return OfIds(query_ids, all_keys, Columns(keys, exchange), beside)

    def transpose() -> PositiveKeys:
        whole = _of_tensor(gather_rows(given, queries.rows, queries.name), keys.total)
        return _OverGathered(_Part(whole.transposed(), keys.own), queries, lambda: of_queries)

    of_queries = _OverGathered(_of_tensor(given, keys.total), keys, transpose)
    return of_queries


def check_positives(given: Any, query: Tensor, key: Tensor, exchange: str | None = None) -> None:
    """exchange: of a call over processes, where a tensor counts the keys of all, of which it is not
    known here how many there are."""
    rows, keys = query.shape[0], key.shape[0]
    if exchange == "ring" and isinstance(given, Tensor):
        raise ValueError(
            "positives: expected a pair of ids with exchange='ring', where no process has all "
            "keys, got a Tensor"
        )
    if exchange is not None and isinstance(given, Tensor) and given.dim() == 2:
        keys = given.shape[1] if given.dtype == torch.bool else UNKNOWN
    if isinstance(given, tuple | list) and len(given) == 2:
        check_groups("positives[0]", given[0], query)
        check_groups("positives[1]", given[1], key)
    elif not isinstance(given, Tensor):
        raise TypeError(
            "positives: expected a Tensor or a pair (query ids, key ids) of them, "
            f"got {type(given).__name__}"
        )
    elif given.dtype == torch.bool:
        if list(given.shape) != [rows, keys]:
            raise RuntimeError(
                f"positives: expected shape [{rows}, {keys}] of a mask, got {list(given.shape)}"
            )
        check_dense("positives", given)
        if given.device != query.device:
            raise RuntimeError(f"positives: expected device {query.device}, got {given.device}")
    else:
        _check_rows(given, query, keys)
    if rows and not keys and exchange is None:
        raise RuntimeError(f"positive_key: expected a row at least, got {list(key.shape)}")


def _check_rows(given: Tensor, query: Tensor, keys: Any) -> None:
    check_integers("positives", given, query)
    if given.dim() != 2 or given.shape[0] != query.shape[0]:
        raise RuntimeError(
            f"positives: expected shape ({query.shape[0]}, P), got {list(given.shape)}"
        )
    if torch_state.readable(given) and given.numel():
        low, high = (int(x) for x in given.long().aminmax())  # unsigned dtypes have none
        if low < -1 or high >= keys:
            raise IndexError(
                f"positives: expected rows of positive_key, 0 to {keys - 1}, or -1, "
                f"got {low if low < -1 else high}"
            )


# Sums over rows that indices name


def widened(x: Tensor) -> Tensor:
    """In double where there is one: many numbers may be added up."""
    return x.double() if x.device.type in ("cpu", "cuda") else x.to(real_dtype(x.dtype))


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index], whose derivative adds up in one order: on CUDA threads race in the backward of
    index_select, on the CPU in that of indexing."""
    return x[index] if x.is_cuda else x.index_select(0, index)


def numbered(ids: Tensor) -> Tensor:
    """Numbers from 0 of ids that may be any: one is another's where the ids are."""
    ids = ids.long().contiguous()
    return torch.searchsorted(ids.sort()[0], ids)
