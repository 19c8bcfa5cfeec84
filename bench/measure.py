"""Times and memory of calls on a GPU, within a budget of seconds."""

import gc
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROUNDS = 15
ROUNDS_SECONDS = 3.0  # of a call so slow that ROUNDS of it would take longer: fewer, 3 at least
WAY_SECONDS = 75.0  # a compiler that takes longer than this is given up
LONGEST = 600.0
SPARE_SECONDS = 10.0  # what began in time may take longer
Row = dict[str, Any]


class Way(NamedTuple):
    """What is timed. `loss` is called once before, so that a row says what was computed; `leaves`
    are those whose gradients the run returns."""

    run: Callable[[], object]
    loss: Callable[[], Tensor] | None = None
    leaves: tuple[Tensor, ...] = ()


Ways = dict[str, Way]


def gradients(loss: Callable[[], Tensor], *leaves: Tensor) -> Way:
    return Way(lambda: torch.autograd.grad(loss(), leaves), loss, leaves)


class Clock:
    """Seconds that are left, less those `kept` for the last case."""

    def __init__(self, seconds: float | None = None, kept: float = 0.0) -> None:
        self.end = float("inf") if seconds is None else time.monotonic() + seconds
        self.kept = kept

    def left(self) -> float:
        return self.end - time.monotonic() - self.kept


class TooLong(Exception):
    pass


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TooLong in the block, between two steps of Python."""

    def stop(*_: object) -> None:
        raise TooLong(f"given up after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@cache
def scratch() -> Tensor:
    return torch.empty(1 << 28, dtype=torch.uint8, device="cuda")


def timed(run: Callable[[], object]) -> float:
    """Milliseconds of one call, by device events.

    The 2 GB of zeros before them leave the caches cold, and the host half a millisecond to prepare
    what it launches: while a GPU waits for Python, it is Python that is measured.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(8):
        scratch().zero_()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_megabytes(run: Callable[[], object]) -> float:
    """The most a call holds at once, beyond what was held before."""
    scratch()  # held before
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def times_and_peak(run: Callable[[], object], once: bool) -> tuple[list[float], float]:
    """After two calls that warm up; `once`: of one call, the first."""
    if once:
        times: list[float] = []
        peak = peak_megabytes(lambda: times.append(timed(run)))
        return times, peak
    timed(run)
    warm = max(timed(run), 1e-3)
    rounds = min(ROUNDS, max(3, int(ROUNDS_SECONDS * 1e3 / warm)))
    return [timed(run) for _ in range(rounds)], peak_megabytes(run)


def numbers(way: Way, amount: float, unit: str, once: bool) -> Row:
    row: Row = {}
    if way.loss is not None and not once:
        loss = float(way.loss().detach())
        row["loss"] = loss if math.isfinite(loss) else str(loss)  # JSON has no NaN
    times, peak = times_and_peak(way.run, once)
    ms = median(times)
    row |= {"ms": ms, unit: amount / ms * 1e3, "peak MB": peak, "rounds": len(times)}
    if way.leaves:
        row["gradients MB"] = sum(leaf.nbytes for leaf in way.leaves) / 1e6
    return row


def clear() -> None:
    gc.collect()
    with suppress(RuntimeError):  # after an illegal access CUDA answers nothing but that
        torch.cuda.empty_cache()


def failure(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def measured(
    case: str, ways: Ways, amount: float, unit: str, clock: Clock, once: bool = False
) -> Iterator[Row]:
    """`amount` is what a run moves or computes at the least: giga-bytes or tera-operations."""
    for name, way in ways.items():
        row: Row = {"case": case, "way": name}
        if (left := clock.left()) <= 0:
            row["skipped"] = "no time left"
        else:
            try:  # whatever one of them raises, the others are measured
                with at_most(min(left + SPARE_SECONDS, LONGEST if once else WAY_SECONDS)):
                    row |= numbers(way, amount, unit, once)
            except Exception as error:
                row["failed"] = failure(error)
        if "failed" in row:
            clear()  # not within the except, whose traceback keeps the tensors
        print(row, flush=True)
        yield row
