"""Losses over the processes of a group: what each of them takes, and what it gives back.

Each argument with a row for each query or key is this process's part of the whole batch's, in the
order of the ranks. A process's loss is scaled so that the mean over processes is the loss of the
whole batch, however many rows each has: and so is the mean of the gradients, which is what
DistributedDataParallel takes.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from neglog.distributed.exchange import gather_rows, with_others
from neglog.distributed.groups import Ranks, as_term, check_group, learning, meet_with
from neglog.losses._result import LossStats, reduce_and_cast
from neglog.losses._types import Exchange
from neglog.route import Route
from neglog.torch_state import under_autocast

EXCHANGES = get_args(Exchange)


class Together(NamedTuple):
    """The rows that each process has, and how keys come to the queries of others."""

    queries: Ranks
    keys: Ranks
    negatives: Ranks  # further keys that a process has beside
    exchange: str

    @property
    def columns(self) -> Ranks:
        """Of all keys a process has, its further ones last."""
        pairs = zip(self.keys.rows, self.negatives.rows, strict=True)
        return self.keys._replace(rows=tuple(k + n for k, n in pairs))

    @property
    def world(self) -> int:
        return self.queries.world

    def reversed(self) -> Together:
        """Keys for queries."""
        return self._replace(queries=self.keys, keys=self.queries)


def check_exchange(group: Any, exchange: Any) -> None:
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange: expected one of {EXCHANGES}, got {exchange!r}")
    if group is not None:
        check_group(group)


def meet(
    call: str, group: Any, exchange: str, where: Route, query: Tensor, keys: int | None = None,
    negatives: int = 0, *, learned: tuple[Any, ...] = (), **terms: Any,
) -> Together | None:  # fmt: skip
    """The processes of the group, once they agree; None without one.

    where: kernels of any kind send alike, torch's formula otherwise. keys: how many rows are
    compared with the queries, as many as these where None. learned: what may have a gradient.
    """
    if group is None:
        return None
    numbers = {name: as_term(term) for name, term in terms.items()}
    rows = query.shape[0]
    counts = (rows, rows if keys is None else keys, negatives)
    of_queries, of_keys, of_negatives = meet_with(
        call, group, query, counts, exchange=exchange, backend=where.sends, features=query.shape[1],
        **numbers, requires_grad=learning(query, *learned),
    )  # fmt: skip
    return Together(of_queries, of_keys, of_negatives, exchange)


def own_columns(x: Tensor, ranks: Ranks | None) -> Tensor:
    """Of this process's rows, among those of all."""
    rows = torch.arange(x.shape[0], device=x.device)
    return rows if ranks is None else rows + ranks.first


def of_all(x: Tensor | None, ranks: Ranks | None) -> Tensor | None:
    """Ids, or other numbers, of all processes' rows."""
    if x is None or ranks is None:
        return x
    return gather_rows(x, ranks.rows, ranks.name)


def sum_of_all(x: Tensor, together: Together | None) -> Tensor:
    """x of all processes, added up; its gradient is the sum of theirs."""
    if together is None:
        return x
    ranks = together.queries
    return gather_rows(x[None], (1,) * ranks.world, ranks.name).sum(0)


def mean_of(loss: Tensor, counted: Tensor, together: Together | None) -> Tensor:
    """Over what counts, the rest being 0; 0 where nothing does. The mean of it over processes is
    that of what counts in all."""
    total = loss.sum() if together is None else loss.sum() * together.world
    return total / sum_of_all(counted.sum(), together).clamp(min=1)


def reduced(loss: Tensor, reduction: str, like: Tensor, ranks: Ranks | None) -> Tensor:
    """The loss of this process's rows, reduced and cast; the mean of it over processes is that of
    all rows."""
    if ranks is None or reduction == "none":
        return reduce_and_cast(loss, reduction, like)
    loss = loss.sum() * ranks.world
    if reduction == "mean":
        loss = loss / ranks.total
    return loss if under_autocast(like) else loss.to(like.dtype)


def arguments_of(function: Callable[..., Any], values: dict[str, Any]) -> dict[str, Any]:
    """Its own among the local variables of a call of it."""
    return {name: values[name] for name in signature(function).parameters}


def on_constants(
    function: Callable[..., Any], group: Any, arguments: dict[str, Any], by_row: tuple[str, ...],
    first: str,
) -> Any:  # fmt: skip
    """The whole batch's loss of `function`, as each process computes it, with the others' rows for
    constants.

    by_row: the arguments with a row for each query or key, which are gathered; () tensors are not.
    first: that whose rows the result has where it is not reduced.
    """
    given = {name: x for name, x in arguments.items() if name not in ("group", "exchange")}
    pairs = given.get("positives")
    if isinstance(pairs, tuple | list):
        given["positives"] = tuple(_with_others(x, group) for x in pairs)
    for name in by_row:
        x = given.get(name)
        one = name == "temperature" and isinstance(x, Tensor) and x.numel() == 1
        if isinstance(x, Tensor) and x.dim() and not one:
            given[name] = _with_others(x, group)
    result = function(**given)
    if given.get("reduction") != "none" and not isinstance(result, LossStats):
        return result
    own = _ranks_of(given[first], arguments[first], group).own
    if isinstance(result, Tensor):
        return result[own]
    loss = result.loss if given["reduction"] != "none" else result.loss[own]
    return LossStats(loss, *(x[own] for x in result[1:]))


def _ranks_of(whole: Tensor, own: Tensor, group: Any) -> Ranks:
    return meet_with("detached", group, own, [own.shape[0]])[0]


def _with_others(x: Tensor, group: Any) -> Tensor:
    """Those of all processes: this one's own with its gradient, the others' without."""
    terms = {f"size of dimension {d}": size for d, size in enumerate(x.shape[1:], start=1)}
    ranks = meet_with("detached", group, x, [x.shape[0]], dimensions=x.dim(), **terms)[0]
    return with_others(x, ranks)
