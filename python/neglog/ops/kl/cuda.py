"""kl on CUDA, by the op kl_rows of csrc/kl/kl.cu. The host never waits for the device: the divisor
stays there, and a target, or a teacher's class, out of range fails an assertion of the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neglog import availability
from neglog.ops.dtypes import real_dtype
from neglog.ops.kl import schema
from neglog.ops.kl.schema import Options
from neglog.ops.nll import formula as of_nll
from neglog.ops.nll.schema import MEAN, NONE

ops = torch.ops.neglog


def run_rows(
    a: Any, grad: Tensor | None = None, gradient: Tensor | None = None, rows: Any = None
) -> tuple[Tensor, ...]:
    """Losses (N,), divergences and cross-entropies; with `gradient`, it is written there. rows: of
    a call; the device names none in an error."""
    found: tuple[Tensor, ...] = ops.kl_rows(
        a.logits, a.teacher, a.ids, a.target, a.token_weight, grad, gradient, *Options.of(a)
    )
    return found


def total_weight_of(
    target: Tensor, token_weight: Tensor | None, ignore_index: int, vocab: int, dtype: torch.dtype,
    backend: str,
) -> Tensor:  # fmt: skip
    """The divisor of a mean ()."""
    counted = of_nll.counted_rows(target, token_weight, ignore_index)
    return of_nll.total_weight(target, counted, None, real_dtype(dtype), token_weight)


def _forward(a: Any) -> tuple[Tensor, ...]:
    availability.ran("kl", "cuda")
    loss, soft, hard = run_rows(a)
    given = (a.target, a.token_weight, a.ignore_index, a.logits.shape[1], a.logits.dtype, "")
    total = total_weight_of(*given) if a.num_items is None else a.num_items
    if a.reduction != NONE:
        summed = loss.sum(dtype=torch.float64)
        loss = (summed / total if a.reduction == MEAN else summed).to(loss.dtype)
    return loss, total.clone(), soft, hard


def _backward(a: Any) -> Tensor:
    availability.ran("kl_backward", "cuda")
    grad = a.grad_loss / a.total_weight if a.reduction == MEAN else a.grad_loss
    gradient = a.logits.new_empty(a.logits.shape)
    run_rows(a, grad, gradient)
    return gradient


schema.forward.implement("cuda", _forward)
schema.backward.implement("cuda", _backward)
