"""cross_entropy of index targets: torch eager, torch.compile, and neglog in several ways."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import neglog
from neglog import dispatch, reference

from ..contender import (
    ALL_SUITES,
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
# No power of two among them, which change no digits of a gradient.
CHANGING = tuple(1 / divisor for divisor in (3, 5, 7, 9, 11))
# Of so few classes one is often sure, and then torch's p - 1 has no digits in 16 bits: such
# gradients are compared by their norm.
FEW_CLASSES = 150
TWO_PASSES, ONE_PASS = 3, 2  # reads and writes of the logits' bytes
MODEL = (
    "neglog reads the logits and writes the gradient: 2 passes. The others, and neglog with an "
    "upstream that changes, read them in the forward and in the backward: 3."
)


def problem(shape: Shape, dtype: str, seed: int, device: str = "cpu") -> Problem:
    """Random logits and targets; a slice of rows, a quarter of them ignored, is checked."""
    logits, target = logits_and_target(shape, dtype, seed, device)
    rows = checked_rows(target.numel(), device)
    check_target = torch.full_like(target, IGNORED)
    check_target.view(-1)[rows] = target.view(-1)[rows]
    check_target.view(-1)[rows[3::4]] = IGNORED
    return problem_of(
        Spec("cross_entropy", shape, dtype, logits.nbytes, "copy of the logits", 2,
             logits.nbytes, "GB/s", MODEL),
        logits, fixed=(target,), check_fixed=(check_target,), check_target=check_target,
    )  # fmt: skip


def logits_and_target(shape: Shape, dtype: str, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Logits (rows, classes, ...) of standard deviation 2, and targets (rows, ...)."""
    rows, classes, *others = shape.values()
    generator = torch.Generator(device).manual_seed(seed)
    # Formed in float32, then rounded: torch.randn has no generator path for every 16-bit dtype.
    logits = torch.randn(rows, classes, *others, generator=generator, device=device).mul_(2)
    target = torch.randint(classes, (rows, *others), generator=generator, device=device)
    return logits.to(getattr(torch, dtype)), target


def problem_of(
    spec: Spec, logits: Tensor, fixed: tuple, check_fixed: tuple, check_target: Tensor
) -> Problem:
    """The truth is that of `check_target`, at the rows that are checked."""
    rows = checked_rows(check_target.numel(), str(logits.device))
    oracle = reference.nll(_rows_of(logits, rows), check_target.view(-1)[rows].cpu().numpy())
    buffer = torch.empty_like(logits)

    def compared(grads: Grads) -> tuple:
        return (_rows_of(grads[0], rows),)

    return Problem(
        spec, leaves=(logits.requires_grad_(),), fixed=fixed, check_fixed=check_fixed,
        truth=Truth(float(oracle.loss), (oracle.grad,)), compared=compared,
        yardstick=lambda: buffer.copy_(logits.detach()),
        by_norm=logits.itemsize == 2 and logits.shape[1] <= FEW_CLASSES,
    )  # fmt: skip


def _rows_of(x: Tensor, rows: Tensor) -> np.ndarray:
    """Some positions of x (N, classes, ...), each with all its classes."""
    return float64_array(x.detach().movedim(1, -1).flatten(0, -2)[rows])


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
        torch_eager(F.cross_entropy, TWO_PASSES),
        torch_compiled(F.cross_entropy, TWO_PASSES),
        neglog_default(own, ONE_PASS, remembers=True),
        Contender("third", "  an upstream of a third", own, ONE_PASS, "neglog",
                  upstreams=(1 / 3,), remembers=True, suites=ALL_SUITES),
        Contender("changing", "  an upstream that changes", own, TWO_PASSES, "neglog",
                  upstreams=CHANGING, remembers=True, suites=ALL_SUITES),
    ]  # fmt: skip
    if kernel is None:
        return found
    if kernel != "cuda":
        new = "  in new memory"
        found.append(Contender("new_memory", new, own, ONE_PASS, "neglog", drops_memory=True,
                               remembers=True))  # fmt: skip
    found.append(Contender("inplace", "  in place", _in_place, ONE_PASS, "neglog", overwrites=True))
    numba = next(state for state in dispatch.describe() if state.name == "numba")
    if numba.usable and kernel == "cython":
        found.append(Contender("numba", "  by numba", _numba, ONE_PASS, "neglog",
                               backend="numba", remembers=True))  # fmt: skip
    return found
