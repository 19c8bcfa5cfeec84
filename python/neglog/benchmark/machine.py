"""What runs here: processor, threads, OpenMP runtimes, memory. No torch needed."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import sys
from pathlib import Path
from types import TracebackType

from neglog.kernels import memory

_OPENMP = re.compile(r"/(lib[a-z]*omp[^/]*\.so[^/]*|libiomp5[^/]*|vcomp[^/]*)$")


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def openmp_runtimes() -> list[str] | None:
    """Paths of the OpenMP libraries loaded in this process; None where the system won't tell."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = (line.split(maxsplit=5) for line in maps.splitlines())  # the sixth is the file, if any
    return sorted({field[5] for field in fields if len(field) == 6 and _OPENMP.search(field[5])})


def versions() -> dict[str, str | None]:
    """Versions of what takes part in a measurement; None for what is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("neglog", "torch", "numpy", "numba"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _status(field: str) -> int | None:
    """A field of /proc/self/status, in bytes."""
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(rf"^{field}:\s*(\d+) kB$", text, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _return_free_memory() -> None:
    """Give what is free back to the system: a call served from a pool would seem to cost none."""
    gc.collect()
    memory.give_back()
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
        if trim is not None:
            trim(0)


class PeakMemory:
    """The most memory that the block held at once, beyond what was there before it.

    `extra` is in bytes, None where the kernel does not let a process reset its peak (VmHWM, by
    writing 5 to /proc/self/clear_refs).
    """

    extra: int | None = None

    def __enter__(self) -> PeakMemory:
        _return_free_memory()
        self._before = _status("VmRSS") if _reset_peak() else None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        peak = _status("VmHWM")
        if self._before is not None and peak is not None:
            self.extra = max(0, peak - self._before)
