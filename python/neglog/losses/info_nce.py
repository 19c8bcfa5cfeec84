"""InfoNCE: each query against its positive key, among negatives."""

from __future__ import annotations

from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from neglog import availability, route
from neglog.checks import (
    check_comparison,
    check_embeddings,
    check_groups,
    check_scalar,
    number_on,
    to_smoothing,
)
from neglog.losses._pairs import (
    Compared,
    compare,
    dots,
    embeddings,
    scale_of,
    with_stats,
    workspace_of,
)
from neglog.losses._result import LossStats, reduce_and_cast, without_stats
from neglog.losses._rows import RowOptions, torch_cross_entropy
from neglog.losses._types import Backend, NegativeMode, Reduction, WorkspaceOptions
from neglog.losses.linear_cross_entropy import loss_by_tiles
from neglog.ops.pairs.formula import correct_and_entropy
from neglog.tiles import plan

ROW_BYTES = plan.DEFAULT_WORKSPACE_MB << 20
NO_GROUP = torch.iinfo(torch.int64).min
OWN_NEGATIVES = "each query's own negatives are more numbers than their scores"
NEGATIVE_MODES = get_args(NegativeMode)


@overload
def info_nce(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1, reduction: Reduction = "mean",
    negative_mode: NegativeMode = "unpaired", *,
    symmetric: bool = False, normalize: bool = True, exclude: Tensor | None = None,
    hard_negative_weight: float | Tensor = 0.0, label_smoothing: float = 0.0,
    return_stats: Literal[False] = False, options: WorkspaceOptions | None = None,
    backend: Backend | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def info_nce(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1, reduction: Reduction = "mean",
    negative_mode: NegativeMode = "unpaired", *,
    symmetric: bool = False, normalize: bool = True, exclude: Tensor | None = None,
    hard_negative_weight: float | Tensor = 0.0, label_smoothing: float = 0.0,
    return_stats: Literal[True], options: WorkspaceOptions | None = None,
    backend: Backend | None = None,
) -> LossStats: ...  # fmt: skip
@overload
def info_nce(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1, reduction: Reduction = "mean",
    negative_mode: NegativeMode = "unpaired", *,
    symmetric: bool = False, normalize: bool = True, exclude: Tensor | None = None,
    hard_negative_weight: float | Tensor = 0.0, label_smoothing: float = 0.0,
    return_stats: bool, options: WorkspaceOptions | None = None,
    backend: Backend | None = None,
) -> Tensor | LossStats: ...  # fmt: skip
def info_nce(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1, reduction: Reduction = "mean",
    negative_mode: NegativeMode = "unpaired", *,
    symmetric: bool = False, normalize: bool = True, exclude: Tensor | None = None,
    hard_negative_weight: float | Tensor = 0.0, label_smoothing: float = 0.0,
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
            (N,); the tensor receives a gradient.
        reduction: "mean", "sum" or "none", (N,).
        symmetric: the mean of this loss and that of each key against all queries. Without
            negative_keys.
        normalize: similarities are cosines; False: dot products. 16-bit embeddings are normalised
            in float32, so a zero vector stays one.
        exclude: (N,) integers: other rows with the same one are no negatives of each other, such
            as duplicates.
        hard_negative_weight: added to the scores of negative_keys, as SimCSE does: a number, or a
            tensor without gradient (M,), with "paired" also (N, M). -inf leaves a key out, such as
            padding.
        label_smoothing: this much of the target's mass is spread over all keys that are not left
            out.
        return_stats: LossStats(loss, logsumexp, correct, entropy), (N,) but for the loss, of each
            query among its keys; correct where no key scores above the positive.
        options: {"workspace_mb": number}, the budget for similarities; otherwise
            NEGLOG_WORKSPACE_MB, else 256. If all fit in it they are kept for the backward: 3
            matmuls where there are otherwise 4.
        backend: "cython", "numba", "cuda" or "torch"; None lets neglog.route choose.

    Raises:
        RuntimeError for shapes, dtypes and devices that do not fit, ValueError for values,
        TypeError for types.

    Source: arXiv:1807.03748; the arguments are those of info-nce-pytorch.
    """
    check_comparison(
        temperature, reduction, per_sample=True, query=query, positive_key=positive_key
    )
    label_smoothing = to_smoothing(label_smoothing)
    if negative_mode not in NEGATIVE_MODES:
        raise ValueError(f"negative_mode: expected one of {NEGATIVE_MODES}, got {negative_mode!r}")
    if negative_keys is not None:
        _check_negatives(query, negative_keys, negative_mode, symmetric, hard_negative_weight)
    if exclude is not None:
        _check_exclude(exclude, query, negative_keys, negative_mode, label_smoothing)
    paired = negative_keys is not None and negative_mode == "paired"
    z, key = embeddings(query, normalize), embeddings(positive_key, normalize)
    further = None if negative_keys is None else embeddings(negative_keys, normalize)
    where = route.choose(
        z, key, backend=backend, workspace=workspace_of(options),
        by_torch=OWN_NEGATIVES if paired else None,
    )  # fmt: skip
    scale = scale_of(temperature, z)
    alone = further is None and exclude is None and not (return_stats or symmetric)
    if alone and reduction != "none" and route.forms_early(where, z, temperature):
        loss = _by_rows(where, z, key, temperature, reduction, label_smoothing)
        return reduce_and_cast(loss, "none", query)
    if further is None or negative_mode == "in_batch":
        result = _in_batch(
            where, z, key, further, scale, hard_negative_weight, exclude, label_smoothing,
            symmetric, return_stats,
        )  # fmt: skip
    elif negative_mode == "unpaired":
        bias = _bias(hard_negative_weight, 0, further.shape[0], scale)
        result = _of_queue(where, z, key, further, scale, bias, label_smoothing, return_stats)
    else:
        result = _of_own_negatives(
            z, key, further, scale, hard_negative_weight, label_smoothing, return_stats
        )
    loss = reduce_and_cast(result.loss, reduction, query)
    # Not _replace, which torch.compile of 2.11 cannot give back.
    return LossStats(loss, *result[1:]) if return_stats else loss


# Checks


def _check_exclude(
    exclude: Any, query: Tensor, negative_keys: Any, mode: str, label_smoothing: float
) -> None:
    check_groups("exclude", exclude, query)
    if label_smoothing or (negative_keys is not None and mode != "in_batch"):
        raise ValueError(
            "exclude: expected none with label_smoothing, 'unpaired' or 'paired' negatives"
        )


def _check_negatives(
    query: Tensor, negative_keys: Any, mode: str, symmetric: bool, weight: Any
) -> None:
    if symmetric:
        raise ValueError("symmetric: expected False with negative_keys, which have no queries")
    if mode != "paired":
        check_embeddings(False, query=query, negative_keys=negative_keys)
    elif not isinstance(negative_keys, Tensor):
        raise TypeError(f"negative_keys: expected a Tensor, got {type(negative_keys).__name__}")
    elif negative_keys.dim() != 3 or negative_keys.shape[::2] != query.shape:
        raise RuntimeError(
            f"negative_keys: expected shape ({query.shape[0]}, M, {query.shape[1]}) for 'paired', "
            f"got {list(negative_keys.shape)}"
        )
    else:
        check_embeddings(False, query=query, negative_keys=negative_keys.flatten(0, 1))
    if isinstance(weight, Tensor):
        _check_weight(weight, negative_keys, mode)
    else:
        check_scalar("hard_negative_weight", weight)
        if not float(weight) < torch.inf:
            raise ValueError(f"hard_negative_weight: expected numbers below inf, got {weight}")


def _check_weight(weight: Tensor, negative_keys: Tensor, mode: str) -> None:
    shapes = [[], [negative_keys.shape[-2]]]
    if mode == "paired":
        shapes.append(list(negative_keys.shape[:2]))
    if list(weight.shape) not in shapes:
        raise RuntimeError(
            f"hard_negative_weight: expected shape {' or '.join(map(str, shapes))}, "
            f"got {list(weight.shape)}"
        )
    if weight.is_complex() or weight.dtype == torch.bool:
        raise RuntimeError(f"hard_negative_weight: expected a real dtype, got {weight.dtype}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("hard_negative_weight: expected no gradient; detach() it")


def _bias(weight: float | Tensor, plain: int, weighted: int, scale: Tensor) -> Tensor | None:
    """What is added to the scores of `plain` columns, 0, and then of `weighted` ones."""
    if not weighted or (not isinstance(weight, Tensor) and weight == 0):
        return None
    value = number_on(weight, scale.dtype, scale.device)
    return torch.cat([scale.new_zeros(plain), value.expand(weighted)])


# Its forms


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
    where: route.Route, query: Tensor, key: Tensor, further: Tensor | None, scale: Tensor,
    weight: float | Tensor, exclude: Tensor | None, smoothing: float, symmetric: bool, stats: bool,
) -> LossStats:  # fmt: skip
    """Queries against their positives and, besides, further keys that belong to nobody."""
    rows = torch.arange(query.shape[0], device=query.device)
    keys, bias, own, of_keys = key, None, exclude, exclude
    if further is not None:
        keys = torch.cat([key, further])
        bias = _bias(weight, key.shape[0], further.shape[0], scale)
    if exclude is not None:
        own, of_keys = _groups(exclude, keys.shape[0] - key.shape[0])
    compared = compare(
        where, query, keys, scale, bias=bias, positive=rows, query_group=own, key_group=of_keys,
        columns=symmetric,
    )  # fmt: skip
    loss = compared.row_loss
    if smoothing:
        mean_key, mean_bias, _ = _mean_of_kept(keys, bias, scale)
        mean_score = scale * dots(query, mean_key) + mean_bias
        loss = torch.lerp(loss, compared.row_lse - mean_score, smoothing)
    if symmetric:
        loss = (loss + _column_loss(compared, smoothing)) / 2
    if not stats:
        return without_stats(loss)
    return with_stats(where, loss, compared.pairs, compared.row_lse, compared.positive_score)


def _mean_of_kept(
    keys: Tensor, bias: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor | float, Tensor | int]:
    """Mean key (1, D) and bias of the keys that -inf does not leave out, and their number."""
    if bias is None:
        total = keys.sum(0, keepdim=True, dtype=scale.dtype)
        return total / max(keys.shape[0], 1), 0.0, keys.shape[0]
    kept = bias != -torch.inf
    number = kept.sum().clamp(min=1)
    total = torch.where(kept[:, None], keys, 0).sum(0, keepdim=True, dtype=scale.dtype)
    return total / number, torch.where(kept, bias, 0).sum() / number, kept.sum()


def _groups(exclude: Tensor, further: int) -> tuple[Tensor, Tensor]:
    """Of the queries, and of the keys, the `further` ones of which are in nobody's."""
    own = exclude.long()
    return own, own if not further else torch.cat([own, own.new_full((further,), NO_GROUP)])


def _column_loss(compared: Compared, smoothing: float) -> Tensor:
    """Each key against all queries."""
    if not smoothing:
        return compared.column_loss
    pairs = compared.pairs
    query, scale = pairs.query, pairs.scale
    of_row = scale[:, None] if scale.dim() else scale
    mean_query = (query * of_row).mean(0, keepdim=True, dtype=scale.dtype)
    mean_score = dots(pairs.key, mean_query)
    return torch.lerp(compared.column_loss, compared.column_lse - mean_score, smoothing)


def _of_queue(
    where: route.Route, query: Tensor, key: Tensor, negatives: Tensor, scale: Tensor,
    bias: Tensor | None, smoothing: float, stats: bool,
) -> LossStats:  # fmt: skip
    """Queries against their positive and keys that belong to nobody."""
    compared = compare(where, query, negatives, scale, bias=bias)
    score = scale * dots(query, key)
    # -log(e^s / (e^s + e^lse)); beyond 40 softplus is its argument to the last digit of a double.
    loss = F.softplus(compared.row_lse - score, threshold=40)
    lse = loss + score
    if smoothing:
        mean_key, mean_bias, kept = _mean_of_kept(negatives, bias, scale)
        others = kept * (scale * dots(query, mean_key) + mean_bias)
        loss = torch.lerp(loss, lse - (others + score) / (kept + 1), smoothing)
    return with_stats(where, loss, compared.pairs, lse, score) if stats else without_stats(loss)


def _of_own_negatives(
    query: Tensor, key: Tensor, negatives: Tensor, scale: Tensor, weight: float | Tensor,
    smoothing: float, stats: bool,
) -> LossStats:  # fmt: skip
    """(N, 1 + M) scores: fewer than the negatives' own numbers, so they are made in memory."""
    availability.ran("pairs", "torch")
    similarity = torch.bmm(negatives, query.unsqueeze(2)).squeeze(2).to(scale.dtype)
    of_row = scale[:, None] if scale.dim() else scale
    others = similarity * of_row + number_on(weight, scale.dtype, scale.device)
    scores = torch.cat([(dots(query, key) * scale)[:, None], others], 1)
    target = torch.zeros(query.shape[0], dtype=torch.int64, device=query.device)
    loss = torch_cross_entropy(scores, target, reduction="none")
    if smoothing:
        kept = scores != -torch.inf
        mean_score = torch.where(kept, scores, 0).sum(1) / kept.sum(1)
        loss = torch.lerp(loss, torch.logsumexp(scores, 1) - mean_score, smoothing)
    if not stats:
        return without_stats(loss)
    correct, entropy = correct_and_entropy(scores[:, 0], scores)
    return LossStats(loss, torch.logsumexp(scores, 1), correct, entropy)
