"""One training, twice: without neglog and with it. Same seed, same batches; do they agree?"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch

from neglog.bench import terminal
from neglog.bench.machine import PeakMemory

# Losses are compared step by step. Each step adds rounding, which the optimizer carries on.
AGREE = 1e-3


class Clock:
    """What a training tells: `start` when its model and data are there, `step` after each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._peak = PeakMemory()
        self._last = 0.0

    def start(self) -> None:
        self._peak.__enter__()
        self._last = perf_counter()

    def step(self, loss: float | torch.Tensor | None = None) -> None:
        """loss: of the step; None where the trainer's log has it."""
        if loss is not None:
            self.losses.append(float(loss))
        now = perf_counter()
        self.seconds.append(now - self._last)
        self._last = now

    def result(self) -> Result:
        self._peak.__exit__(None, None, None)
        return Result(self.losses, median(self.seconds), self._peak.extra)


class Result(NamedTuple):
    """Losses of the steps; seconds of one, the median; bytes above what the process held before."""

    losses: list[float]
    seconds: float
    peak: int | None


# (with neglog?, clock, steps)
Training = Callable[[bool, Clock, int], None]


def compare(training: Training, steps: int, quick_steps: int = 3) -> None:
    """Runs a training without and with neglog, prints both, exits with 1 where losses differ."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help=f"{quick_steps} steps")
    parser.add_argument("--steps", type=int, default=steps, metavar="N", help=f"({steps})")
    options = parser.parse_args()
    steps = quick_steps if options.quick else options.steps
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # tables, not advice
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
    plain, fused = (in_a_process(training, ours, steps) for ours in (False, True))
    rows = [_row(name, found) for name, found in (("without", plain), ("with", fused))]
    columns = ("neglog", "first loss", "last loss", "ms a step", "peak memory")
    screen = terminal.console()
    terminal.show(screen, terminal.Table(f"{steps} steps, each in its process", columns, rows, {}))
    pairs = list(zip(plain.losses, fused.losses, strict=True))
    worst = max(abs(a - b) / abs(a) for a, b in pairs)
    screen.print(f"Largest difference of the losses at the same step: {worst:.1e}, relative.")
    if not pairs or not worst <= AGREE:
        sys.exit(f"the losses differ by more than {AGREE}")


def _row(name: str, found: Result) -> tuple[str, ...]:
    first, *_, last = found.losses
    milliseconds = f"{found.seconds * 1e3:.0f}"
    return name, f"{first:.4f}", f"{last:.4f}", milliseconds, terminal.megabytes(found.peak)


def in_a_process(training: Training, ours: bool, steps: int) -> Result:
    """Its peak of memory is its own, and nothing is left over from the other."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(training, ours, steps, sender))
    process.start()
    sender.close()
    try:
        found: Result = receiver.recv()
    except EOFError:
        process.join()
        sys.exit(f"the training {'with' if ours else 'without'} neglog failed")
    process.join()
    return found


def _work(training: Training, ours: bool, steps: int, sender: object) -> None:
    torch.manual_seed(0)
    clock = Clock()
    training(ours, clock, steps)
    sender.send(clock.result())  # type: ignore[attr-defined]
