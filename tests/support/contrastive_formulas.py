"""The contrastive losses as anyone writes them, with all scores in memory."""

import torch
import torch.nn.functional as F

INF = float("inf")


def cosines(x, y):
    return F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT


def reduced(loss, reduction):
    return {"none": lambda x: x, "mean": torch.mean, "sum": torch.sum}[reduction](loss)


def info_nce_scores(
    query, positive_key, negative_keys=None, temperature=0.1, negative_mode="unpaired", *,
    normalize=True, exclude=None, hard_negative_weight=0.0, own_negative_weight=0.0,
    negative_ids=None,
):  # fmt: skip
    """(N, keys), and the column of each row's positive."""
    compare = cosines if normalize else (lambda x, y: x @ y.mT)
    tau = temperature[:, None] if getattr(temperature, "ndim", 0) else temperature
    rows = torch.arange(len(query))
    scores = compare(query, positive_key) / tau
    if exclude is not None:
        same = (exclude[:, None] == exclude) & ~torch.eye(len(rows), dtype=torch.bool)
        scores = scores.masked_fill(same, -INF)
    if negative_keys is None:
        return scores, rows
    if negative_mode == "paired":
        others = compare(query[:, None], negative_keys).squeeze(1)
    else:
        others = compare(query, negative_keys)
    others = others / tau + hard_negative_weight
    if own_negative_weight:
        others = others + own_negative_weight * torch.eye(len(rows), dtype=others.dtype)
    if negative_ids is not None:
        others = others.masked_fill(exclude[:, None] == negative_ids, -INF)
    if negative_mode == "in_batch":
        return torch.cat([scores, others], 1), rows
    return torch.cat([scores.diagonal()[:, None], others], 1), torch.zeros_like(rows)


def info_nce(*inputs, reduction="mean", symmetric=False, label_smoothing=0.0, **options):
    scores, target = info_nce_scores(*inputs, **options)
    common = {"reduction": "none", "label_smoothing": label_smoothing}
    loss = F.cross_entropy(scores, target, **common)
    if symmetric:
        loss = (loss + F.cross_entropy(scores.t(), target, **common)) / 2
    return reduced(loss, reduction)


def of_several(scores, positive, reduction="mean", label_smoothing=0.0):
    """The mean of -log p over a row's positives, (N, M) bool, of scores (N, M or more)."""
    log_p = torch.log_softmax(scores, 1)
    number = positive.sum(1)
    own = torch.where(positive, log_p[:, : positive.shape[1]], 0).sum(1) / number.clamp(min=1)
    loss = -(1 - label_smoothing) * own - label_smoothing * log_p.mean(1)
    loss = torch.where(number > 0, loss, 0)
    return loss.sum() / (number > 0).sum().clamp(min=1) if reduction == "mean" else reduced(
        loss, reduction)  # fmt: skip


def info_nce_of_several(
    query, key, negatives, tau, positive, *, reduction="mean", symmetric=False, label_smoothing=0.0,
    hard_negative_weight=0.0, own_negative_weight=0.0, normalize=True,
):  # fmt: skip
    """positive: (N, M) bool."""
    compare = cosines if normalize else (lambda x, y: x @ y.mT)
    scores = compare(query, key) / (tau[:, None] if getattr(tau, "ndim", 0) else tau)
    both = (reduction, label_smoothing)
    if symmetric:
        there, back = (
            of_several(scores, positive, *both),
            of_several(scores.t(), positive.t(), *both),
        )
        return (there + back) / 2
    if negatives is not None:
        others = compare(query, negatives) / (tau[:, None] if getattr(tau, "ndim", 0) else tau)
        others = others + hard_negative_weight
        if own_negative_weight:
            others = others + own_negative_weight * torch.eye(len(query), dtype=others.dtype)
        scores = torch.cat([scores, others], 1)
    return of_several(scores, positive, *both)


def others_of_an_id(ids):
    """(N, N) bool: pairs of two rows with one id."""
    return (ids[:, None] == ids) & ~torch.eye(len(ids), dtype=torch.bool)


def clip_loss(image, text, logit_scale, exclude=None):
    logits = logit_scale * image @ text.t()
    if exclude is not None:
        logits = logits.masked_fill(others_of_an_id(exclude), -INF)
    rows = torch.arange(len(image))
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.t(), rows)) / 2


def siglip_loss(image, text, logit_scale, logit_bias, exclude=None):
    logits = logit_scale * image @ text.t() + logit_bias
    sign = 2 * torch.eye(len(image), dtype=logits.dtype) - 1
    loss = -F.logsigmoid(sign * logits)
    if exclude is not None:
        loss = loss[~others_of_an_id(exclude)]
    return loss.sum() / len(image)


def two_view_scores(z_i, z_j, temperature):
    z = torch.cat([z_i, z_j])
    return cosines(z, z) / temperature, torch.arange(len(z)).roll(len(z_i))


def nt_xent(z_i, z_j, temperature=0.5, reduction="mean", exclude=None):
    scores, other = two_view_scores(z_i, z_j, temperature)
    left_out = torch.eye(len(scores), dtype=torch.bool)
    if exclude is not None:
        left_out = left_out | others_of_an_id(exclude).repeat(2, 2)
    return F.cross_entropy(scores.masked_fill(left_out, -INF), other, reduction=reduction)


def dcl(z_i, z_j, temperature=0.1, reduction="mean", exclude=None):
    scores, other = two_view_scores(z_i, z_j, temperature)
    positive = scores.gather(1, other[:, None])
    ids = torch.arange(len(z_i)) if exclude is None else exclude
    same = (ids[:, None] == ids).repeat(2, 2)
    against = torch.logsumexp(scores.masked_fill(same, -INF), 1)
    return reduced(against - positive.squeeze(1), reduction)


def sup_con(features, labels, temperature=0.1, reduction="mean"):
    scores = cosines(features, features) / temperature
    itself = torch.eye(len(scores), dtype=torch.bool)
    mates = (labels[:, None] == labels) & ~itself
    log_p = torch.log_softmax(scores.masked_fill(itself, -INF), 1)
    loss = -torch.where(mates, log_p, 0).sum(1) / mates.sum(1).clamp(min=1)
    if reduction == "mean":
        return loss.sum() / (loss > 0).sum().clamp(min=1)
    return reduced(loss, reduction)
