"""Contrastive losses: compositions of one op, the log-sum-exps of scaled similarities."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from neglog import dispatch
from neglog.checks import (
    check_embeddings,
    check_groups,
    check_reduction,
    check_same_rows,
    check_scalar,
    check_smoothing,
    check_temperature,
    number_on,
)
from neglog.distributed import gathered
from neglog.losses._pairs import (
    Compared,
    How,
    compare,
    correct_and_entropy,
    dots,
    how_to_compare,
    in_memory,
    number,
    pairs_of,
    plainly_few,
    prepared,
    returned,
    scale_of,
    with_stats,
    without_stats,
)
from neglog.losses.cross_entropy import LossStats
from neglog.losses.linear_cross_entropy import linear_cross_entropy
from neglog.ops.nll import real_dtype
from neglog.ops.pairs_tile import Pairs
from neglog.ops.siglip import composite as siglip_composite
from neglog.ops.siglip import siglip
from neglog.tiles import plan

ROW_BYTES = plan.DEFAULT_WORKSPACE_MB << 20
NO_GROUP = torch.iinfo(torch.int64).min
NEGATIVE_MODES = ("unpaired", "paired", "in_batch")


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
    *,
    symmetric: bool = False,
    normalize: bool = True,
    exclude: Tensor | None = None,
    hard_negative_weight: float | Tensor = 0.0,
    label_smoothing: float = 0.0,
    return_stats: bool = False,
    options: Any = None,
    backend: str | None = None,
) -> Any:
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
        backend: "cython", "numba" or "torch"; None chooses.

    Raises:
        RuntimeError for shapes, dtypes and devices that do not fit, ValueError for values,
        TypeError for types.

    Source: arXiv:1807.03748; the arguments are those of info-nce-pytorch.
    """
    plain = plainly_few(query, positive_key, options, backend)
    if not plain:
        check_embeddings(query=query, positive_key=positive_key)
        check_same_rows(query=query, positive_key=positive_key)
    check_reduction(reduction)
    check_temperature(temperature, query.shape[0], per_sample=True)
    _check_negatives(query, negative_keys, negative_mode, symmetric, hard_negative_weight)
    check_smoothing(label_smoothing)
    if exclude is not None:
        check_groups("exclude", exclude, query.shape[0], query.device)
        if label_smoothing or (negative_keys is not None and negative_mode != "in_batch"):
            raise ValueError(
                "exclude: expected none with label_smoothing, 'unpaired' or 'paired' negatives"
            )
    alone = negative_keys is None and exclude is None and not return_stats
    if plain and alone and (not isinstance(temperature, Tensor) or temperature.dim() == 0):
        query, key = (F.normalize(x) if normalize else x for x in (query, positive_key))
        scale = scale_of(temperature, query)
        return _cross_entropy_in_memory(query, key, scale, label_smoothing, symmetric, reduction)
    how = how_to_compare(options, backend)
    given = query
    embeddings = [query, positive_key, *([] if negative_keys is None else [negative_keys])]
    query, key, *negatives = (prepared(x, normalize) for x in embeddings)
    scale = scale_of(temperature, query)
    if alone:
        if scale.dim() == 0 and in_memory(query, key, how.backend):
            loss = _cross_entropy_in_memory(
                query, key, scale, label_smoothing, symmetric, reduction
            )
            return returned(loss, "none", given)
        if not symmetric and reduction != "none" and _better_by_rows(query, temperature, how):
            return _by_rows(query, key, temperature, reduction, label_smoothing, how)
    further = negatives[0].shape[0] if negatives and negative_mode != "paired" else 0
    if not negatives or negative_mode == "in_batch":
        result = _in_batch(
            query, torch.cat([key, *negatives]) if negatives else key, scale,
            _bias(hard_negative_weight, key.shape[0], further, scale), exclude, label_smoothing,
            symmetric, return_stats, how,
        )  # fmt: skip
    elif negative_mode == "unpaired":
        bias = _bias(hard_negative_weight, 0, further, scale)
        result = _of_queue(
            query, key, negatives[0], scale, bias, label_smoothing, return_stats, how
        )
    else:
        result = _of_own_negatives(
            query, key, negatives[0], scale, hard_negative_weight, label_smoothing, return_stats
        )
    loss = returned(result.loss, reduction, given)
    # Not _replace, which torch.compile of 2.11 cannot give back.
    return LossStats(loss, *result[1:]) if return_stats else loss


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    group: Any = None,
    options: Any = None,
    backend: str | None = None,
) -> Tensor:
    """The mean of cross-entropy from images to texts and from texts to images.

    Args:
        image_features, text_features: (N, D), compared by dot product: normalise them first.
        logit_scale: what similarities are multiplied by; a tensor () receives a gradient.
        logit_bias: changes nothing, as in open_clip: a number added to all logits leaves softmax.
        group: a torch.distributed process group: this process's images against the texts of all,
            and its texts against all images, with gradients back to all. The mean over processes,
            as DistributedDataParallel takes it of gradients, is then the loss of the whole batch.
        options, backend: as in `info_nce`.

    Source: arXiv:2103.00020; the arguments are those of open_clip's ClipLoss.
    """
    plain = plainly_few(image_features, text_features, options, backend)
    if not plain:
        check_embeddings(image_features=image_features, text_features=text_features)
        check_same_rows(image_features=image_features, text_features=text_features)
    check_scalar("logit_scale", logit_scale)
    if logit_bias is not None:
        check_scalar("logit_bias", logit_bias)
    if plain and group is None:
        scale = number(logit_scale, image_features)
        return _cross_entropy_in_memory(image_features, text_features, scale, 0.0, True, "mean")
    how = how_to_compare(options, backend)
    image, text = (prepared(x, False) for x in (image_features, text_features))
    scale = number(logit_scale, image)
    if group is not None:
        losses = [
            _of_processes(*sides, scale, how, group) for sides in ((image, text), (text, image))
        ]
        return returned((losses[0] + losses[1]) / 2, "mean", image_features)
    if in_memory(image, text, how.backend):
        loss = _cross_entropy_in_memory(image, text, scale, 0.0, True, "mean")
        return returned(loss, "none", image_features)
    loss = _in_batch(image, text, scale, None, None, 0.0, True, False, how).loss
    return returned(loss, "mean", image_features)


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    group: Any = None,
    options: Any = None,
    backend: str | None = None,
) -> Tensor:
    """-log sigmoid of each pair's score, negated where image and text do not belong; sum over / N.

    Arguments as `clip_loss`; logit_bias is added to the scores and receives a gradient.

    Source: arXiv:2303.15343; the arguments are those of open_clip's SigLipLoss.
    """
    check_embeddings(image_features=image_features, text_features=text_features)
    check_same_rows(image_features=image_features, text_features=text_features)
    check_scalar("logit_scale", logit_scale)
    check_scalar("logit_bias", logit_bias)
    workspace, forced = how_to_compare(options, backend)
    image, text = (prepared(x, False) for x in (image_features, text_features))
    positive = torch.arange(image.shape[0], device=image.device)
    if group is not None:
        text, first = gathered(text, group)
        positive = positive + first
    inputs = (image, text, number(logit_scale, image), number(logit_bias, image))
    if in_memory(image, text, forced):
        dispatch.ran("siglip", "torch")
        total = siglip_composite(*inputs, positive)
    else:
        wanted = [torch.is_grad_enabled() and x.requires_grad for x in inputs]
        total = siglip(*inputs, positive, workspace, forced or "", wanted)
    return returned(total / image.shape[0], "sum", image_features)


def nt_xent(
    z_i: Tensor,
    z_j: Tensor,
    temperature: float | Tensor = 0.5,
    reduction: str = "mean",
    *,
    normalize: bool = True,
    options: Any = None,
    backend: str | None = None,
) -> Tensor:
    """SimCLR's loss: each of the 2N views against its other view, among all but itself.

    Args:
        z_i, z_j: (N, D), two views of the same N things.
        temperature: a number or a tensor (), which receives a gradient.
        reduction: "none" gives (2N,), those of z_i first.
        normalize, options, backend: as in `info_nce`.

    The matrix of similarities is symmetric: half of it is computed.

    Source: arXiv:2002.05709; NTXentLoss of pytorch-metric-learning and of lightly.
    """
    z, how = _two_views(z_i, z_j, temperature, reduction, normalize, options, backend)
    rows = torch.arange(z.shape[0], device=z.device)
    positive = rows.roll(z_i.shape[0])
    scale = scale_of(temperature, z)
    if in_memory(z, z, how.backend):
        dispatch.ran("pairs", "torch")
        scores = _scaled(z, z, scale).masked_fill(rows == rows[:, None], -torch.inf)
        return returned(F.cross_entropy(scores, positive, reduction=reduction), "none", z_i)
    pairs = pairs_of(z, z, scale, how, positive=positive, excluded=rows, symmetric=True)
    return returned(compare(pairs).row_loss, reduction, z_i)


def dcl(
    z_i: Tensor,
    z_j: Tensor,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    *,
    normalize: bool = True,
    options: Any = None,
    backend: str | None = None,
) -> Tensor:
    """`nt_xent` decoupled: the positive is not among what it is held against.

    Arguments as `nt_xent`. The loss may be below 0.

    Source: arXiv:2110.06848.
    """
    z, how = _two_views(z_i, z_j, temperature, reduction, normalize, options, backend)
    scale = scale_of(temperature, z)
    group = torch.arange(z_i.shape[0], device=z.device).repeat(2)
    pairs = pairs_of(z, z, scale, how, query_group=group, key_group=group, symmetric=True)
    score = dots(z, z.roll(z_i.shape[0], 0)) * scale
    return returned(compare(pairs).row_lse - score, reduction, z_i)


def sup_con(
    features: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    *,
    normalize: bool = True,
    options: Any = None,
    backend: str | None = None,
) -> Tensor:
    """Supervised contrastive loss: -log p of a row's label mates, averaged over them.

    Args:
        features: (N, D); labels: (N,) integers.
        temperature: a number or a tensor (), which receives a gradient.
        reduction: a row without a mate has loss 0 and no share in the "mean", which is 0 if no row
            has one, as pytorch-metric-learning's SupConLoss has it.
        normalize, options, backend: as in `info_nce`.

    Source: arXiv:2004.11362, its L_out.
    """
    check_embeddings(features=features)
    check_groups("labels", labels, features.shape[0], features.device)
    check_reduction(reduction)
    check_temperature(temperature, features.shape[0], per_sample=False)
    how = how_to_compare(options, backend)
    z = prepared(features, normalize)
    scale = scale_of(temperature, z)
    rows = torch.arange(z.shape[0], device=z.device)
    mates = _Mates.of(labels)
    # A row's only mate is a positive, whose loss may be near 0 and then needs the score that its
    # log-sum-exp was made of. With more mates than one the loss is log 2 or more.
    only = mates.number == 1
    positive = torch.where(only, mates.first, rows)
    compared = compare(pairs_of(z, z, scale, how, positive=positive, excluded=rows, symmetric=True))
    of_many = compared.row_lse - scale * mates.mean_score(z)
    loss = torch.where(only, compared.row_loss, torch.where(mates.number > 0, of_many, 0))
    if reduction == "mean":
        return returned(loss.sum() / (mates.number > 0).sum().clamp(min=1), "none", features)
    return returned(loss, reduction, features)


# Views, negatives, mates


def _two_views(
    z_i: Tensor, z_j: Tensor, temperature: float | Tensor, reduction: str, normalize: bool,
    options: Any, backend: str | None,
) -> tuple[Tensor, How]:  # fmt: skip
    """Both views as one (2N, D), and how to compare them."""
    plain = plainly_few(z_i, z_j, options, backend)
    if not plain:
        check_embeddings(z_i=z_i, z_j=z_j)
        check_same_rows(z_i=z_i, z_j=z_j)
    check_reduction(reduction)
    check_temperature(temperature, z_i.shape[0], per_sample=False)
    how = how_to_compare(options, backend)
    z = torch.cat([z_i, z_j])
    return (F.normalize(z) if plain and normalize else prepared(z, normalize)), how


def _check_negatives(
    query: Tensor, negative_keys: Any, mode: str, symmetric: bool, weight: Any
) -> None:
    if mode not in NEGATIVE_MODES:
        raise ValueError(f"negative_mode: expected one of {NEGATIVE_MODES}, got {mode!r}")
    if negative_keys is None:
        return
    if symmetric:
        raise ValueError("symmetric: expected False with negative_keys, which have no queries")
    if mode != "paired":
        check_embeddings(query=query, negative_keys=negative_keys)
    elif not isinstance(negative_keys, Tensor):
        raise TypeError(f"negative_keys: expected a Tensor, got {type(negative_keys).__name__}")
    elif negative_keys.dim() != 3 or negative_keys.shape[::2] != query.shape:
        raise RuntimeError(
            f"negative_keys: expected shape ({query.shape[0]}, M, {query.shape[1]}) for 'paired', "
            f"got {list(negative_keys.shape)}"
        )
    else:
        check_embeddings(query=query, negative_keys=negative_keys.flatten(0, 1))
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


class _Mates(NamedTuple):
    """The other rows with a row's label, (N,) each."""

    of_row: Tensor  # the label's number: its first place in the order of all
    number: Tensor
    first: Tensor  # a mate, if there is one

    @classmethod
    def of(cls, labels: Tensor) -> _Mates:
        # torch.unique, whose result's size depends on the values, would break a graph that is
        # being compiled.
        labels = labels.long().contiguous()
        sorted_labels, order = labels.sort(stable=True)
        of_row = torch.searchsorted(sorted_labels, labels)
        number = torch.zeros_like(of_row).index_add(0, of_row, torch.ones_like(of_row))[of_row] - 1
        one, other = order[of_row], order[(of_row + 1).clamp(max=max(labels.shape[0] - 1, 0))]
        rows = torch.arange(one.shape[0], device=one.device)
        return cls(of_row, number, torch.where(one == rows, other, one))

    def mean_score(self, z: Tensor) -> Tensor:
        """Each row's mean similarity to its mates, by sums over labels."""
        # In double: a sum less one of its terms cancels where that is the longest.
        wide = z.double() if z.device.type in ("cpu", "cuda") else z.to(real_dtype(z.dtype))
        others = _sum_of_label(wide, self.of_row) - wide
        score = (wide * others).sum(-1) / self.number.clamp(min=1)
        return score.to(real_dtype(z.dtype))


def _sum_of_label(wide: Tensor, of_row: Tensor) -> Tensor:
    """For each row the sum over its label's rows, and its derivative, in one order: on CUDA threads
    race in index_add, which is the backward of index_select too; on the CPU in that of indexing."""
    zeros = torch.zeros_like(wide)
    if wide.is_cuda:
        return zeros.index_put((of_row,), wide, accumulate=True)[of_row]
    return zeros.index_add(0, of_row, wide).index_select(0, of_row)


# The forms of info_nce


def _better_by_rows(query: Tensor, temperature: float | Tensor, how: How) -> bool:
    """Whether to take the loss of rows alone as linear cross-entropy, with the keys for classes.

    It forms gradients in the forward: 3 matmuls, where the op pairs has 4 if it cannot keep the
    similarities. A temperature that learns is multiplied in before, which 16 bits would round.
    """
    kept = query.shape[0] ** 2 * query.itemsize <= how.workspace
    exact = not isinstance(temperature, Tensor) or query.itemsize > 2
    return exact and not kept and not in_memory(query, query, how.backend)


def _by_rows(
    query: Tensor, key: Tensor, temperature: float | Tensor, reduction: str, smoothing: float,
    how: How,
) -> Tensor:  # fmt: skip
    budget = how.workspace if query.is_cuda else min(how.workspace, ROW_BYTES)
    learned = isinstance(temperature, Tensor)
    if isinstance(temperature, Tensor):
        scale = scale_of(temperature, query)
        query = query * (scale[:, None] if scale.dim() else scale)
    return linear_cross_entropy(
        query, key, torch.arange(query.shape[0], device=query.device), reduction=reduction,
        label_smoothing=smoothing, logit_scale=1.0 if learned else 1.0 / float(temperature),
        options={"workspace_mb": budget / 2**20}, backend=how.backend,
    )  # fmt: skip


def _in_batch(
    query: Tensor, key: Tensor, scale: Tensor, bias: Tensor | None, exclude: Tensor | None,
    smoothing: float, symmetric: bool, stats: bool, how: How,
) -> LossStats:  # fmt: skip
    """Queries against their positives, which are the first keys, and the further keys."""
    rows = torch.arange(query.shape[0], device=query.device)
    own, of_keys = _groups(exclude, key.shape[0] - query.shape[0])
    pairs = pairs_of(
        query, key, scale, how, bias=bias, positive=rows, query_group=own, key_group=of_keys,
        columns=symmetric,
    )  # fmt: skip
    compared = compare(pairs)
    loss = compared.row_loss
    if smoothing:
        mean_key, mean_bias, _ = _mean_of_kept(key, bias, scale)
        mean_score = scale * dots(query, mean_key) + mean_bias
        loss = torch.lerp(loss, compared.row_lse - mean_score, smoothing)
    if symmetric:
        loss = (loss + _column_loss(pairs, compared, smoothing)) / 2
    if not stats:
        return without_stats(loss)
    return with_stats(loss, pairs, compared.row_lse, compared.score)


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


def _groups(exclude: Tensor | None, further: int) -> tuple[Tensor | None, Tensor | None]:
    """Of the queries, and of the keys, the `further` ones of which are in nobody's."""
    if exclude is None:
        return None, None
    own = exclude.long()
    return own, own if not further else torch.cat([own, own.new_full((further,), NO_GROUP)])


def _column_loss(pairs: Pairs, compared: Compared, smoothing: float) -> Tensor:
    """Each key against all queries."""
    if not smoothing:
        return compared.column_loss
    query, scale = pairs.query, pairs.scale
    of_row = scale[:, None] if scale.dim() else scale
    mean_query = (query * of_row).mean(0, keepdim=True, dtype=scale.dtype)
    mean_score = dots(pairs.key, mean_query)
    return torch.lerp(compared.column_loss, compared.column_lse - mean_score, smoothing)


def _of_processes(query: Tensor, key: Tensor, scale: Tensor, how: How, group: Any) -> Tensor:
    """Losses of this process's queries against the keys of all processes."""
    keys, first = gathered(key, group)
    positive = torch.arange(query.shape[0], device=query.device) + first
    return compare(pairs_of(query, keys, scale, how, positive=positive)).row_loss


def _scaled(query: Tensor, key: Tensor, scale: Tensor) -> Tensor:
    similarity = query @ key.t()
    return similarity.to(real_dtype(similarity.dtype)) * scale


def _cross_entropy_in_memory(
    query: Tensor, key: Tensor, scale: Tensor, smoothing: float, symmetric: bool, reduction: str
) -> Tensor:
    """The formula that everyone writes, where it is the fastest."""
    dispatch.ran("pairs", "torch")
    scores = _scaled(query, key, scale)
    target = torch.arange(query.shape[0], device=query.device)

    def loss(scores: Tensor) -> Tensor:
        return F.cross_entropy(scores, target, reduction=reduction, label_smoothing=smoothing)

    return (loss(scores) + loss(scores.t())) / 2 if symmetric else loss(scores)


def _of_queue(
    query: Tensor, key: Tensor, negatives: Tensor, scale: Tensor, bias: Tensor | None,
    smoothing: float, stats: bool, how: How,
) -> LossStats:  # fmt: skip
    """Queries against their positive and keys that belong to nobody."""
    pairs = pairs_of(query, negatives, scale, how, bias=bias)
    compared = compare(pairs)
    score = scale * dots(query, key)
    # -log(e^s / (e^s + e^lse)); beyond 40 softplus is its argument to the last digit of a double.
    loss = F.softplus(compared.row_lse - score, threshold=40)
    lse = loss + score
    if smoothing:
        mean_key, mean_bias, kept = _mean_of_kept(negatives, bias, scale)
        others = kept * (scale * dots(query, mean_key) + mean_bias)
        loss = torch.lerp(loss, lse - (others + score) / (kept + 1), smoothing)
    return with_stats(loss, pairs, lse, score) if stats else without_stats(loss)


def _of_own_negatives(
    query: Tensor, key: Tensor, negatives: Tensor, scale: Tensor, weight: float | Tensor,
    smoothing: float, stats: bool,
) -> LossStats:  # fmt: skip
    """(N, 1 + M) scores: fewer than the negatives' own numbers, so they are made in memory."""
    dispatch.ran("pairs", "torch")
    similarity = torch.bmm(negatives, query.unsqueeze(2)).squeeze(2).to(scale.dtype)
    of_row = scale[:, None] if scale.dim() else scale
    others = similarity * of_row + number_on(weight, scale.dtype, scale.device)
    scores = torch.cat([(dots(query, key) * scale)[:, None], others], 1)
    target = torch.zeros(query.shape[0], dtype=torch.int64, device=query.device)
    loss = F.cross_entropy(scores, target, reduction="none")
    if smoothing:
        kept = scores != -torch.inf
        mean_score = torch.where(kept, scores, 0).sum(1) / kept.sum(1)
        loss = torch.lerp(loss, torch.logsumexp(scores, 1) - mean_score, smoothing)
    if not stats:
        return without_stats(loss)
    correct, entropy = correct_and_entropy(scores[:, 0], scores)
    return LossStats(loss, torch.logsumexp(scores, 1), correct, entropy)
