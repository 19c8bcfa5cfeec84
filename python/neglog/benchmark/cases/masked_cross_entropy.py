"""masked_cross_entropy at 15%, as masked language models train: torch's two ways, and neglog."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import neglog
from neglog import reference
from neglog.benchmark.cases import Contender, Problem, Shape, Spec, Truth
from neglog.benchmark.cases.cross_entropy import CHECKED_ROWS, IGNORED, default_backend

MASKED = 0.15
WORK = 2 * MASKED + 1
MODEL = (
    "forward reads the counted rows, backward reads them again and writes the whole gradient: "
    f"{WORK:.2f} passes; in place {1 + MASKED:.2f}."
)


def problem(shape: Shape, dtype: str, seed: int) -> Problem:
    """Random logits, targets and mask; a slice of the rows is verified."""
    rows, vocab = shape["rows"], shape["vocab"]
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator).mul_(2).to(getattr(torch, dtype))
    target = torch.randint(vocab, (rows,), generator=generator)
    mask = torch.rand(rows, generator=generator) < MASKED
    mask[0] = True
    picked = torch.linspace(0, rows - 1, min(rows, CHECKED_ROWS)).round().long()
    check_mask = torch.zeros_like(mask)
    check_mask[picked[::2]] = True
    oracle = reference.nll(
        logits[picked].double().numpy(),
        torch.where(check_mask, target, IGNORED)[picked].numpy(),
    )
    buffer = torch.empty_like(logits)

    def compared(grads: tuple[Tensor, ...]) -> tuple[np.ndarray, ...]:
        return (grads[0][picked].double().numpy(),)

    return Problem(
        spec=Spec(
            shape, dtype, logits.nbytes, "copy of the logits", 2, logits.nbytes, "GB/s", MODEL
        ),
        leaves=(logits.requires_grad_(),),
        fixed=(target, mask),
        check_fixed=(target, check_mask),
        truth=Truth(float(oracle.loss), (oracle.grad,)),
        compared=compared,
        yardstick=lambda: buffer.copy_(logits.detach()),
    )


def _ignoring(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.where(mask, target, IGNORED))


def _gathering(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(logits[mask], target[mask])


def _in_place(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    return neglog.masked_cross_entropy(logits, target, mask, inplace_backward=True)


def contenders(compiled: bool, shape: Shape, dtype: str) -> list[Contender]:
    """Ignored targets, as transformers has it, first; then the rows taken out by hand."""
    runs = default_backend(shape)
    found = [Contender("eager", "torch eager", _ignoring, WORK)]
    if compiled:
        compiled_loss = torch.compile(_ignoring, fullgraph=True, dynamic=False)
        found.append(Contender("compile", "torch.compile", compiled_loss, WORK))
    found.append(Contender("gathered", "torch, rows gathered", _gathering, WORK))
    own = neglog.masked_cross_entropy
    found.append(Contender("neglog", f"neglog ({runs})", own, WORK, backend=runs))
    if runs != "torch":
        found += [
            Contender("new_memory", "  in new memory", own, WORK, new_memory=True, backend=runs),
            Contender("inplace", "  in place", _in_place, 1 + MASKED, in_place=True, backend=runs),
        ]
    return found


def small_contenders() -> list[Contender]:
    """torch's ignored targets and neglog's mask."""
    return [
        Contender("eager", "torch eager", _ignoring, WORK),
        Contender("neglog", "neglog", neglog.masked_cross_entropy, WORK),
    ]
