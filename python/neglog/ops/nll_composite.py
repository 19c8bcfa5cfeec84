"""nll in torch's own differentiable ops: for other devices, and for the second derivative.

Plain formulas of `neglog.reference`, kept in the accumulation dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

NONE, MEAN, SUM = 0, 1, 2


def scores(logits: Tensor, logit_scale: float, softcap: float) -> tuple[Tensor, Tensor | float]:
    """z = softcap * tanh(logit_scale * x / softcap), and dz/dx."""
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z = logits.to(real)
    if logit_scale != 1:
        z = z * logit_scale
    if softcap == 0:
        return z, logit_scale
    ratio = torch.tanh(z / softcap)
    return softcap * ratio, logit_scale * (1 - ratio) * (1 + ratio)


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


def _upstream(grad_loss: Tensor, total_weight: Tensor, reduction: int, rows: int) -> Tensor:
    upstream = grad_loss / total_weight if reduction == MEAN else grad_loss
    return upstream.expand(rows)


def nll(
    logits: Tensor, target: Tensor, weight: Tensor | None, num_items: Tensor | None,
    reduction: int, ignore_index: int, label_smoothing: float, logit_scale: float, softcap: float,
    z_loss: float, stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As the op neglog::nll: loss, lse, total_weight, correct, entropy."""
    z, _ = scores(logits, logit_scale, softcap)
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


def gradient(
    grad_loss: Tensor, grad_lse: Tensor | None, logits: Tensor, target: Tensor,
    weight: Tensor | None, total_weight: Tensor, options: tuple,
) -> Tensor:  # fmt: skip
    """As the op neglog::nll_backward, differentiable in its four first arguments."""
    reduction, ignore_index, label_smoothing, logit_scale, softcap, z_loss = options
    z, dz_dx = scores(logits, logit_scale, softcap)
    mass, row_weight, counted = _mass(z, target, weight, ignore_index, label_smoothing)
    upstream = torch.where(counted, _upstream(grad_loss, total_weight, reduction, len(z)), 0)
    needed = counted if grad_lse is None else counted | (grad_lse != 0)
    kept = torch.where(needed[:, None], z, 0)
    p = torch.softmax(kept, 1)
    soft = upstream * mass.sum(1)
    if z_loss:
        soft = soft + upstream * 2 * z_loss * row_weight * torch.logsumexp(kept, 1)
    if grad_lse is not None:
        soft = soft + grad_lse
    dz = soft[:, None] * p - upstream[:, None] * mass
    return (dz * dz_dx).to(logits.dtype)


def target_gradient(
    grad_loss: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None,
    total_weight: Tensor, reduction: int, ignore_index: int, label_smoothing: float,
    logit_scale: float, softcap: float, z_loss: float,
) -> Tensor:  # fmt: skip
    """The gradient of probability targets: -w (1 - label_smoothing) log p, times the upstream."""
    z, _ = scores(logits, logit_scale, softcap)
    log_p = torch.log_softmax(z, 1)
    if weight is not None:
        log_p = log_p * weight
    upstream = _upstream(grad_loss, total_weight, reduction, len(z))
    return (upstream[:, None] * (label_smoothing - 1) * log_p).to(target.dtype)
