"""kl_div_loss from the classes that a teacher names: torch as trainers write it, and neglog, beside
neglog's cross_entropy of the same logits."""

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
from .cross_entropy import ONE_PASS, TWO_PASSES, logits_and_target
from .kl_div import mean_of_counted, only_these

NAMED = 64
MODEL = (
    "neglog reads the logits and writes the gradient: 2 passes. The others read them in the "
    "forward and in the backward: 3."
)


def problem(shape: Shape, dtype: str, seed: int, device: str = "cpu") -> Problem:
    """Random logits, and the likeliest classes of others; a slice of rows is checked."""
    logits, target = logits_and_target(shape, dtype, seed, device)
    others, _ = logits_and_target(shape, dtype, seed + 1, device)
    # Less than all classes, and less than probability 1 in any dtype.
    found = others.float().log_softmax(-1).topk(min(NAMED, shape["vocab"] // 2), -1)
    teacher, ids = (found.values - 0.01).to(logits.dtype), found.indices
    rows = checked_rows(len(target), device)
    made = reference.kl(
        float64_array(logits[rows]), float64_array(teacher[rows]), ids=ids[rows].cpu().numpy()
    )

    def compared(grads: Grads) -> tuple:
        return (float64_array(grads[0][rows]),)

    leaf = logits.detach().clone().requires_grad_()

    def cross_entropy() -> Tensor:
        return torch.autograd.grad(neglog.cross_entropy(leaf, target), leaf)[0]

    return Problem(
        Spec("kl_div_top_k", shape, dtype, logits.nbytes, "neglog's cross_entropy of the logits",
             ONE_PASS, logits.nbytes, "GB/s", MODEL, f"{ids.shape[1]} classes"),
        leaves=(logits.requires_grad_(),), fixed=(teacher, ids, target),
        check_fixed=(teacher, ids, only_these(target, rows)),
        truth=Truth(float(made.loss), (made.grad,)), compared=compared, yardstick=cross_entropy,
    )  # fmt: skip


def plain(logits: Tensor, teacher: Tensor, ids: Tensor, target: Tensor) -> Tensor:
    log_p, teacher = logits.float().log_softmax(-1), teacher.float()
    others = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    student = torch.cat([log_p.gather(-1, ids), others], -1)
    rest = torch.log1p(-teacher.exp().sum(-1, keepdim=True))
    bins = torch.cat([teacher, rest], -1)
    by_row = F.kl_div(student, bins, reduction="none", log_target=True).sum(-1)
    return mean_of_counted(by_row, target)


def _own(logits: Tensor, teacher: Tensor, ids: Tensor, target: Tensor) -> Tensor:
    return neglog.kl_div_loss(logits, teacher, target, teacher_ids=ids)


def contenders(problem: Problem) -> list[Contender]:
    return [
        torch_eager(plain, TWO_PASSES), torch_compiled(plain, TWO_PASSES),
        neglog_default(_own, ONE_PASS, remembers=True),
    ]  # fmt: skip
