"""nll in torch's own differentiable ops: for other devices, and for the second derivative.

Plain formulas of `neglog.reference`, kept in the accumulation dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neglog import torch_state
from neglog.ops.dtypes import real_dtype, softcap_in
from neglog.ops.nll.schema import MEAN, SUM, Options, as_rows


def scores(logits: Tensor, logit_scale: float | Tensor, softcap: float | Tensor) -> Tensor:
    """z = softcap * tanh(logit_scale * x / softcap)."""
    z = logits.to(real_dtype(logits.dtype))
    if not _is(logit_scale, 1):
        z = z * logit_scale
    if isinstance(softcap, Tensor):  # as softcap_in has it, of a number that is not known yet
        limits = torch.finfo(z.dtype)
        is_one = (softcap != 0) & (softcap <= limits.max)
        softcap = torch.where(is_one, softcap.clamp(min=limits.tiny), 1)
        return torch.where(is_one, softcap * _tanh(z / softcap), z)
    softcap = softcap_in(z.dtype, softcap)
    return z if softcap == 0 else softcap * _tanh(z / softcap)


def _is(number: float | Tensor, value: float) -> bool:
    """Whether it is known to be this. A tensor's number may not be read: a graph may be made."""
    return not isinstance(number, Tensor) and number == value


def _tanh(y: Tensor) -> Tensor:
    """torch.tanh, but that its derivative keeps its digits: 1 - tanh^2 has none where tanh is near
    1. This one is 4 d / (1 + d)^2."""
    decay = torch.exp(-2 * y.abs())
    large = y.sign() * ((1 - decay) / (1 + decay))
    return torch.where(y.abs() < 0.625, torch.tanh(y), large)  # near 0, 1 - decay cancels


def log_sum_exp(z: Tensor) -> Tensor:
    """Of each row: -inf for one of -inf, NaN where a score is inf or NaN.

    torch.logsumexp says inf for inf, and its derivative e^(z - lse) is off by 4e-3 near 1e5, where
    one float32 does not hold the lse.
    """
    shift = torch.logsumexp(z.detach(), 1, keepdim=True)  # any number near the maximum
    shift = torch.where(shift == -torch.inf, 0, shift)
    return (shift + (z - shift).exp().sum(1, keepdim=True).log()).squeeze(1)


def _has_no_classes(z: Tensor) -> bool:
    return torch_state.known_true(z.shape[1] == 0)


def counted_rows(target: Tensor, token_weight: Tensor | None, ignore_index: int) -> Tensor | None:
    """Which rows count (N,) bool; None for all."""
    named = target != ignore_index if target.dim() == 1 else None
    if token_weight is None:
        return named
    weighs = token_weight != 0
    return weighs if named is None else named & weighs


def _mass(
    z: Tensor, target: Tensor, weight: Tensor | None, counts: Tensor | None,
    label_smoothing: float | Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What multiplies each -log p (N, V); each row's class weight (N,), 0 if it does not count."""
    vocab = max(1, z.shape[1])  # nothing is spread over no classes
    w = z.new_ones(z.shape[1]) if weight is None else weight
    if target.dim() == 2:
        smoothed = target.to(z.dtype) * (1 - label_smoothing) + label_smoothing / vocab
        # Without classes there are no rows to torch, which divides numbers by classes.
        row_weight = z.new_full((len(z),), torch.nan if _has_no_classes(z) else 1.0)
        return w * smoothed, row_weight if counts is None else torch.where(counts, row_weight, 0)
    assert counts is not None
    if _has_no_classes(z):  # no index is one of them: no row counts
        return z, z.new_zeros(len(z))
    index = torch.where(counts, target, 0)
    row_weight = torch.where(counts, w[index], 0)
    spread = (label_smoothing / vocab * w).expand_as(z)
    mass = torch.scatter_add(
        spread, 1, index[:, None], ((1 - label_smoothing) * w[index])[:, None].to(z.dtype)
    )
    return mass, row_weight


def row_weights(
    target: Tensor, counted: Tensor | None, weight: Tensor | None, real: torch.dtype
) -> Tensor:
    """(N,): the class weight of each target, 1 of probabilities, 0 where it does not count."""
    if counted is None:
        return target.new_ones(len(target), dtype=real)
    if weight is None or target.dim() == 2:
        return counted.to(real)
    return torch.where(counted, weight.to(real)[torch.where(counted, target, 0).long()], 0)


def total_weight(
    target: Tensor, counted: Tensor | None, weight: Tensor | None, real: torch.dtype,
    token_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Their sum (), times token_weight, which a mean is over; without weights exactly."""
    by_row = row_weights(target, counted, weight, real)
    if token_weight is not None:
        shares = token_weight * by_row
        shares = shares if counted is None else torch.where(counted, shares, 0)
        return shares.sum(dtype=torch.float64).to(real)  # weights of both signs cancel
    if weight is None and counted is not None:
        return counted.sum().to(real)
    return by_row.sum()


def nll(
    logits: Tensor, target: Tensor, weight: Tensor | None, token_weight: Tensor | None,
    num_items: Tensor | None, options: Options, stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As the op neglog::nll: loss, lse, total_weight, correct, entropy, argmax."""
    reduction, ignore_index, label_smoothing, logit_scale, softcap, z_loss = options
    logits, target = as_rows(logits), target if target.dim() == 1 else as_rows(target)
    detached = scores(logits.detach(), logit_scale, softcap)
    counts = counted_rows(target, token_weight, ignore_index)
    if target.dim() == 2 and counts is not None:  # what does not count may be NaN
        target = torch.where(counts[:, None], target, 0)
    mass, row_weight = _mass(detached, target, weight, counts, label_smoothing)
    if counts is None:
        counts = detached.new_ones(len(detached), dtype=torch.bool)
    # Ignored rows that are no numbers leave first: a NaN there would come back as 0 * NaN.
    lse = log_sum_exp(detached)
    kept = counts | lse.isfinite()
    z = scores(torch.where(kept[:, None], logits, 0), logit_scale, softcap)
    lse = torch.where(kept, log_sum_exp(z), lse)
    log_p = torch.log_softmax(z, 1)
    if target.dim() == 1 and _is(label_smoothing, 0) and not _has_no_classes(z):
        index = torch.where(counts, target, 0)
        loss = -row_weight * log_p.gather(1, index[:, None])[:, 0]
    else:
        loss = -(mass * log_p).sum(1)
    if not _is(z_loss, 0):
        loss = loss + row_weight * z_loss * lse**2
    if token_weight is not None:
        loss, row_weight = token_weight * loss, torch.where(counts, token_weight * row_weight, 0)
    loss = torch.where(counts, loss, 0)
    total_weight = row_weight.sum() if num_items is None else num_items
    if reduction == MEAN:
        loss = loss.sum() / total_weight
    elif reduction == SUM:
        loss = loss.sum()
    nothing = counts.new_empty(0), z.new_empty(0), target.new_empty(0, dtype=torch.int64)
    stats_of_rows = _statistics(log_p, detached, target, counts, kept) if stats else nothing
    return loss, lse, total_weight, *stats_of_rows


def _statistics(
    log_p: Tensor, detached: Tensor, target: Tensor, counted: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """correct, entropy, argmax. detached: the scores of all rows, log_p of the kept alone."""
    entropy = _entropy(log_p)
    if _has_no_classes(log_p):
        return torch.zeros_like(counted), entropy, torch.zeros_like(counted, dtype=torch.int64)
    entropy = torch.where(kept, entropy, torch.nan)  # the others' log-sum-exp is no number
    argmax = detached.argmax(1)
    if target.dim() == 2:
        return torch.zeros_like(counted), entropy, argmax
    return counted & (argmax == target) & ~detached.isnan().any(1), entropy, argmax


def _entropy(log_p: Tensor) -> Tensor:
    """Of each row. Where p is 0, neither it nor its derivative is 0 * -inf."""
    zero = log_p.detach().exp() == 0
    log_p = torch.where(zero, 0, log_p)
    return -torch.where(zero, 0, log_p.exp() * log_p).sum(1)


def upstream_of(kept: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Of the gradients by these names, those that there are."""
    given = {name: kept[name] for name in ("grad_loss", "grad_lse", "grad_entropy")}
    return {name: grad for name, grad in given.items() if grad is not None}


def differentiable(
    upstream: dict[str, Tensor], logits: Tensor, target: Tensor, weight: Tensor | None,
    token_weight: Tensor | None, num_items: Tensor | None, options: Options,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The results of nll that have an upstream: of its loss, lse and entropy."""
    stats = "grad_entropy" in upstream
    given = (logits, target, weight, token_weight, num_items, options, stats)
    loss, lse, _, _, entropy, _ = nll(*given)
    results = {"grad_loss": loss, "grad_lse": lse, "grad_entropy": entropy}
    return tuple(results[name] for name in upstream)


def target_gradient(
    grad_loss: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None,
    token_weight: Tensor | None, total_weight: Tensor, options: Options,
) -> Tensor:  # fmt: skip
    """The gradient of probability targets: -w (1 - label_smoothing) log p, times the upstream."""
    rows = as_rows(logits)
    log_p = torch.log_softmax(scores(rows, options.logit_scale, options.softcap), 1)
    if weight is not None:
        log_p = log_p * weight
    upstream = grad_loss / total_weight if options.reduction == MEAN else grad_loss
    upstream = upstream.expand(len(rows))
    if token_weight is not None:
        log_p = torch.where((token_weight != 0)[:, None], log_p, 0)
        upstream = upstream * token_weight
    gradient = (upstream[:, None] * (options.label_smoothing - 1) * log_p).to(target.dtype)
    if target.dim() == 2:
        return gradient
    return gradient.unflatten(0, (logits.shape[0], logits.shape[2])).transpose(1, 2)
