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
    normalize=True, exclude=None, hard_negative_weight=0.0,
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


def clip_loss(image, text, logit_scale):
    logits = logit_scale * image @ text.t()
    rows = torch.arange(len(image))
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.t(), rows)) / 2


def siglip_loss(image, text, logit_scale, logit_bias):
    logits = logit_scale * image @ text.t() + logit_bias
    sign = 2 * torch.eye(len(image), dtype=logits.dtype) - 1
    return -F.logsigmoid(sign * logits).sum() / len(image)


def two_view_scores(z_i, z_j, temperature):
    z = torch.cat([z_i, z_j])
    return cosines(z, z) / temperature, torch.arange(len(z)).roll(len(z_i))


def nt_xent(z_i, z_j, temperature=0.5, reduction="mean"):
    scores, other = two_view_scores(z_i, z_j, temperature)
    itself = torch.eye(len(scores), dtype=torch.bool)
    return F.cross_entropy(scores.masked_fill(itself, -INF), other, reduction=reduction)


def dcl(z_i, z_j, temperature=0.1, reduction="mean"):
    scores, other = two_view_scores(z_i, z_j, temperature)
    positive = scores.gather(1, other[:, None])
    same = torch.eye(len(z_i), dtype=torch.bool).repeat(2, 2)
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
