"""The two clocks: the CPU's, and the events of a CUDA device."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from time import perf_counter

import torch
from torch import Tensor

from .machine import PeakMemory

Call = Callable[[], object]


class Clock(ABC):
    """How seconds and bytes of a call are read on one kind of device."""

    device: str

    @abstractmethod
    def seconds(self, call: Call) -> float:
        """The seconds that one call takes."""

    @abstractmethod
    def peak(self, call: Call) -> int | None:
        """The most bytes that one call holds at once, beyond those held before it."""

    def rounds(self, wanted: int, seconds: float) -> int:
        """How many rounds to time, if one takes so many seconds."""
        return wanted

    def clear(self) -> None:
        """Frees what a failed call left behind."""
        gc.collect()


class CPUClock(Clock):
    """Wall time, and the resident size."""

    device = "cpu"

    def seconds(self, call: Call) -> float:
        """Of one call; what it returns is freed after the clock is read."""
        start = perf_counter()
        result = call()
        end = perf_counter()
        del result  # giving 262 MB back to the system takes time of its own
        return end - start

    def peak(self, call: Call) -> int | None:
        """None where the system does not let a process reset its peak."""
        with PeakMemory() as peak:
            call()
        return peak.extra


class CUDAClock(Clock):
    """Device events, with cold caches, and the bytes of torch's allocator."""

    device = "cuda"
    # Of calls so slow that all rounds would take longer: fewer rounds, but at least 3.
    most_seconds = 6.0

    def seconds(self, call: Call) -> float:
        """Between two events on the device.

        The 2 GB of zeros before the first leave the caches cold, and give the host half a
        millisecond to prepare its launches: while a GPU waits for Python, Python is measured. They
        are read once more, so that no line of them is left to be written during the call.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(8):
            _scratch().zero_()
        _scratch().view(torch.int64).sum()
        start.record()
        result = call()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) / 1e3

    def peak(self, call: Call) -> int | None:
        """What the allocator held at most during the call, beyond what it held before."""
        _scratch()  # held before
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def rounds(self, wanted: int, seconds: float) -> int:
        """At most most_seconds of them, and at least 3."""
        return min(wanted, max(3, int(self.most_seconds / max(seconds, 1e-6))))

    def clear(self) -> None:
        """Frees the cache too; after an illegal access CUDA answers nothing but that."""
        gc.collect()
        with suppress(RuntimeError):
            torch.cuda.empty_cache()


@cache
def _scratch() -> Tensor:
    return torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
