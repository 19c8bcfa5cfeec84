"""Whether a contender's loss and gradients are those of the float64 oracle."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from neglog import dispatch

from .contender import Contender, Problem, Truth

# Relative error allowed against float64, and the absolute error below which it does not count (half
# the spacing of float16's smallest numbers). Torch rounds log-probabilities of about -10 to the
# logits' dtype before it takes their exponential, which sets the 16-bit tolerances.
TOLERANCE = {"float64": 1e-9, "float32": 2e-4, "float16": 2e-2, "bfloat16": 1e-1}
NEGLIGIBLE = {"float64": 1e-14, "float32": 1e-10, "float16": 1e-7, "bfloat16": 1e-7}


class Checked(NamedTuple):
    """The backends that ran, the loss, its largest relative error (of the gradients too), and what
    is wrong with it."""

    backends: list[str]
    loss: float
    error: float | None
    mismatch: str | None


def step(
    contender: Contender, leaves: tuple[Tensor, ...], fixed: tuple[Any, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and gradients, of the first upstream. Each call writes its gradients to memory of its
    own, as training does after zero_grad(set_to_none=True)."""
    loss = contender.loss(*leaves, *fixed)
    upstream = loss.new_tensor(contender.upstreams[0]) if contender.upstreams else None
    return loss.detach(), torch.autograd.grad(loss, leaves[: contender.leaves], upstream)


def check(contender: Contender, problem: Problem, leaves: tuple[Tensor, ...]) -> Checked:
    """Runs the contender once, over `leaves`."""
    with dispatch.record() as notes:
        loss, grads = step(contender, leaves, problem.check_fixed)
    backends = sorted({note.partition(":")[2] for note in notes})
    error = mismatch = None
    if contender.backend and backends != [contender.backend]:
        by = ", ".join(backends) or "none"
        mismatch = f"{contender.label.strip()}: expected {contender.backend}, ran by {by}"
    elif problem.truth is not None:
        error, mismatch = _compare(contender, problem, problem.truth, loss, grads)
    return Checked(backends, loss.item(), error, mismatch)


def _compare(
    contender: Contender, problem: Problem, truth: Truth, loss: Tensor, grads: tuple[Tensor, ...]
) -> tuple[float, str | None]:
    dtype, shape = problem.spec.dtype, problem.spec.shape
    errors = [_error(np.float64(loss.item()), np.float64(truth.loss), NEGLIGIBLE[dtype])]
    if contender.check == "oracle":
        upstream = contender.upstreams[0] if contender.upstreams else 1.0
        for got, want_of_one in zip(problem.compared(grads), truth.grads, strict=True):
            want, by_number = want_of_one * upstream, not problem.by_norm
            errors.append(
                _error(got, want, NEGLIGIBLE[dtype]) if by_number else _norm_error(got, want)
            )
    worst = float(np.max(errors))  # NaN if one of them is
    if worst <= TOLERANCE[dtype]:
        return worst, None
    where = "gradient" if errors[0] <= TOLERANCE[dtype] else "loss"
    return worst, (
        f"{contender.label.strip()}: the {where} is off the float64 oracle by {worst:.1e}, allowed "
        f"{TOLERANCE[dtype]:.0e}, at {shape} {dtype}"
    )


def _error(got: Any, want: Any, negligible: float) -> float:
    if not np.size(want):
        return 0.0
    excess = np.maximum(np.abs(got - want) - negligible, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.max(np.where(excess == 0, 0.0, excess / np.abs(want))))


def _norm_error(got: Any, want: Any) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
