"""kl in torch's own differentiable ops: for other devices, and for the second derivative.

Plain formulas of `neglog.reference`, kept in the accumulation dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neglog.ops.dtypes import real_dtype
from neglog.ops.kl.schema import Options
from neglog.ops.nll import formula as of_nll
from neglog.ops.nll.schema import MEAN, SUM


def kl(
    logits: Tensor, teacher: Tensor, ids: Tensor | None, target: Tensor,
    token_weight: Tensor | None, num_items: Tensor | None, reduction: int, options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As the op neglog::kl: loss, total_weight, divergence, cross_entropy."""
    real = real_dtype(logits.dtype)
    counted = of_nll.counted_rows(target, token_weight, options.ignore_index)
    assert counted is not None
    # Rows that do not count are no numbers perhaps: a NaN there would come back as 0 * NaN.
    z = of_nll.scores(
        torch.where(counted[:, None], logits, 0), options.logit_scale, options.softcap
    )
    nothing = 0 if ids is None else -math.inf  # which names no class
    given = torch.where(counted[:, None], teacher.to(real), nothing)
    soft, hard = _divergence_of_rows(z, given, ids, options), _cross_entropy(z, target, counted)
    soft, hard = (torch.where(counted, x, 0) for x in (soft, hard))
    loss = _unless(options.soft_weight == 0, options.soft_weight * soft)
    loss = loss + _unless(options.hard_weight == 0, options.hard_weight * hard)
    if token_weight is not None:
        loss = torch.where(counted, token_weight * loss, 0)
    total = of_nll.total_weight(target, counted, None, real, token_weight)
    total = total if num_items is None else num_items
    if reduction == MEAN:
        loss = loss.sum() / total
    elif reduction == SUM:
        loss = loss.sum()
    soft, hard = (
        _unless(weight == 0, part.detach())
        for weight, part in ((options.soft_weight, soft), (options.hard_weight, hard))
    )
    return loss, total, soft, hard


def _unless(zero: bool | Tensor, x: Tensor) -> Tensor:
    """0 in place of what may be inf or NaN."""
    if isinstance(zero, Tensor):
        return torch.where(zero, 0, x)
    return torch.zeros_like(x) if zero else x


def _divergence_of_rows(z: Tensor, teacher: Tensor, ids: Tensor | None, options: Options) -> Tensor:
    soft = z / options.temperature
    if ids is not None:
        bins, log_q = _bins(soft, teacher, ids)
        return divergence(torch.log_softmax(bins, 1), log_q, options.beta)
    if options.probabilities:
        teacher = teacher.log()
    given = of_nll.scores(teacher, options.teacher_scale, options.teacher_softcap)
    return divergence(torch.log_softmax(soft, 1), torch.log_softmax(given, 1), options.beta)


def _bins(z: Tensor, logs: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (N, K + 1) of the named classes and of all others as one, and the teacher's
    log-probabilities of these. A class of probability 0 is none of the named ones."""
    if z.shape[1]:  # less the largest: near 1e4 the others' log-sum-exp would be off by 5e-4
        largest = z.detach().amax(1, keepdim=True)
        z = z - torch.where(largest.isfinite(), largest, 0)
    named = logs > -math.inf
    ids = torch.where(named, ids, 0)
    is_named = torch.zeros_like(z, dtype=torch.int64).scatter_add(1, ids, named.long()) != 0
    others = of_nll.log_sum_exp(torch.where(is_named, -math.inf, z))
    bins = torch.where(named, z.gather(1, ids), -math.inf)
    rest = (1 - logs.double().exp().sum(1)).clamp(min=0).log().to(logs.dtype)
    rest = torch.where(named.sum(1) < z.shape[1], rest, -math.inf)
    return torch.cat([bins, others[:, None]], 1), torch.cat([logs, rest[:, None]], 1)


def _cross_entropy(z: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    index = torch.where(counted, target, 0)
    return -torch.log_softmax(z, 1).gather(1, index[:, None])[:, 0]


def divergence(log_p: Tensor, log_q: Tensor, beta: float | Tensor) -> Tensor:
    """Of the rows of p from those of q (N,): reference.divergence."""
    if isinstance(beta, Tensor):  # which of the three is not known yet
        between = _between(log_p, log_q, beta.clamp(1e-30, 1 - 1e-7))
        found = torch.where(beta == 0, _mean_log(log_q, log_q - log_p), between)
        return torch.where(beta == 1, _mean_log(log_p, log_p - log_q), found)
    if beta == 0:
        return _mean_log(log_q, log_q - log_p)
    if beta == 1:
        return _mean_log(log_p, log_p - log_q)
    return _between(log_p, log_q, beta)


def _between(log_p: Tensor, log_q: Tensor, beta: float | Tensor) -> Tensor:
    share = torch.as_tensor(beta, dtype=log_p.dtype, device=log_p.device)
    # Where both are -inf, the derivative of the log of their mean is NaN.
    nothing = (log_p.detach() == -math.inf) & (log_q == -math.inf)
    log_m = torch.logaddexp(
        share.log() + torch.where(nothing, 0, log_q),
        torch.log1p(-share) + torch.where(nothing, 0, log_p),
    )
    of_student = _mean_log(log_p, log_p - log_m)
    return share * _mean_log(log_q, log_q - log_m) + (1 - share) * of_student


def _mean_log(log_weights: Tensor, logs: Tensor) -> Tensor:
    """Of the logs, by weights. Where the weight is 0, neither it nor a derivative is 0 * inf."""
    zero = log_weights.detach().exp() == 0
    logs = torch.where(zero, 0, logs)
    return (torch.where(zero, 0, log_weights.exp()) * logs).sum(1)
