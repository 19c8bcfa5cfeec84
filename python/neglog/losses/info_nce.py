"""InfoNCE: each query against its positive key, among negatives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from neglog import availability, route, torch_state
from neglog.checks import check_flags, number_on, to_smoothing
from neglog.checks_of_pairs import check_comparison
from neglog.distributed.tensors import any_distributed, on_whole_tensors
from neglog.losses._negatives import Negatives, check_negatives
from neglog.losses._pairs import (
    Columns,
    Compared,
    compare,
    dots,
    embeddings,
    scale_of,
    stats_over,
    with_stats,
    workspace_of,
)
from neglog.losses._positives import PositiveKeys, positives_of, take_rows
from neglog.losses._result import LossStats, reduce_and_cast, without_stats
from neglog.losses._rows import RowOptions, torch_cross_entropy
from neglog.losses._together import (
    Together,
    arguments_of,
    check_exchange,
    meet,
    of_all,
    on_constants,
    own_columns,
    reduced,
    sum_of_all,
)
from neglog.losses._types import (
    Backend,
    Exchange,
    NegativeMode,
    Positives,
    Reduction,
    WorkspaceOptions,
)
from neglog.losses.linear_cross_entropy import loss_by_tiles
from neglog.ops.pairs.formula import loss_beside, statistics_of
from neglog.tiles import plan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ROW_BYTES = plan.DEFAULT_WORKSPACE_MB << 20
# The arguments with a row for each query or key.
BY_ROW = (
    "query", "positive_key", "negative_keys", "temperature", "positives", "exclude", "negative_ids",
    "hard_negative_weight",
)  # fmt: skip
OWN_NEGATIVES = "each query's own negatives are more numbers than their scores"


@overload
def info_nce(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1, reduction: Reduction = "mean",
    negative_mode: NegativeMode = "unpaired", *,
    positives: Positives = None, symmetric: bool = False, normalize: bool = True,
    exclude: Tensor | None = None, negative_ids: Tensor | None = None,
    hard_negative_weight: float | Tensor = 0.0, own_negative_weight: float | Tensor = 0.0,
    label_smoothing: float = 0.0, group: ProcessGroup | None = None, exchange: Exchange = "gather",
    return_stats: Literal[False] = False, options: WorkspaceOptions | None = None,
    backend: Backend | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def info_nce(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1, reduction: Reduction = "mean",
    negative_mode: NegativeMode = "unpaired", *,
    positives: Positives = None, symmetric: bool = False, normalize: bool = True,
    exclude: Tensor | None = None, negative_ids: Tensor | None = None,
    hard_negative_weight: float | Tensor = 0.0, own_negative_weight: float | Tensor = 0.0,
    label_smoothing: float = 0.0, group: ProcessGroup | None = None, exchange: Exchange = "gather",
    return_stats: Literal[True], options: WorkspaceOptions | None = None,
    backend: Backend | None = None,
) -> LossStats: ...  # fmt: skip
@overload
def info_nce(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1, reduction: Reduction = "mean",
    negative_mode: NegativeMode = "unpaired", *,
    positives: Positives = None, symmetric: bool = False, normalize: bool = True,
    exclude: Tensor | None = None, negative_ids: Tensor | None = None,
    hard_negative_weight: float | Tensor = 0.0, own_negative_weight: float | Tensor = 0.0,
    label_smoothing: float = 0.0, group: ProcessGroup | None = None, exchange: Exchange = "gather",
    return_stats: bool, options: WorkspaceOptions | None = None,
    backend: Backend | None = None,
) -> Tensor | LossStats: ...  # fmt: skip
def info_nce(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1, reduction: Reduction = "mean",
    negative_mode: NegativeMode = "unpaired", *,
    positives: Positives = None, symmetric: bool = False, normalize: bool = True,
    exclude: Tensor | None = None, negative_ids: Tensor | None = None,
    hard_negative_weight: float | Tensor = 0.0, own_negative_weight: float | Tensor = 0.0,
    label_smoothing: float = 0.0, group: ProcessGroup | None = None, exchange: Exchange = "gather",
    return_stats: bool = False, options: WorkspaceOptions | None = None,
    backend: Backend | None = None,
) -> Tensor | LossStats:  # fmt: skip
    """Each query against its positive key, among negatives: cross-entropy of their similarities.

    Args:
        query, positive_key: (N, D).
        negative_keys: None: a row's negatives are the other rows' positive keys. Otherwise as
            negative_mode says: "unpaired", (M, D): these alone are every query's negatives, as in a
            queue; "paired", (N, M, D): each query has its own; "in_batch", (M, D): these and the
            other rows' positive keys.
        temperature: what similarities are divided by: a number, a tensor () or, for each query,
            (N,); the tensor receives a gradient. On a device, and while it is traced, its numbers
            are not read: 0 then gives NaN, not ValueError.
        reduction: "mean", "sum" or "none", (N,).
        positives: several positives a query, or none; positive_key may then be (M, D). (N, P)
            integers: rows of positive_key, -1 where a query has fewer; one named twice counts
            twice. Or (N, M) bool: True for a positive; a mask of integers would be read as rows. Or
            a pair of integers (N,), (M,): ids of the queries and of positive_key, of which those
            with the query's id are its positives. The loss is the mean over them of -log p, each
            against all keys, as in `sup_con`. A query without one has loss 0 and no share in the
            "mean". negative_keys must be None or "in_batch".
        symmetric: the mean of this loss and that of each key against all queries, of which those
            are positives that it is a positive of. Without negative_keys; with positives, reduced.
        normalize: similarities are cosines; False: dot products. 16-bit embeddings are normalised
            in float32, so a zero vector stays one.
        exclude: (N,) integers: other rows with the same one are no negatives of each other, such
            as duplicates. "unpaired" and "paired" negatives then need negative_ids. It cannot be
            given with label_smoothing, nor with positives, which say themselves what is no
            negative.
        negative_ids: (M,) integers, for "paired" negatives also (N, M): a negative key whose id is
            that of a query in `exclude` is no negative of it, such as one that a queue still holds.
        hard_negative_weight: is added to the score of each negative key with every query: a number,
            or a tensor without gradient (M,), for "paired" negatives also (N, M). -inf leaves a key
            out, such as padding.
        own_negative_weight: is added to the score of query i with negative key i, its own hard
            negative, as SimCSE does. It needs negative_keys (N, D), one a query, "in_batch". A
            finite number, or a tensor () without gradient.
        label_smoothing: this much of the target's mass is spread over all keys that are not left
            out.
        return_stats: LossStats(loss, logsumexp, correct, entropy), (N,) but for the loss, of each
            query among its keys; correct where no key scores above the positive, with `positives`
            where the key with the highest score is one.
        group: a torch.distributed process group: each argument with a row for each query or key is
            this process's part of the whole batch's, and queries meet the keys of all processes:
            their positive keys and their negative_keys, unless "paired". A queue that all processes
            hold alike needs none. `positives` that are rows, or a mask, count the positive keys of
            all processes, by rank. Loss and gradients are such that their mean over processes, as
            DistributedDataParallel takes it, is that of the whole batch.
        exchange: "gather", "ring" or "detached", as in `clip_loss`. "ring" takes positives by ids.
        options: {"workspace_mb": number}, the budget for similarities; otherwise
            NEGLOG_WORKSPACE_MB, else 256. If all fit in it they are kept for the backward: 3
            matmuls where there are otherwise 4.
        backend: "cython", "numba", "cuda" or "torch"; None lets neglog.route choose.

    Raises:
        RuntimeError for shapes, dtypes and devices that do not fit, ValueError for values,
        TypeError for types, IndexError for positives that are no rows of positive_key.

    Source: arXiv:1807.03748; the arguments are those of info-nce-pytorch.
    """
    if any_distributed(
        query, positive_key, negative_keys, temperature, positives, exclude, negative_ids,
        hard_negative_weight, own_negative_weight,
    ):  # fmt: skip
        return on_whole_tensors(info_nce, locals())
    check_comparison(
        temperature, reduction, normalize, per_sample=True, same_rows=positives is None,
        query=query, positive_key=positive_key,
    )  # fmt: skip
    label_smoothing = to_smoothing(label_smoothing)
    check_flags(return_stats=return_stats)
    negatives = Negatives(
        negative_keys, negative_mode, exclude, negative_ids, hard_negative_weight,
        own_negative_weight,
    )  # fmt: skip
    check_exchange(group, exchange)
    check_negatives(
        negatives, query, positive_key, positives, symmetric, reduction, label_smoothing,
        None if group is None else exchange,
    )  # fmt: skip
    if group is not None and exchange == "detached":
        given = arguments_of(info_nce, locals())
        return on_constants(info_nce, group, given, BY_ROW, "query")
    z, key = embeddings(query, normalize), embeddings(positive_key, normalize)
    if negative_keys is not None:
        negatives = negatives._replace(keys=embeddings(negative_keys, normalize))
    where = route.choose(
        z, key, backend=backend, workspace=workspace_of(options),
        by_torch=OWN_NEGATIVES if negatives.paired else None,
    )  # fmt: skip
    scale = scale_of(temperature, z)
    together = meet(
        "info_nce", group, exchange, where, z, key.shape[0] if negatives.in_batch else 0,
        0 if negative_keys is None or negatives.paired else negatives.keys.shape[0],
        learned=(key, negative_keys, temperature), temperature=temperature, reduction=reduction,
        mode=negative_mode[:8], negative_keys=negative_keys is not None, positives=_kind(positives),
        symmetric=symmetric, normalize=normalize, exclude=exclude is not None,
        ids=negative_ids is not None, own_weight=own_negative_weight,
        smoothing=label_smoothing, stats=return_stats,
    )  # fmt: skip
    asked = _Asked(where, label_smoothing, return_stats, together)
    plain = negative_keys is None and exclude is None and positives is None and together is None
    alone = plain and not (return_stats or symmetric)
    if alone and reduction != "none" and route.forms_early(where, z, temperature):
        loss = _by_rows(where, z, key, temperature, reduction, label_smoothing)
        return reduce_and_cast(loss, "none", query)
    ranks = None if together is None else together.queries
    if positives is not None:
        several = positives_of(positives, key, together)
        result = _of_several(asked, z, key, negatives, scale, several, symmetric, reduction)
        reduction = "none"
    elif negatives.in_batch:
        result = _in_batch(asked, z, key, negatives, scale, symmetric=symmetric)
    elif negatives.paired:
        result = _of_own_negatives(asked, z, key, negatives, scale)
    else:
        result = _of_queue(asked, z, key, negatives, scale)
    loss = reduced(result.loss, reduction, query, ranks)
    # Not _replace, which torch.compile of 2.11 cannot give back.
    return LossStats(loss, *result[1:]) if return_stats else loss


def _kind(positives: Positives) -> str:
    if isinstance(positives, Tensor):
        return "mask" if positives.dtype == torch.bool else "rows"
    return "none" if positives is None else "ids"


class _Asked(NamedTuple):
    """What all forms take."""

    where: route.Route
    smoothing: float
    stats: bool
    together: Together | None

    def over(self) -> Columns | None:
        """The columns of all processes."""
        together = self.together
        return None if together is None else Columns(together.columns, together.exchange)


def _by_rows(
    where: route.Route, query: Tensor, key: Tensor, temperature: float | Tensor, reduction: str,
    smoothing: float,
) -> Tensor:  # fmt: skip
    if not query.is_cuda:
        where = where._replace(workspace=min(where.workspace, ROW_BYTES))
    logit_scale = 1.0
    if isinstance(temperature, Tensor):
        scale = scale_of(temperature, query)
        query = query * (scale[:, None] if scale.dim() else scale)
    else:
        logit_scale = 1.0 / float(temperature)
    labels = torch.arange(query.shape[0], device=query.device)
    options = RowOptions(reduction, label_smoothing=smoothing, logit_scale=logit_scale)
    return loss_by_tiles(where, (query, key, None), query.dtype, labels, None, options).loss


def _in_batch(
    asked: _Asked, query: Tensor, key: Tensor, negatives: Negatives, scale: Tensor, *,
    several: PositiveKeys | None = None, symmetric: bool = False,
) -> LossStats:  # fmt: skip
    """Queries against their positives, the others' and, besides, further keys."""
    together, over = asked.together, asked.over()
    keys = key if negatives.keys is None else torch.cat([key, negatives.keys])
    bias, (of_queries, of_keys) = negatives.bias(key.shape[0], scale), negatives.groups(together)
    ranks, weighs_own = None if over is None else over.ranks, negatives.weighs_own
    rows = own_columns(query, ranks)
    positive = rows if several is None else several.first
    if several is not None and together is not None:
        positive = _columns_of_keys(together, query.device)[positive]
    compared = compare(
        asked.where, query, keys, scale, positive=positive,
        bias=of_all(bias, ranks), excluded=rows + key.shape[0] if weighs_own else None,
        query_group=of_queries, key_group=of_keys, columns=symmetric, over=over,
    )  # fmt: skip
    loss, lse = compared.row_loss, compared.row_lse
    own = _own_score(query, negatives, scale) if weighs_own else None
    if own is not None:
        # To log(e^loss + e^d), d being own - positive_score: as in loss_beside.
        loss = loss + F.softplus(own - compared.positive_score - loss, threshold=40)
        lse = lse + F.softplus(own - lse, threshold=40)
    if several is not None:
        # A loss that may be near 0 needs the score that its log-sum-exp was made of.
        of_many = lse - scale * dots(query, several.mean(key))
        loss = torch.where(several.number == 1, loss, of_many)
    if asked.smoothing:
        mean_key, mean_bias, number = _mean_of_kept(keys, bias, scale, asked)
        mean_score = scale * dots(query, mean_key) + mean_bias
        if own is not None:
            of_own = number_on(negatives.own_weight, scale.dtype, scale.device)
            mean_score = mean_score + torch.where(own == -torch.inf, 0, of_own) / number
        loss = _smoothed(loss, lse - mean_score, asked.smoothing)
    if several is not None:
        loss = torch.where(several.number > 0, loss, 0)
    if symmetric:
        loss = (loss + _column_loss(compared, asked)) / 2
    if not asked.stats:
        return without_stats(loss)
    if over is not None:
        return _stats_over(asked, over, loss, lse, compared, several, own)
    stats, best = with_stats(asked.where, loss, compared.pairs, lse, compared.positive_score)
    if several is not None:
        stats = stats._replace(correct=several.holds(best))
    return stats if own is None else _stats_with_own(stats, compared, own, best)


def _columns_of_keys(together: Together, device: torch.device) -> Tensor:
    """Of each positive key of all processes, its column among all keys."""
    starts = together.columns.starts
    return torch.cat(
        [
            torch.arange(start, start + rows, device=device)
            for start, rows in zip(starts, together.keys.rows, strict=False)
        ]
    )


def _stats_over(
    asked: _Asked, over: Columns, loss: Tensor, lse: Tensor, compared: Compared,
    several: PositiveKeys | None, own: Tensor | None,
) -> LossStats:  # fmt: skip
    """Of the keys of all processes."""
    of_keys = compared.row_lse
    correct, entropy, best, highest = stats_over(
        over, compared.pairs, of_keys, compared.positive_score
    )
    if several is not None:
        assert asked.together is not None
        columns = _columns_of_keys(asked.together, best.device)
        place = torch.searchsorted(columns, best).clamp(max=columns.shape[0] - 1)
        correct = several.holds(place) & (columns[place] == best)
    if own is not None:
        correct, entropy = _with_own(correct, entropy, highest, lse, own)
    return LossStats(loss, lse, correct, entropy)


def _of_several(
    asked: _Asked, query: Tensor, key: Tensor, negatives: Negatives, scale: Tensor,
    several: PositiveKeys, symmetric: bool, reduction: str,
) -> LossStats:  # fmt: skip
    """Reduced over the queries that have a positive."""
    result = _in_batch(asked, query, key, negatives, scale, several=several)
    together = asked.together
    loss = several.reduced(result.loss, reduction, together)
    if symmetric and not torch_state.known_true(query.shape[0] == 0):
        if scale.dim():
            query, scale = (query * scale[:, None]).to(query.dtype), scale.new_ones(())
        # The roles are exchanged, as only a query's loss can be told from its only positive.
        of_keys = several.transposed()
        together = None if together is None else together.reversed()
        asked = asked._replace(stats=False, together=together)
        back = _in_batch(asked, key, query, negatives, scale, several=of_keys)
        loss = (loss + of_keys.reduced(back.loss, reduction, together)) / 2
    return LossStats(loss, *result[1:])


def _own_score(query: Tensor, negatives: Negatives, scale: Tensor) -> Tensor:
    """Of each query with its own hard negative."""
    score = scale * dots(query, negatives.keys)
    score = score + number_on(negatives.own_weight, scale.dtype, scale.device)
    bias = negatives.bias(0, scale)
    if bias is not None:
        score = score + bias
    if negatives.ids is not None:
        score = score.masked_fill(negatives.exclude.long() == negatives.ids.long(), -torch.inf)
    return score


@torch.no_grad()
def _stats_with_own(stats: LossStats, compared: Compared, own: Tensor, best: Tensor) -> LossStats:
    """Of all keys, from those of all but each query's own hard negative."""
    pairs = compared.pairs
    highest = pairs.scale * dots(pairs.query, take_rows(pairs.key, best))
    if pairs.bias is not None:
        highest = highest + pairs.bias[best]
    correct, entropy = _with_own(stats.correct, stats.entropy, highest, stats.logsumexp, own)
    return stats._replace(correct=correct, entropy=entropy)


@torch.no_grad()
def _with_own(
    correct: Tensor, entropy: Tensor, highest: Tensor, lse: Tensor, own: Tensor
) -> tuple[Tensor, Tensor]:
    """Correctness and entropy with one score more. lse: of all, this one too."""
    p = torch.exp(own - lse)
    others = 1 - p
    entropy = torch.special.entr(p) + torch.special.entr(others) + others * entropy
    return correct & (own <= highest), entropy


def _smoothed(loss: Tensor, uniform: Tensor, smoothing: float) -> Tensor:
    """Not torch.lerp, which makes NaN of two that are inf."""
    return (1 - smoothing) * loss + smoothing * uniform


def _mean_of_kept(
    keys: Tensor, bias: Tensor | None, scale: Tensor, asked: _Asked
) -> tuple[Tensor, Tensor | float, Tensor | int]:
    """Mean key (1, D) and bias of the keys that -inf does not leave out, and their number."""
    together = asked.together
    if bias is None:
        total = sum_of_all(keys.sum(0, keepdim=True, dtype=scale.dtype), together)
        count = keys.shape[0] if together is None else together.columns.total
        return total / max(count, 1), 0.0, count
    kept = bias != -torch.inf
    number = sum_of_all(kept.sum(), together)
    total = torch.where(kept[:, None], keys, 0).sum(0, keepdim=True, dtype=scale.dtype)
    of_bias = sum_of_all(torch.where(kept, bias, 0).sum(), together)
    some = number.clamp(min=1)
    return sum_of_all(total, together) / some, of_bias / some, number


def _column_loss(compared: Compared, asked: _Asked) -> Tensor:
    """Each key against all queries."""
    if not asked.smoothing:
        return compared.column_loss
    pairs, together = compared.pairs, asked.together
    query, scale = pairs.query, pairs.scale
    of_row = scale[:, None] if scale.dim() else scale
    total = sum_of_all((query * of_row).sum(0, keepdim=True, dtype=scale.dtype), together)
    count = query.shape[0] if together is None else together.queries.total
    mean_score = dots(pairs.key, total / count)
    return _smoothed(compared.column_loss, compared.column_lse - mean_score, asked.smoothing)


def _of_queue(
    asked: _Asked, query: Tensor, key: Tensor, negatives: Negatives, scale: Tensor
) -> LossStats:
    """Queries against their positive and keys that belong to nobody."""
    over = asked.over()
    bias, (of_queries, of_keys) = negatives.bias(0, scale), negatives.groups(asked.together)
    compared = compare(
        asked.where, query, negatives.keys, scale,
        bias=of_all(bias, None if over is None else over.ranks), query_group=of_queries,
        key_group=of_keys, over=over,
    )  # fmt: skip
    score = scale * dots(query, key)
    loss = loss_beside(compared.row_lse, score)
    if not (asked.smoothing or asked.stats):
        return without_stats(loss)
    lse = torch.where(score == -torch.inf, compared.row_lse, loss + score)
    if asked.smoothing:
        mean_key, mean_bias, kept = _mean_of_kept(negatives.keys, bias, scale, asked)
        others = kept * (scale * dots(query, mean_key) + mean_bias)
        loss = _smoothed(loss, lse - (others + score) / (kept + 1), asked.smoothing)
    if not asked.stats:
        return without_stats(loss)
    if over is not None:
        correct, entropy, *_ = stats_over(over, compared.pairs, lse, score)
        return LossStats(loss, lse, correct, entropy)
    return with_stats(asked.where, loss, compared.pairs, lse, score)[0]


def _of_own_negatives(
    asked: _Asked, query: Tensor, key: Tensor, negatives: Negatives, scale: Tensor
) -> LossStats:
    """(N, 1 + M) scores: fewer than the negatives' own numbers, so they are made in memory."""
    availability.ran("pairs", "torch")
    similarity = torch.bmm(negatives.keys, query.unsqueeze(2)).squeeze(2).to(scale.dtype)
    of_row = scale[:, None] if scale.dim() else scale
    weight = number_on(negatives.weight, scale.dtype, scale.device)
    others = similarity * of_row + weight
    if negatives.ids is not None:
        same = negatives.exclude.long()[:, None] == negatives.ids.long()
        others = others.masked_fill(same, -torch.inf)
    scores = torch.cat([(dots(query, key) * scale)[:, None], others], 1)
    target = torch.zeros(query.shape[0], dtype=torch.int64, device=query.device)
    loss = torch_cross_entropy(scores, target, reduction="none")
    if asked.smoothing:
        kept = (weight != -torch.inf).expand_as(others)  # and the positive
        mean_score = scores[:, 0] + torch.where(kept, others, 0).sum(1)
        mean_score = mean_score / (kept.sum(1) + 1)
        loss = _smoothed(loss, torch.logsumexp(scores, 1) - mean_score, asked.smoothing)
    if not asked.stats:
        return without_stats(loss)
    correct, entropy, _ = statistics_of(scores[:, 0], scores)
    return LossStats(loss, torch.logsumexp(scores, 1), correct, entropy)
