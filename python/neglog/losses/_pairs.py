"""What contrastive losses share: embeddings made ready, compared, and their statistics."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from neglog import availability, route
from neglog.checks import number_on
from neglog.distributed import pairs as group_pairs
from neglog.distributed import totals
from neglog.distributed.groups import Ranks
from neglog.losses._result import LossStats
from neglog.ops.dtypes import real_dtype
from neglog.ops.pairs import autograd, formula
from neglog.ops.pairs.schema import Pairs
from neglog.route import Route
from neglog.tiles import plan
from neglog.torch_state import autocast_dtype

# 8192 x 8192 in float32. Up to here the similarities are kept for the backward, which saves one
# matmul of four; beyond, no more than a tile of them exists.
DEFAULT_WORKSPACE_MB = 256


class Compared(NamedTuple):
    """The pairs, and what the op gives by row, (N,), or column, (M,): neglog.ops.pairs.schema."""

    pairs: Pairs
    row_loss: Tensor
    column_loss: Tensor
    row_lse: Tensor
    column_lse: Tensor
    positive_score: Tensor


def workspace_of(options: Any) -> int:
    """Bytes for similarities."""
    if options is not None and (not isinstance(options, dict) or set(options) - {"workspace_mb"}):
        raise TypeError(f"options: expected None or {{'workspace_mb': number}}, got {options!r}")
    return plan.workspace_bytes((options or {}).get("workspace_mb"), DEFAULT_WORKSPACE_MB)


def embeddings(x: Tensor, normalize: bool) -> Tensor:
    """Embeddings as they are multiplied: normalised if asked, in autocast's dtype."""
    dtype = autocast_dtype(x)
    if not normalize:
        return x.to(dtype)
    # torch's eps, 1e-12, is 0 in float16, and a norm of 256 overflows when squared.
    return F.normalize(x.to(real_dtype(x.dtype)), dim=-1).to(dtype)


def number(value: float | Tensor, like: Tensor) -> Tensor:
    """() in the accumulation dtype."""
    return number_on(value, real_dtype(like.dtype), like.device).reshape(())


def scale_of(temperature: float | Tensor, like: Tensor) -> Tensor:
    """1 / temperature: () or (N,)."""
    if not isinstance(temperature, Tensor):
        return number(1 / temperature, like)
    if temperature.numel() == 1:
        return number(temperature, like).reciprocal()
    return temperature.to(like.device, real_dtype(like.dtype)).reciprocal()


class Columns(NamedTuple):
    """The keys that each process of a group has, and how they come to the queries of others."""

    ranks: Ranks
    exchange: str


def compare(
    where: Route, query: Tensor, key: Tensor, scale: Tensor, *,
    bias: Tensor | None = None, positive: Tensor | None = None, excluded: Tensor | None = None,
    query_group: Tensor | None = None, key_group: Tensor | None = None, columns: bool = False,
    symmetric: bool = False, over: Columns | None = None,
) -> Compared:  # fmt: skip
    """Every query with every key; the arguments are those of neglog.ops.pairs.schema. With `over`,
    with the keys of all processes: then they are those of neglog.distributed.pairs."""
    pairs = Pairs(
        query, key, scale, bias, positive, excluded, query_group, key_group, columns,
        symmetric and over is None, *where.for_op(),
    )  # fmt: skip
    if over is not None:
        return _compare_over(over, where, pairs)
    if where.backend == "torch":
        availability.ran("pairs", "torch")
        return Compared(pairs, *formula.pairs(pairs))
    learns = query.requires_grad or key.requires_grad or scale.requires_grad
    learns = learns and torch.is_grad_enabled()
    keep = route.keeps(where, query.shape[0], key.shape[0], learns)
    return Compared(pairs, *autograd.forward(*pairs, keep)[:5])


def _compare_over(over: Columns, where: Route, pairs: Pairs) -> Compared:
    given = _of_group(over, pairs)
    if where.backend == "torch":
        availability.ran("group_pairs", "torch")
        return Compared(pairs, *group_pairs.by_formula(group_pairs.forward.Arguments(*given)))
    return Compared(pairs, *group_pairs.forward(*given)[:5])


def _of_group(over: Columns, pairs: Pairs) -> tuple[Any, ...]:
    """The arguments of the ops over processes, which are never symmetric."""
    fields = pairs._asdict()
    del fields["symmetric"]
    return *fields.values(), over.ranks.rows, over.exchange, over.ranks.name


def dots(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i> in the accumulation dtype."""
    real = real_dtype(x.dtype)
    return (x.to(real) * y.to(real)).sum(-1)


def with_stats(
    where: Route, loss: Tensor, pairs: Pairs, lse: Tensor, positive_score: Tensor
) -> tuple[LossStats, Tensor]:
    """With entropy and correctness of each row, its positive among the pairs or not; and the column
    of the highest score."""
    if where.backend == "torch":
        correct, entropy, best = formula.statistics(positive_score, pairs)
    else:
        correct, entropy, best = autograd.statistics(positive_score, *pairs)
    return LossStats(loss, lse, correct, entropy), best


def stats_over(
    over: Columns, pairs: Pairs, lse: Tensor, positive_score: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """correct, entropy, the column of the highest score among the keys of all processes, and that
    score. lse: of the scores of a row, its positive's too."""
    given = (*_of_group(over, pairs), lse, positive_score)
    return totals.statistics(*(x.detach() if isinstance(x, Tensor) else x for x in given))
