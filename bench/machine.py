"""What runs here: processor, threads, OpenMP runtimes, memory. No torch needed.

psutil and py-cpuinfo say more where they are installed (the extra `bench`); NumPy is enough.
"""

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

try:
    import cpuinfo
except ImportError:
    cpuinfo = None
try:
    import psutil
except ImportError:
    psutil = None

_OPENMP = re.compile(r"/(lib[a-z]*omp[^/]*\.so[^/]*|libiomp5[^/]*|vcomp[^/]*)$")


def processor() -> str:
    """The processor's name; without py-cpuinfo what Python knows, which may be no more than x86."""
    name = cpuinfo.get_cpu_info().get("brand_raw") if cpuinfo else None
    return name or platform.processor() or platform.machine()


def cores() -> int:
    """Cores this process may run on."""
    if psutil is not None and hasattr(psutil.Process, "cpu_affinity"):
        return len(psutil.Process().cpu_affinity())
    return os.cpu_count() or 1


def openmp_runtimes() -> list[str] | None:
    """Paths of the OpenMP libraries in this process; None where nothing here can tell them."""
    if psutil is None or not hasattr(psutil.Process, "memory_maps"):
        return None
    return sorted(file.path for file in psutil.Process().memory_maps() if _OPENMP.search(file.path))


def versions(*others: str) -> dict[str, str | None]:
    """Versions of what takes part in a measurement; None for what is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("neglog", "torch", "numpy", "numba", *others):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _peak() -> int | None:
    """The largest resident size since it was reset, in bytes. Linux alone knows it, as VmHWM."""
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s*(\d+) kB$", text, re.MULTILINE)
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

    `extra` is in bytes. It is None without psutil, and where the system does not let a process
    reset its peak (by writing 5 to /proc/self/clear_refs).
    """

    extra: int | None = None

    def __enter__(self) -> PeakMemory:
        _return_free_memory()
        known = psutil is not None and _reset_peak()
        self._before = psutil.Process().memory_info().rss if known else None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        peak = _peak()
        if self._before is not None and peak is not None:
            self.extra = max(0, peak - self._before)
