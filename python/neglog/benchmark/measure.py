"""Verify, then time in turn: A B C A B C ..., so that a busy moment falls on all alike."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from neglog import dispatch
from neglog.benchmark import Mismatch
from neglog.benchmark.cases import Contender, Problem, Spec
from neglog.benchmark.machine import PeakMemory
from neglog.kernels import memory

# Relative error allowed against float64, and the absolute one below which it does not count (half
# the spacing of float16's smallest numbers). Torch rounds log-probabilities of about -10 to the
# logits' dtype before it takes their exponential, which sets the 16-bit ones.
TOLERANCE = {"float64": 1e-9, "float32": 2e-4, "float16": 2e-2, "bfloat16": 1e-1}
FLOOR = {"float64": 1e-14, "float32": 1e-10, "float16": 1e-7, "bfloat16": 1e-7}


class Result(NamedTuple):
    """Seconds of each round: the forward alone, and forward and backward. extra: bytes."""

    contender: Contender
    forward: list[float]
    total: list[float]
    extra: int | None
    error: float

    def over(self, other: Result) -> float:
        """How many times this one's time the other takes: median of the rounds' own ratios."""
        return median(b / a for a, b in zip(self.total, other.total, strict=True))


class Measurement(NamedTuple):
    """All contenders at one shape; `left_out` says which could not run and why."""

    spec: Spec
    results: list[Result]
    yardstick: list[float]
    left_out: dict[str, str]


Say = Callable[[str], Any]


def _fresh(contender: Contender, problem: Problem) -> tuple[Tensor, ...]:
    """The leaves, or for a loss that overwrites them copies that are not leaves."""
    if contender.in_place:
        return tuple(leaf.clone() for leaf in problem.leaves)
    return problem.leaves


def step(contender: Contender, leaves: tuple, fixed: tuple) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and gradients; these in new memory each time, as after zero_grad(set_to_none=True)."""
    loss = contender.loss(*leaves, *fixed)
    return loss.detach(), torch.autograd.grad(loss, leaves)


def verify(contender: Contender, problem: Problem) -> float:
    """The largest relative error of loss and gradient. Raises Mismatch if it is too large."""
    with dispatch.record() as ran:
        loss, grads = step(contender, _fresh(contender, problem), problem.check_fixed)
    if contender.backend and {note.partition(":")[2] for note in ran} != {contender.backend}:
        raise Mismatch(
            f"{contender.label}: expected {contender.backend}, ran by {', '.join(ran) or 'none'}"
        )
    tolerance, floor = TOLERANCE[problem.spec.dtype], FLOOR[problem.spec.dtype]
    errors = [_error(np.float64(loss), np.float64(problem.truth.loss), floor)]
    for got, want in zip(problem.compared(grads), problem.truth.grads, strict=True):
        errors.append(_norm_error(got, want) if problem.by_norm else _error(got, want, floor))
    worst = max(errors)
    if not worst <= tolerance:  # NaN is no match either
        where = "loss" if errors[0] == worst else "gradient"
        raise Mismatch(
            f"{contender.label}: the {where} is off the float64 oracle by {worst:.1e}, allowed "
            f"{tolerance:.0e}, at {problem.spec.shape} {problem.spec.dtype}"
        )
    return worst


def _error(got: Any, want: Any, floor: float) -> float:
    if not np.size(want):
        return 0.0
    excess = np.maximum(np.abs(got - want) - floor, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.max(np.where(excess == 0, 0.0, excess / np.abs(want))))


def _norm_error(got: Any, want: Any) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def verified(
    contenders: list[Contender], problem: Problem, say: Say
) -> tuple[dict[str, float], dict[str, str]]:
    """Error of each contender that runs; why the others do not.

    Only torch.compile may be left out: it needs a C++ compiler, which not every machine has.
    """
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for contender in contenders:
        say(f"verifying {contender.label}")
        try:
            errors[contender.name] = verify(contender, problem)
        except Mismatch:
            raise
        except Exception as error:
            if contender.name != "compile":
                raise
            left_out[contender.label] = (str(error).strip() or repr(error)).splitlines()[0]
    return errors, left_out


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _timed(contender: Contender, problem: Problem) -> tuple[float, float]:
    if contender.new_memory:
        memory.give_back()
    leaves = _fresh(contender, problem)
    start = perf_counter()
    loss = contender.loss(*leaves, *problem.fixed)
    middle = perf_counter()
    grads = torch.autograd.grad(loss, leaves)
    end = perf_counter()
    del grads  # not before the clock is read: giving 262 MB back takes its time too
    return middle - start, end - start


def _timed_yardstick(problem: Problem) -> float:
    start = perf_counter()
    problem.yardstick()
    return perf_counter() - start


def _extra(contender: Contender, problem: Problem) -> int | None:
    leaves = _fresh(contender, problem)
    with PeakMemory() as peak:
        step(contender, leaves, problem.fixed)
    return peak.extra


def measure(
    problem: Problem, contenders: list[Contender], rounds: int, say: Say = lambda _: None
) -> Measurement:
    """Verify all, then one warm-up round, `rounds` timed ones, and one for memory, untimed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's remarks would break the live line
        errors, left_out = verified(contenders, problem, say)
    runs = [contender for contender in contenders if contender.name in errors]
    times: dict[str, list[tuple[float, float]]] = {contender.name: [] for contender in runs}
    yardstick = []
    with _no_collection():
        for number in range(rounds + 1):
            say(f"round {number} of {rounds}" if number else "warming up")
            for contender in runs:
                times[contender.name].append(_timed(contender, problem))
            yardstick.append(_timed_yardstick(problem))
    say("measuring memory")
    results = []
    for contender in runs:
        forward, total = (list(part) for part in zip(*times[contender.name][1:], strict=True))
        extra = _extra(contender, problem)
        results.append(Result(contender, forward, total, extra, errors[contender.name]))
    return Measurement(problem.spec, results, yardstick[1:], left_out)


class SmallResult(NamedTuple):
    """Seconds per call of each contender, by round; and the backends that ran the second."""

    shape: dict[str, int]
    calls: int
    seconds: dict[str, list[float]]
    ran: list[str]


# Long enough for the clock, short enough that a busy moment of the machine spoils one round only.
SMALL_ROUND = 2e-3


def _seconds_per_call(contender: Contender, problem: Problem, calls: int) -> float:
    loss, leaves, fixed, grad = (
        contender.loss, problem.leaves, problem.fixed, torch.autograd.grad
    )  # fmt: skip
    start = perf_counter()
    for _ in range(calls):
        grad(loss(*leaves, *fixed), leaves)
    return (perf_counter() - start) / calls


def measure_small(
    problem: Problem, contenders: list[Contender], rounds: int, say: Say = lambda _: None
) -> SmallResult:
    """Microseconds of one call, from rounds of as many calls as fill SMALL_ROUND."""
    verified(contenders, problem, say)
    with dispatch.record() as ran:
        step(contenders[-1], problem.leaves, problem.fixed)
    for contender in contenders:
        _seconds_per_call(contender, problem, 50)
    fastest = min(_seconds_per_call(contenders[0], problem, 10) for _ in range(10))
    calls = max(5, round(SMALL_ROUND / fastest))
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    with _no_collection():
        for _ in range(rounds):
            for contender in contenders:
                seconds[contender.name].append(_seconds_per_call(contender, problem, calls))
    backends = sorted({note.partition(":")[2] for note in ran})
    return SmallResult(problem.spec.shape, calls, seconds, backends)
