"""What is measured: a problem, and the contenders that solve it."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .cases import BRIEF, LONG, Shape

Grads = tuple[Tensor, ...]
# Enough rows to meet every thread, few enough for float64 at any vocabulary.
CHECKED_ROWS = 64
ALL_SUITES = LONG + BRIEF


class Contender(NamedTuple):
    """One implementation of a loss: `loss(*leaves, *fixed)` gives a scalar tensor with a graph.

    work: what a forward and backward must move or compute at least, in units of Spec.unit_work.
    library: whose code it is: "torch", "torch.compile", "neglog" or the name of another package.
    check: what must agree with the float64 oracle. "oracle": the loss and its gradients. "loss":
        the loss alone, since the gradients are approximate by design.
    overwrites: the call writes over its leaves, so each call gets copies, made while no clock runs.
    drops_memory: the memory that neglog keeps for its next gradient is given back before each call.
    backend: the neglog backend that must run the call; None accepts any.
    leaves: how many of the problem's leaves get a gradient; None is all of them.
    baseline: the others are compared with it.
    upstreams: what flows into each backward, in turn; none: 1, as of loss.backward().
    remembers: the gradient is formed for the upstream of the backward before: so that this is not
        another contender's, two calls go before the measured ones while no clock runs.
    suites: of shapes, those it takes part in.
    """

    name: str
    label: str
    loss: Callable[..., Tensor]
    work: float
    library: str = "torch"
    check: Literal["oracle", "loss"] = "oracle"
    overwrites: bool = False
    drops_memory: bool = False
    backend: str | None = None
    leaves: int | None = None
    baseline: bool = False
    upstreams: tuple[float, ...] = ()
    remembers: bool = False
    suites: tuple[str, ...] = LONG

    @property
    def optional(self) -> bool:
        """Whether it may be missing: torch.compile needs a compiler, which may not be there."""
        return self.library not in ("torch", "neglog")


class Truth(NamedTuple):
    """The loss, and the part of the gradients that is compared, in float64."""

    loss: float
    grads: tuple[np.ndarray, ...]


class Spec(NamedTuple):
    """What the report needs to know of a problem.

    nbytes: of the inputs. yardstick: the least that any implementation must do, timed beside them.
    yardstick_work: the yardstick's work, in units of unit_work. unit_work: the bytes or operations
    of one unit of work. unit: what 1e9 of them a second are called. model: how `work` is counted,
    in words. note: what the shape does not say. of_rounds: the time of the yardstick, from those of
    all rounds.
    """

    op: str
    shape: Shape
    dtype: str
    nbytes: int
    yardstick: str
    yardstick_work: float
    unit_work: float
    unit: str
    model: str
    note: str = ""
    of_rounds: Callable[[list[float]], float] = median


class Problem(NamedTuple):
    """One loss at one shape.

    leaves: require gradients. fixed: the other arguments. check_fixed: those of the check, where
    all but a slice of the rows is ignored: the full shape runs, and the oracle stays small.
    truth: None where nothing is checked. compared: the part of the gradients that `truth` holds.
    by_norm: the gradients are sums whose terms cancel, so that an error is small beside their norm
    and not beside each number.
    """

    spec: Spec
    leaves: tuple[Tensor, ...]
    fixed: tuple[Any, ...]
    check_fixed: tuple[Any, ...]
    truth: Truth | None
    compared: Callable[[Grads], tuple[np.ndarray, ...]]
    yardstick: Callable[[], Any]
    by_norm: bool = False


def torch_eager(loss: Callable[..., Tensor], work: float, label: str = "torch eager") -> Contender:
    """The contender that the others are compared with."""
    return Contender("eager", label, loss, work, baseline=True, suites=ALL_SUITES)


def torch_compiled(
    loss: Callable[..., Tensor], work: float, label: str = "torch.compile"
) -> Contender:
    """The same formula, compiled for one shape."""
    made = torch.compile(loss, fullgraph=True, dynamic=False)
    suites = (*LONG, "classes")
    return Contender("compile", label, made, work, "torch.compile", baseline=True, suites=suites)


def neglog_default(loss: Callable[..., Tensor], work: float, remembers: bool = False) -> Contender:
    """neglog's function as a user calls it."""
    return Contender("neglog", "neglog", loss, work, "neglog", remembers=remembers,
                     suites=ALL_SUITES)  # fmt: skip


def checked_rows(count: int, device: str = "cpu") -> Tensor:
    """The indices of the rows that the oracle sees, spread over all of them."""
    rows = torch.linspace(0, count - 1, min(count, CHECKED_ROWS), dtype=torch.float64)
    return rows.round().long().to(device)


def float64_array(tensor: Tensor) -> np.ndarray:
    """The numbers of a tensor, on the CPU."""
    return tensor.detach().double().cpu().numpy()
