"""CPU kernels: the compiled build for this processor, their Numba twins, and a NumPy face.

Knows nothing of torch. `load("nll")` gives the module of a stem; `nll_forward` and its kin run it
on NumPy arrays.
"""

from __future__ import annotations

import importlib
import os
import warnings
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

BACKENDS = ("cython", "numba")
# Best first. `generic` is the one build of processors other than x86-64.
ISA_LEVELS = ("x86_64_v4", "x86_64_v3", "x86_64_v2", "generic")

_ARRAY_FUNCTIONS = {
    **dict.fromkeys(("NLL", "nll_forward", "nll_backward", "nll_forward_backward"), "numpy.nll"),
    **dict.fromkeys(("Pairs", "pairs_forward", "pairs_backward"), "numpy.pairs"),
}

if TYPE_CHECKING:
    from neglog.kernels.numpy.nll import NLL, nll_backward, nll_forward, nll_forward_backward
    from neglog.kernels.numpy.pairs import Pairs, pairs_backward, pairs_forward

__all__ = [
    "BACKENDS",
    "ISA_LEVELS",
    "Build",
    "available",
    "builds",
    "isa_level",
    "load",
    *_ARRAY_FUNCTIONS,
]


class Build(NamedTuple):
    """One build of the compiled kernels: is it used, and why or why not."""

    name: str
    usable: bool
    why: str


def __getattr__(name: str) -> Any:
    if name in _ARRAY_FUNCTIONS:
        home = importlib.import_module(f"neglog.kernels.{_ARRAY_FUNCTIONS[name]}")
        return getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _processor_level() -> int | None:
    try:
        cpu = importlib.import_module("neglog.kernels.cython.cpu_level")
    except ImportError:
        return None
    return cpu.x86_64_level()


def _judge(level: str, processor: int | None) -> Build:
    """Whether the build of one ISA level can run here. Importing it runs no vector code yet."""
    if processor is None:
        return Build(level, False, "not built: neglog was installed without a compiler")
    if level.startswith("x86_64_v") and processor < int(level[-1]):
        runs = f"x86-64-v{processor}" if processor else "no x86-64 code"
        return Build(level, False, f"the processor runs {runs}")
    try:
        importlib.import_module(f"neglog.kernels.cython.{level}.nll")
    except ModuleNotFoundError:
        return Build(level, False, "not built for this machine")
    except ImportError as error:
        return Build(level, False, f"does not load: {error}")
    return Build(level, True, "runs here")


@cache
def builds() -> tuple[Build, ...]:
    """Every ISA level, best first, and whether it can be used.

    NEGLOG_ISA names the only level to consider, for tests and for measuring one against another.
    """
    processor = _processor_level()
    asked = os.environ.get("NEGLOG_ISA")
    if asked is not None and asked not in ISA_LEVELS:
        raise ValueError(f"NEGLOG_ISA: expected one of {', '.join(ISA_LEVELS)}, got {asked!r}")
    return tuple(
        Build(level, False, f"NEGLOG_ISA asks for {asked}")
        if asked not in (None, level)
        else _judge(level, processor)
        for level in ISA_LEVELS
    )


def isa_level() -> str | None:
    """The ISA level whose build is used, or None if no compiled build can be."""
    return next((build.name for build in builds() if build.usable), None)


@cache
def available(backend: str) -> Build:
    """Whether a backend, "cython" or "numba", can run, and why or why not."""
    if backend == "cython":
        level = isa_level()
        if level:
            return Build(backend, True, f"compiled for {level}")
        return Build(backend, False, "; ".join(f"{b.name}: {b.why}" for b in builds()))
    if backend == "numba":
        if find_spec("numba") is None:  # not imported: that alone takes half a second
            return Build(backend, False, "numba is not installed: pip install numba")
        return Build(backend, True, f"numba {version('numba')}")
    raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")


@cache
def load(stem: str, backend: str | None = None) -> ModuleType:
    """The kernel module of a stem ("nll"), compiled if it can be, else its Numba twin.

    Raises ImportError, saying what was tried, if the backend asked for (or any) cannot run.
    """
    if backend is None:
        backend = next((name for name in BACKENDS if available(name).usable), None)
        if backend is None:
            tried = "\n".join(f"  {name}: {available(name).why}" for name in BACKENDS)
            raise ImportError(f"neglog: no kernels can run here; tried\n{tried}")
        if backend == "numba":
            _say_once_that_numba_runs()
    state = available(backend)
    if not state.usable:
        raise ImportError(f"neglog: the {backend} kernels cannot run: {state.why}")
    if backend == "numba":
        return importlib.import_module(f"neglog.kernels.numba.{stem}")
    return importlib.import_module(f"neglog.kernels.cython.{isa_level()}.{stem}")


@cache
def _say_once_that_numba_runs() -> None:
    warnings.warn(
        "neglog: no compiled kernels here, so their Numba twins run; the first call of each kind "
        f"compiles for some seconds ({available('cython').why})",
        RuntimeWarning,
        stacklevel=4,
    )
