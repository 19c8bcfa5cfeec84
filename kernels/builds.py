"""Which kernels run here: the compiled build for this processor, or else the Numba version.

The compiled kernels are built once for each ISA level, and the best level that the processor has is
used. NEGLOG_ISA in the environment names the only level to consider: for tests, and to measure one
against another.
"""

from __future__ import annotations

import importlib
import os
import warnings
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

BACKENDS = ("cython", "numba")
# Best first. `generic` is the one build for processors other than x86-64.
ISA_LEVELS = ("x86_64_v4", "x86_64_v3", "x86_64_v2", "generic")
# What the dynamic loader says without address space, in glibc and in musl.
NO_MEMORY = ("failed to map segment", "cannot allocate memory", "Out of memory")


class Build(NamedTuple):
    """One backend, or one build of the compiled kernels: whether it can run, and why or why not."""

    name: str
    usable: bool
    why: str


def _import(name: str) -> ModuleType:
    """A module with compiled code. Raises MemoryError where there is no address space for it, which
    the loader calls an ImportError: that is no reason to choose another build for good."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if any(text in str(error) for text in NO_MEMORY):
            raise MemoryError(f"neglog: no memory to load {name}: {error}") from error
        raise


def _processor_level() -> int | None:
    """The x86-64 level of the processor, 0 for others; None without compiled kernels."""
    try:
        cpu = _import("neglog.kernels.cython.cpu_level")
    except ImportError:
        return None
    level: int = cpu.x86_64_level()
    return level


def _isa_build(level: str, processor: int | None) -> Build:
    if processor is None:
        return Build(level, False, "not built: neglog was installed without a C++ compiler")
    if level.startswith("x86_64_v") and processor < int(level[-1]):
        has = f"x86-64-v{processor}" if processor else "no x86-64"
        return Build(level, False, f"the processor has {has}")
    try:
        _import(f"neglog.kernels.cython.{level}.nll")
    except ModuleNotFoundError:
        return Build(level, False, "not built for this machine")
    except ImportError as error:
        return Build(level, False, f"does not load: {error}")
    return Build(level, True, "runs here")


@cache
def isa_builds() -> tuple[Build, ...]:
    """The build of every ISA level, best first. Raises ValueError if NEGLOG_ISA is none of them."""
    processor = _processor_level()
    only = os.environ.get("NEGLOG_ISA")
    if only is not None and only not in ISA_LEVELS:
        raise ValueError(f"NEGLOG_ISA: expected one of {', '.join(ISA_LEVELS)}, got {only!r}")
    return tuple(
        Build(level, False, f"NEGLOG_ISA asks for {only}")
        if only not in (None, level)
        else _isa_build(level, processor)
        for level in ISA_LEVELS
    )


def isa_level() -> str | None:
    """The ISA level whose build runs, or None if no compiled build can."""
    return next((build.name for build in isa_builds() if build.usable), None)


def _no_build() -> str:
    """Why no compiled build runs: each reason once, with its levels unless all share it."""
    levels: dict[str, list[str]] = {}
    for build in isa_builds():
        levels.setdefault(build.why, []).append(build.name)
    if len(levels) == 1:
        return next(iter(levels))
    return "; ".join(f"{', '.join(names)}: {why}" for why, names in levels.items())


@cache
def available(backend: str) -> Build:
    """Whether a backend, "cython" or "numba", can run, and why or why not."""
    if backend == "cython":
        level = isa_level()
        return Build(backend, level is not None, f"compiled for {level}" if level else _no_build())
    if backend == "numba":
        if find_spec("numba") is None:  # not imported: that alone takes half a second
            return Build(backend, False, "numba is not installed: pip install numba")
        from importlib.metadata import version  # half of the time that importing this would take

        return Build(backend, True, f"numba {version('numba')}")
    raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")


@cache
def load(family: str, backend: str | None = None) -> ModuleType:
    """The module of a family of kernels, "nll" or "pairs": compiled if that can run, else Numba's.

    Raises ImportError with the reasons if the backend cannot run, or none can, and MemoryError
    where there is no memory to load it.
    """
    if backend is None:
        backend = next((name for name in BACKENDS if available(name).usable), None)
        if backend is None:
            tried = "\n".join(f"  {name}: {available(name).why}" for name in BACKENDS)
            raise ImportError(f"neglog: no kernels can run here; tried\n{tried}")
        if backend == "numba":
            _warn_once_that_numba_runs()
    state = available(backend)
    if not state.usable:
        raise ImportError(f"neglog: the {backend} kernels cannot run: {state.why}")
    if backend == "numba":
        return importlib.import_module(f"neglog.kernels.numba.{family}")
    try:
        return _import(f"neglog.kernels.cython.{isa_level()}.{family}")
    except ImportError as error:
        raise ImportError(
            f"neglog: the compiled kernels {family} for {isa_level()} do not load, though others "
            f"do: {error}; install neglog anew, or choose backend='numba' or 'torch'"
        ) from error


@cache
def _warn_once_that_numba_runs() -> None:
    warnings.warn(
        "neglog: no compiled kernels can run here, so Numba compiles its version of them; the "
        f"first call of each kind takes some seconds ({available('cython').why})",
        RuntimeWarning,
        stacklevel=4,
    )
