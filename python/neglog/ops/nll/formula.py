"""nll in torch's own differentiable ops: for other devices, and for the second derivative.

Plain formulas of `neglog.reference`, kept in the accumulation dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neglog.ops.dtypes import real_dtype
from neglog.ops.nll.schema import MEAN, SUM, Options


def scores(logits: Tensor, logit_scale: float, softcap: float) -> Tensor:
    """z = softcap * tanh(logit_scale * x / softcap)."""
    z = logits.to(real_dtype(logits.dtype))
    if logit_scale != 1:
        z = z * logit_scale
    return z if softcap == 0 else softcap * torch.tanh(z / softcap)


def _mass(
    z: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What multiplies each -log p (N, V); each row's weight (N,); which rows count (N,) bool."""
    vocab = max(1, z.shape[1])  # nothing is spread over no classes
    w = z.new_ones(z.shape[1]) if weight is None else weight
    if target.dim() == 2:
        smoothed = target.to(z.dtype) * (1 - label_smoothing) + label_smoothing / vocab
        return w * smoothed, z.new_ones(len(z)), torch.ones_like(z[:, 0], dtype=torch.bool)
    counted = target != ignore_index
    index = torch.where(counted, target, 0)
    row_weight = torch.where(counted, w[index], 0)
    spread = (label_smoothing / vocab * w).expand_as(z)
    mass = torch.scatter_add(
        spread, 1, index[:, None], ((1 - label_smoothing) * w[index])[:, None].to(z.dtype)
    )
    return mass, row_weight, counted


def nll(
    logits: Tensor, target: Tensor, weight: Tensor | None, num_items: Tensor | None,
    options: Options, stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As the op neglog::nll: loss, lse, total_weight, correct, entropy."""
    reduction, ignore_index, label_smoothing, logit_scale, softcap, z_loss = options
    z = scores(logits, logit_scale, softcap)
    lse = torch.logsumexp(z, 1)
    mass, row_weight, counted = _mass(z, target, weight, ignore_index, label_smoothing)
    # Ignored rows leave before the softmax: a NaN there would come back as 0 * NaN.
    kept = torch.where(counted[:, None], z, 0)
    log_p = torch.log_softmax(kept, 1)
    if target.dim() == 1 and label_smoothing == 0:
        index = torch.where(counted, target, 0)
        loss = -row_weight * log_p.gather(1, index[:, None])[:, 0]
    else:
        loss = -(mass * log_p).sum(1)
    if z_loss:
        loss = loss + row_weight * z_loss * torch.logsumexp(kept, 1) ** 2
    loss = torch.where(counted, loss, 0)
    total_weight = row_weight.sum() if num_items is None else num_items
    if reduction == MEAN:
        loss = loss.sum() / total_weight
    elif reduction == SUM:
        loss = loss.sum()
    correct, entropy = _statistics(z.detach(), target, counted, stats)
    return loss, lse, total_weight, correct, entropy


def _statistics(z: Tensor, target: Tensor, counted: Tensor, stats: bool) -> tuple[Tensor, Tensor]:
    if not stats:
        return counted.new_empty(0), z.new_empty(0)
    log_p = torch.log_softmax(z, 1)
    p = log_p.exp()
    entropy = -torch.where(p == 0, 0, p * log_p).sum(1)
    if target.dim() == 2:
        return torch.zeros_like(counted), entropy
    return counted & (z.argmax(1) == target) & ~z.isnan().any(1), entropy


def target_gradient(
    grad_loss: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None,
    total_weight: Tensor, options: Options,
) -> Tensor:  # fmt: skip
    """The gradient of probability targets: -w (1 - label_smoothing) log p, times the upstream."""
    log_p = torch.log_softmax(scores(logits, options.logit_scale, options.softcap), 1)
    if weight is not None:
        log_p = log_p * weight
    upstream = grad_loss / total_weight if options.reduction == MEAN else grad_loss
    upstream = upstream.expand(len(logits))
    return (upstream[:, None] * (options.label_smoothing - 1) * log_p).to(target.dtype)
