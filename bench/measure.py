"""The measuring loop: check all contenders, then time them in turn, A B C A B C ...

A busy moment of the machine then falls on all alike. The clock says what seconds and bytes are.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neglog.kernels import memory

from . import Mismatch
from .budget import Budget, time_limit
from .check import Checked, check, step
from .clocks import Clock
from .contender import Contender, Problem, Spec

# A round of brief calls: long enough for the clock, short enough that a busy moment of the machine
# spoils one round only.
BRIEF_ROUND = 2e-3
WARM_UP_CALLS = 20
SPARE_SECONDS = 10.0  # what began in time may take longer


class Plan(NamedTuple):
    """How much is measured, and what happens to a contender that fails.

    brief: a round is as many calls as fill BRIEF_ROUND, not one.
    strict: what a contender raises ends the run, unless it is optional. Otherwise it is left out.
    budget: of the run. limit: seconds that a contender may take for its check or for one round.
    once: the first call alone is timed, unchecked.
    """

    rounds: int = 9
    brief: bool = False
    strict: bool = True
    budget: Budget = Budget()
    limit: float = math.inf
    once: bool = False


class Result(NamedTuple):
    """Seconds a call of each round: of the loss without its gradient, and of both. extra: bytes."""

    contender: Contender
    forward: list[float]
    total: list[float]
    extra: int | None
    checked: Checked | None
    gradient_bytes: int

    def over(self, other: Result) -> float:
        """How many times this one's time the other takes: median of the rounds' own ratios."""
        return median(b / a for a, b in zip(self.total, other.total, strict=True))


class Measurement(NamedTuple):
    """All contenders at one shape. left_out: by name, why the others were not measured."""

    spec: Spec
    results: list[Result]
    yardstick: list[float]
    left_out: dict[str, str]
    calls: int = 1


Say = Callable[[str], Any]


def measure(
    problem: Problem,
    contenders: list[Contender],
    clock: Clock,
    plan: Plan | None = None,
    say: Say = lambda _: None,
) -> Measurement:
    """Check all; then a round to warm up, the timed rounds, and a call for memory, untimed."""
    guard = _Guard(plan or Plan(), clock)
    runs = [_Run(contender, problem, clock) for contender in contenders]
    if guard.plan.once:
        return _first_call_alone(problem, runs[0], guard)
    alive = []
    for run in runs:
        say(f"checking {run.contender.label.strip()}")
        if guard.passes(run, partial(run.check, guard.plan.strict)):
            alive.append(run)
    yardstick: list[float] = []
    with _no_collection():
        say("warming up")
        alive, calls = _warm_up(alive, guard)
        rounds = clock.rounds(guard.plan.rounds, calls * sum(run.total[-1] for run in alive))
        for run in alive:
            run.forget_times()
        clock.seconds(problem.yardstick)
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            alive = _one_round(alive, guard, calls)
            yardstick.append(clock.seconds(problem.yardstick))
    say("measuring memory")
    alive = [run for run in alive if guard.passes(run, run.measure_memory)]
    return Measurement(
        problem.spec, [run.result() for run in alive], yardstick, guard.left_out, calls
    )


class _Run:
    """One contender on its way through the check, the rounds and the call for memory."""

    def __init__(self, contender: Contender, problem: Problem, clock: Clock) -> None:
        self.contender, self.problem, self.clock = contender, problem, clock
        self.forward: list[float] = []
        self.total: list[float] = []
        self.extra: int | None = None
        self.checked: Checked | None = None
        dtype = getattr(torch, problem.spec.dtype)  # torch's losses have that of their inputs
        upstreams = (torch.tensor(x, dtype=dtype, device=clock.device) for x in contender.upstreams)
        self._upstreams = cycle(tuple(upstreams) or (None,))

    def leaves(self) -> tuple[Tensor, ...]:
        """The problem's, or copies that may be overwritten."""
        if self.contender.overwrites:
            return tuple(leaf.clone() for leaf in self.problem.leaves)
        return self.problem.leaves

    def check(self, strict: bool) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's remarks would break the live line
            self.checked = check(self.contender, self.problem, self.leaves())
        if strict and self.checked.mismatch:
            raise Mismatch(self.checked.mismatch)

    def time(self, calls: int) -> None:
        """One round: so many losses alone, then as many with their gradients."""
        times = []
        for make in (self._losses, self._gradients):
            if self.contender.remembers:
                self._gradients(2)()
            if self.contender.drops_memory:
                memory.give_back()
            times.append(self.clock.seconds(make(calls)) / calls)
        self.forward.append(times[0])
        self.total.append(times[1])

    def _losses(self, calls: int) -> Callable[[], object]:
        loss, arguments = self.contender.loss, (*self.leaves(), *self.problem.fixed)

        def run() -> object:
            with torch.no_grad():
                for _ in range(calls - 1):
                    loss(*arguments)
                return loss(*arguments)

        return run

    def _gradients(self, calls: int) -> Callable[[], object]:
        loss, grad, leaves = self.contender.loss, torch.autograd.grad, self.leaves()
        arguments, wanted = (*leaves, *self.problem.fixed), leaves[: self.contender.leaves]
        upstreams = self._upstreams

        def run() -> object:
            for _ in range(calls - 1):
                grad(loss(*arguments), wanted, next(upstreams))
            return grad(loss(*arguments), wanted, next(upstreams))

        return run

    def forget_times(self) -> None:
        self.forward, self.total = [], []

    def measure_memory(self) -> None:
        leaves = self.leaves()
        self.extra = self.clock.peak(lambda: step(self.contender, leaves, self.problem.fixed))

    def result(self) -> Result:
        gradients = sum(leaf.nbytes for leaf in self.problem.leaves[: self.contender.leaves])
        return Result(self.contender, self.forward, self.total, self.extra, self.checked, gradients)


class _Guard:
    """Keeps what one contender raises from the others, and the run within its seconds."""

    def __init__(self, plan: Plan, clock: Clock) -> None:
        self.plan, self.clock = plan, clock
        self.left_out: dict[str, str] = {}

    def passes(self, run: _Run, action: Callable[[], object]) -> bool:
        """Whether the action ends well; if not, the contender is left out."""
        left = self.plan.budget.left()
        if left <= 0:
            self.left_out[run.contender.name] = "skipped: no time left"
            return False
        try:
            with time_limit(min(left + SPARE_SECONDS, self.plan.limit)):
                action()
            return True
        except Exception as error:
            optional = run.contender.optional and not isinstance(error, Mismatch)
            if self.plan.strict and not optional:
                raise
            self.left_out[run.contender.name] = failure(error)
        self.clock.clear()  # not within the except, whose traceback keeps the tensors
        return False


def failure(error: Exception) -> str:
    """What a contender raised, in a line."""
    text = str(error).strip().partition("\n")[0]
    return f"failed: {type(error).__name__}: {text}"[:500]


def _one_round(runs: list[_Run], guard: _Guard, calls: int) -> list[_Run]:
    return [run for run in runs if guard.passes(run, partial(run.time, calls))]


def _warm_up(runs: list[_Run], guard: _Guard) -> tuple[list[_Run], int]:
    """Those that got through a round, and how many calls a timed round has."""
    runs = _one_round(runs, guard, WARM_UP_CALLS if guard.plan.brief else 1)
    if not guard.plan.brief or not runs:
        return runs, 1
    runs = _one_round(runs, guard, WARM_UP_CALLS)
    return runs, max(5, round(BRIEF_ROUND / runs[0].total[-1]))


def _first_call_alone(problem: Problem, run: _Run, guard: _Guard) -> Measurement:
    def first_call() -> None:
        call = run._gradients(1)
        run.extra = run.clock.peak(lambda: run.total.append(run.clock.seconds(call)))

    done = guard.passes(run, first_call)
    return Measurement(problem.spec, [run.result()] if done else [], [], guard.left_out)


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
