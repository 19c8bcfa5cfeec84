"""cross_entropy of index targets: torch eager, torch.compile, and neglog in several ways."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import neglog
from neglog import dispatch, reference

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

IGNORED = -100
OUT_OF_PLACE, IN_PLACE = 3, 2
MODEL = (
    "forward reads the logits, backward reads them and writes the gradient: 3 passes; "
    "in place 1 read, 1 write."
)


def problem(shape: Shape, dtype: str, seed: int, device: str = "cpu") -> Problem:
    """Random logits and targets; a slice of rows, a quarter of them ignored, is checked."""
    logits, target = logits_and_target(shape, dtype, seed, device)
    rows = checked_rows(len(logits), device)
    check_target = torch.full_like(target, IGNORED)
    check_target[rows] = target[rows]
    check_target[rows[3::4]] = IGNORED
    return problem_of(
        Spec("cross_entropy", shape, dtype, logits.nbytes, "copy of the logits", 2,
             logits.nbytes, "GB/s", MODEL),
        logits, fixed=(target,), check_fixed=(check_target,), check_target=check_target,
    )  # fmt: skip


def logits_and_target(shape: Shape, dtype: str, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Logits (rows, vocab) of standard deviation 2, and targets (rows)."""
    rows, vocab = shape["rows"], shape["vocab"]
    generator = torch.Generator(device).manual_seed(seed)
    # Formed in float32, then rounded: torch.randn has no generator path for every 16-bit dtype.
    logits = torch.randn(rows, vocab, generator=generator, device=device).mul_(2)
    target = torch.randint(vocab, (rows,), generator=generator, device=device)
    return logits.to(getattr(torch, dtype)), target


def problem_of(
    spec: Spec, logits: Tensor, fixed: tuple, check_fixed: tuple, check_target: Tensor
) -> Problem:
    """The truth is that of `check_target`, at the rows that are checked."""
    rows = checked_rows(len(logits), str(logits.device))
    oracle = reference.nll(float64_array(logits[rows]), check_target[rows].cpu().numpy())
    buffer = torch.empty_like(logits)

    def compared(grads: Grads) -> tuple:
        return (float64_array(grads[0][rows]),)

    return Problem(
        spec, leaves=(logits.requires_grad_(),), fixed=fixed, check_fixed=check_fixed,
        truth=Truth(float(oracle.loss), (oracle.grad,)), compared=compared,
        yardstick=lambda: buffer.copy_(logits.detach()),
    )  # fmt: skip


def kernel_of(problem: Problem) -> str | None:
    """The kernel backend for the problem's device; None where torch's functions take its place."""
    demanded = dispatch.demanded()
    if demanded == "torch":
        return None
    return demanded or dispatch.best(problem.leaves[0].device.type)


def _in_place(logits: Tensor, target: Tensor) -> Tensor:
    return neglog.cross_entropy(logits, target, inplace_backward=True)


def _numba(logits: Tensor, target: Tensor) -> Tensor:
    return neglog.cross_entropy(logits, target, backend="numba")


def contenders(problem: Problem) -> list[Contender]:
    """Everything that can run here, torch eager first."""
    own, kernel = neglog.cross_entropy, kernel_of(problem)
    found = [
        torch_eager(F.cross_entropy, OUT_OF_PLACE),
        torch_compiled(F.cross_entropy, OUT_OF_PLACE),
        neglog_default(own, OUT_OF_PLACE),
    ]
    if kernel is None:
        return found
    if kernel != "cuda":
        new = "  in new memory"
        found.append(Contender("new_memory", new, own, OUT_OF_PLACE, "neglog", drops_memory=True))
    found.append(Contender("inplace", "  in place", _in_place, IN_PLACE, "neglog", overwrites=True))
    numba = next(state for state in dispatch.describe() if state.name == "numba")
    if numba.usable and kernel == "cython":
        found.append(
            Contender("numba", "  by numba", _numba, OUT_OF_PLACE, "neglog", backend="numba")
        )
    return found
