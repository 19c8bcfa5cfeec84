"""Seconds that a run or one contender may take."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager


class TooLong(Exception):
    """A contender was given up."""


class Budget:
    """Seconds that are left, less those `kept` for the last case."""

    def __init__(self, seconds: float | None = None, kept: float = 0.0) -> None:
        self.end = math.inf if seconds is None else time.monotonic() + seconds
        self.kept = kept

    def left(self) -> float:
        """Below 0 when they are used up; without a limit, infinite."""
        return self.end - time.monotonic() - self.kept


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TooLong in the block, between two steps of Python. No limit where it is infinite."""
    if math.isinf(seconds):
        yield
        return

    def stop(*_: object) -> None:
        raise TooLong(f"given up after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
