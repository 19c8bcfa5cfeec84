"""token_logprobs with an entropy bonus, as trainers of policies use it: torch as they write it, and
neglog."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import neglog
from neglog import reference

from ..contender import (
    Contender,
    Grads,
    Problem,
    Spec,
    Truth,
    checked_rows,
    float64_array,
    neglog_default,
    torch_compiled,
    torch_eager,
)
from . import Shape
from .cross_entropy import IGNORED, TWO_PASSES, logits_and_target

ENTROPY_BONUS = 0.01
MODEL = (
    "the logits are read in the forward and in the backward, and their gradient written: 3 passes"
)


def policy_loss(logprob: Tensor, entropy: Tensor, target: Tensor) -> Tensor:
    """-mean(logprob + bonus * entropy) of the positions that count."""
    return -(logprob + ENTROPY_BONUS * entropy).sum() / (target != IGNORED).sum()


def truth_of(logits: Tensor, target: Tensor) -> tuple[float, np.ndarray]:
    """The same and its gradient by the oracle, of rows that all count."""
    share = 1 / len(target)
    made = reference.nll(
        float64_array(logits), target.cpu().numpy(), reduction="none", grad_loss=share,
        grad_entropy=-ENTROPY_BONUS * share,
    )  # fmt: skip
    return float((made.loss - ENTROPY_BONUS * made.entropy).mean()), made.grad


def problem(shape: Shape, dtype: str, seed: int, device: str = "cpu") -> Problem:
    """Random logits and targets; a slice of rows is checked."""
    logits, target = logits_and_target(shape, dtype, seed, device)
    rows = checked_rows(len(target), device)
    check_target = torch.full_like(target, IGNORED)
    check_target[rows] = target[rows]
    loss, grad = truth_of(logits[rows], target[rows])
    buffer = torch.empty_like(logits)

    def compared(grads: Grads) -> tuple:
        return (float64_array(grads[0][rows]),)

    return Problem(
        Spec("token_logprobs", shape, dtype, logits.nbytes, "copy of the logits", 2,
             logits.nbytes, "GB/s", MODEL),
        leaves=(logits.requires_grad_(),), fixed=(target,), check_fixed=(check_target,),
        truth=Truth(loss, (grad,)), compared=compared,
        yardstick=lambda: buffer.copy_(logits.detach()),
    )  # fmt: skip


def plain(logits: Tensor, target: Tensor) -> Tensor:
    counted = target != IGNORED
    log_p = logits.float().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    logprob = log_p.gather(-1, torch.where(counted, target, 0)[:, None]).squeeze(-1)
    return policy_loss(torch.where(counted, logprob, 0), torch.where(counted, entropy, 0), target)


def _own(logits: Tensor, target: Tensor) -> Tensor:
    found = neglog.token_logprobs(logits, target)
    return policy_loss(found.logprob, found.entropy, target)


def compared_contenders(
    formula: Callable[..., Any], own: Callable[..., Any], work: float
) -> list[Contender]:
    return [torch_eager(formula, work), torch_compiled(formula, work), neglog_default(own, work)]


def contenders(problem: Problem) -> list[Contender]:
    return compared_contenders(plain, _own, TWO_PASSES)
