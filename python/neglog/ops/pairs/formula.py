"""pairs in torch's own functions: scores in memory, differentiable as often as wanted."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from neglog.ops.pairs.schema import Pairs
from neglog.tiles import plan


def scores(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """(N, M) in the accumulation dtype: of all pairs, and with -inf where one is left out."""
    similarity = (pairs.query @ pairs.key.t()).to(pairs.real)
    z = similarity * (pairs.scale[:, None] if pairs.scale.dim() else pairs.scale)
    if pairs.bias is not None:
        z = z + pairs.bias
    left_out = excluded(pairs)
    return z, z if left_out is None else z.masked_fill(left_out, -torch.inf)


def excluded(pairs: Pairs) -> Tensor | None:
    """(N, M) bool, or None where every pair counts."""
    columns = torch.arange(pairs.key.shape[0], device=pairs.key.device)
    mask = None
    if pairs.query_group is not None and pairs.key_group is not None:
        mask = pairs.query_group[:, None] == pairs.key_group
        if pairs.positive is not None:
            mask = mask & (columns != pairs.positive[:, None])
    if pairs.excluded is not None:
        own = columns == pairs.excluded[:, None]
        mask = own if mask is None else mask | own
    return mask


def log_sum_exp(z: Tensor, dim: int) -> Tensor:
    """torch.logsumexp, whose second derivative is NaN where every number is -inf: here it is 0.

    Where a number is +inf it is NaN, as softmax is.
    """
    empty = (z == -torch.inf).all(dim)
    lse = torch.logsumexp(z.masked_fill(empty.unsqueeze(dim), 0), dim)
    return _nan_for_inf(lse).masked_fill(empty, -torch.inf)


def _nan_for_inf(x: Tensor) -> Tensor:
    """x, and NaN where it is +inf, for the gradient too."""
    return x * torch.where(x == torch.inf, torch.nan, 1.0)


def loss_beside(others: Tensor, score: Tensor) -> Tensor:
    """-log(e^score / (e^score + e^others)), as log(1 + e^d) with d = others - score: the
    log-sum-exp of both, less the score, has no digits left where the loss is near 0. Beyond 40 it
    is d to the last digit of a double."""
    return F.softplus(others - _nan_for_inf(score), threshold=40)


def pairs(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """row_loss, column_loss, row_lse, column_lse and score, as the op."""
    plain, z = scores(pairs)
    nothing = z.new_empty(0)
    column_lse = log_sum_exp(z, 0) if pairs.columns else nothing
    if pairs.positive is None:
        return nothing, nothing, log_sum_exp(z, 1), column_lse, nothing
    own = pairs.positive[:, None]
    score = plain.gather(1, own).squeeze(1)
    column_loss = column_lse[pairs.positive] - score if pairs.columns else nothing
    if pairs.excluded is None and pairs.query_group is None and pairs.bias is None:
        row_loss = -F.log_softmax(z, 1).gather(1, own).squeeze(1)
        return row_loss, column_loss, log_sum_exp(z, 1), column_lse, score
    others = log_sum_exp(z.scatter(1, own, -torch.inf), 1)
    loss = loss_beside(others, score)
    left_out = z.gather(1, own).squeeze(1) == -torch.inf  # the positive is not among the keys
    row_loss = torch.where(left_out, others - score, loss)
    return row_loss, column_loss, torch.where(left_out, others, loss + score), column_lse, score


def sigmoid(pairs: Pairs) -> Tensor:
    """The sum over all pairs of -log sigmoid(+-score); those left out have -log sigmoid(inf), 0."""
    assert pairs.positive is not None
    z = scores(pairs)[1]
    own = torch.arange(z.shape[1], device=z.device) == pairs.positive[:, None]
    return -F.logsigmoid(torch.where(own, z, -z)).sum()


# Of scores whose statistics are formed at once; half a dozen temporaries have their size.
STATISTICS_BYTES = 4 << 20


def statistics(positive_score: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: whether no key scores above its positive, the entropy in nats, and which key has
    the highest score, -1 for a positive that is not among the keys.

    Another walk over the similarities, some rows at a time. positive_score (N,) is used where the
    positives are not among the keys.
    """
    budget = min(STATISTICS_BYTES, pairs.workspace or STATISTICS_BYTES)
    row_bytes = pairs.key.shape[0] * positive_score.itemsize
    height = plan.rows_per_tile(positive_score.shape[0], row_bytes, budget)
    found = []
    with torch.no_grad():
        for rows in plan.row_tiles(positive_score.shape[0], height):
            part = pairs.rows(rows)
            plain, z = scores(part)
            if part.positive is None:
                own, first = positive_score[rows], -1
                z = torch.cat([own[:, None], z], 1)
            else:  # from this product: another may round differently, and would seem to be beaten
                own, first = plain.gather(1, part.positive[:, None]).squeeze(1), 0
            correct, entropy, best = statistics_of(own, z)
            found.append((correct, entropy, best + first))
    if not found:
        new = positive_score.new_zeros
        return new(0, dtype=torch.bool), new(0), new(0, dtype=torch.int64)
    correct, entropy, best = (torch.cat(parts) for parts in zip(*found, strict=True))
    return correct, entropy, best


def statistics_of(score: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether no score is above the positive's, -sum p log p, and the place of the highest; (N,),
    without gradient."""
    score, scores = score.detach(), scores.detach()
    entropy = entropy_terms(torch.log_softmax(scores, 1)).sum(1)
    highest, best = scores.max(1)
    return score >= highest, entropy, best


def entropy_terms(log_p: Tensor) -> Tensor:
    """-p log p of each, in nats."""
    return -torch.where(log_p == -torch.inf, 0, log_p.exp() * log_p)
