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
    """torch.logsumexp, whose second derivative is NaN where every number is -inf: here it is 0."""
    empty = (z == -torch.inf).all(dim)
    lse = torch.logsumexp(z.masked_fill(empty.unsqueeze(dim), 0), dim)
    return lse.masked_fill(empty, -torch.inf)


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
    # log(1 + e^d), as lse - score has no digits left where the loss is near 0; beyond 40 it is d to
    # the last digit of a double.
    others = log_sum_exp(z.scatter(1, own, -torch.inf), 1)
    loss = F.softplus(others - score, threshold=40)
    left_out = z.gather(1, own).squeeze(1) == -torch.inf  # the positive is not among the keys
    row_loss = torch.where(left_out, others - score, loss)
    return row_loss, column_loss, torch.where(left_out, others, loss + score), column_lse, score


def sigmoid(query: Tensor, key: Tensor, scale: Tensor, bias: Tensor, positive: Tensor) -> Tensor:
    """The sum over all pairs of -log sigmoid(+-score)."""
    scores = (query @ key.t()).to(scale.dtype) * scale + bias
    own = torch.arange(key.shape[0], device=key.device) == positive[:, None]
    sign = 2.0 * own.to(scale.dtype) - 1.0
    return -F.logsigmoid(sign * scores).sum()


# Of scores whose statistics are formed at once; half a dozen temporaries have their size.
STATISTICS_BYTES = 4 << 20


def statistics(positive_score: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Of each row: whether no key scores above its positive, and the entropy in nats.

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
                own = positive_score[rows]
                z = torch.cat([own[:, None], z], 1)
            else:  # from this product: another may round differently, and would seem to be beaten
                own = plain.gather(1, part.positive[:, None]).squeeze(1)
            found.append(correct_and_entropy(own, z))
    if not found:
        return positive_score.new_zeros(0, dtype=torch.bool), positive_score.new_zeros(0)
    correct, entropy = (torch.cat(parts) for parts in zip(*found, strict=True))
    return correct, entropy


def correct_and_entropy(score: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Whether no score is above the positive's, and -sum p log p; (N,), without gradient."""
    log_p = torch.log_softmax(scores.detach(), 1)
    entropy = -torch.where(log_p == -torch.inf, 0, log_p.exp() * log_p).sum(1)
    return score.detach() >= scores.detach().amax(1), entropy
