"""masked_cross_entropy at 15%, as masked language models train: torch in two ways, and neglog."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import neglog

from ..contender import (
    Contender,
    Problem,
    Spec,
    checked_rows,
    neglog_default,
    torch_compiled,
    torch_eager,
)
from . import Shape
from .cross_entropy import IGNORED, kernel_of, logits_and_target, problem_of

MASKED = 0.15
WORK = 2 * MASKED + 1
MODEL = (
    "forward reads the counted rows, backward reads them again and writes the whole gradient: "
    f"{WORK:.2f} passes; in place {1 + MASKED:.2f}."
)


def problem(shape: Shape, dtype: str, seed: int, device: str = "cpu") -> Problem:
    """Random logits, targets and mask; a slice of the rows is checked."""
    logits, target = logits_and_target(shape, dtype, seed, device)
    generator = torch.Generator(device).manual_seed(seed + 1)
    mask = torch.rand(len(logits), generator=generator, device=device) < MASKED
    mask[0] = True
    check_mask = torch.zeros_like(mask)
    check_mask[checked_rows(len(logits), device)[::2]] = True
    return problem_of(
        Spec("masked_cross_entropy", shape, dtype, logits.nbytes, "copy of the logits", 2,
             logits.nbytes, "GB/s", MODEL, f"{MASKED:.0%} counted"),
        logits, fixed=(target, mask), check_fixed=(target, check_mask),
        check_target=torch.where(check_mask, target, IGNORED),
    )  # fmt: skip


def _ignoring(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.where(mask, target, IGNORED))


def _gathering(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(logits[mask], target[mask])


def _in_place(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    return neglog.masked_cross_entropy(logits, target, mask, inplace_backward=True)


def contenders(problem: Problem) -> list[Contender]:
    """Ignored targets, as transformers has it, first; then the rows gathered by hand."""
    own = neglog.masked_cross_entropy
    found = [
        torch_eager(_ignoring, WORK),
        torch_compiled(_ignoring, WORK),
        Contender("gathered", "torch, rows gathered", _gathering, WORK),
        neglog_default(own, WORK),
    ]
    if kernel_of(problem) is not None:
        found += [
            Contender("new_memory", "  in new memory", own, WORK, "neglog", drops_memory=True),
            Contender("inplace", "  in place", _in_place, 1 + MASKED, "neglog", overwrites=True),
        ]
    return found
