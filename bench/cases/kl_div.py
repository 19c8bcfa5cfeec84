"""kl_div_loss from a teacher's logits: torch as trainers write it, and neglog."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

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
from .cross_entropy import IGNORED, logits_and_target

MODEL = "the logits of both are read and a gradient written: 3 passes"
PASSES = 3


def problem(shape: Shape, dtype: str, seed: int, device: str = "cpu") -> Problem:
    """Random logits of student and teacher; a slice of rows is checked."""
    logits, target = logits_and_target(shape, dtype, seed, device)
    teacher, _ = logits_and_target(shape, dtype, seed + 1, device)
    rows = checked_rows(len(target), device)
    made = reference.kl(float64_array(logits[rows]), float64_array(teacher[rows]))
    buffer = torch.empty_like(logits)

    def compared(grads: Grads) -> tuple:
        return (float64_array(grads[0][rows]),)

    return Problem(
        Spec("kl_div", shape, dtype, 2 * logits.nbytes, "copy of the logits", 2, logits.nbytes,
             "GB/s", MODEL),
        leaves=(logits.requires_grad_(),), fixed=(teacher, target),
        check_fixed=(teacher, only_these(target, rows)),
        truth=Truth(float(made.loss), (made.grad,)), compared=compared,
        yardstick=lambda: buffer.copy_(logits.detach()),
    )  # fmt: skip


def only_these(target: Tensor, rows: Tensor) -> Tensor:
    """The target with all rows ignored but some."""
    kept = torch.full_like(target, IGNORED)
    kept[rows] = target[rows]
    return kept


def mean_of_counted(by_row: Tensor, target: Tensor) -> Tensor:
    counted = target != IGNORED
    return torch.where(counted, by_row, 0).sum() / counted.sum()


def plain(logits: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    log_p, log_q = (x.float().log_softmax(-1) for x in (logits, teacher))
    by_row = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    return mean_of_counted(by_row, target)


def contenders(problem: Problem) -> list[Contender]:
    return [
        torch_eager(plain, PASSES), torch_compiled(plain, PASSES),
        neglog_default(neglog.kl_div_loss, PASSES, remembers=True),
    ]  # fmt: skip
