"""Public as neglog.dispatch: which backends exist, which can run here, and a record of which ran.

"cython"  compiled kernels, for tensors in the CPU's memory
"numba"   the same kernels, compiled by Numba at their first call
"cuda"    the kernels of csrc/, for tensors on a GPU
"torch"   torch's own functions, for what no kernel takes

NEGLOG_BACKEND, `use()` or the argument `backend=` demand one; otherwise `neglog.route` chooses.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

from neglog import kernels
from neglog.kernels import Build

try:
    import torch
except ImportError:  # `describe()` still tells a NumPy user what runs
    torch = None  # type: ignore[assignment]

BACKENDS = (*kernels.BACKENDS, "cuda", "torch")
CUDA_LIBRARY = Path(__file__).with_name("neglog_cuda.so")


@cache
def _cuda() -> Build:
    """Loads the library if there is one. It does not initialise CUDA: a process that has done so
    cannot fork."""
    if torch is None:
        return Build("cuda", False, "torch is not installed: pip install torch")
    if torch.version.cuda is None:
        return Build("cuda", False, f"torch {torch.__version__} is built without CUDA")
    if not CUDA_LIBRARY.is_file():
        why = "not built: install with NEGLOG_CUDA=1, with nvcc and a CUDA build of torch"
        return Build("cuda", False, why)
    try:
        torch.ops.load_library(str(CUDA_LIBRARY))
    except OSError as error:
        return Build("cuda", False, f"{CUDA_LIBRARY.name} does not load: {error}")
    return Build("cuda", True, f"compiled, for tensors on a GPU; torch's CUDA {torch.version.cuda}")


def _torch() -> Build:
    if torch is None:
        return Build("torch", False, "torch is not installed: pip install torch")
    return Build("torch", True, f"torch {torch.__version__}, its own functions")


# Found once, at import: torch.compile would otherwise trace the search.
_STATES = {
    **{name: kernels.available(name) for name in kernels.BACKENDS},
    "cuda": _cuda(),
    "torch": _torch(),
}
_BEST_ON_CPU = next((name for name in kernels.BACKENDS if _STATES[name].usable), None)

_NAMED = os.environ.get("NEGLOG_BACKEND") or None
_demanded: ContextVar[str | None] = ContextVar("neglog_backend", default=_NAMED)
# The same for code that torch.compile traces: it cannot read a ContextVar, but guards a global. It
# is the latest demand that has not ended, of any thread.
_demanded_in_compiled: str | None = _NAMED
_demands: list[list[str | None]] = [[_NAMED]]
_recorders: list[list[str]] = []


def describe() -> list[Build]:
    """Every backend, best first: its name, whether it can run here, and why or why not."""
    return list(_STATES.values())


def _message(source: str, name: str, problem: str) -> str:
    lines = [f"{source}: {problem}: {name!r}"]
    for state in describe():
        lines.append(f"  {state.name}: {'available, ' if state.usable else ''}{state.why}")
    return "\n".join(lines)


def check(name: str, source: str = "backend") -> str:
    """`name` if it is a backend that can run here.

    Raises ValueError for an unknown name and RuntimeError for one that is not available; both list
    what is, and why the rest is not.
    """
    if name not in BACKENDS:
        raise ValueError(_message(source, name, "unknown backend"))
    if not _STATES[name].usable:
        raise RuntimeError(_message(source, name, "backend not available here"))
    return name


def demanded(backend: str | None = None, compiling: bool = False) -> str | None:
    """The backend that the argument, `use()` or the environment demands, checked; else None.

    compiling: torch.compile is tracing this.
    """
    if backend is not None:
        return check(backend)
    within = _demanded_in_compiled if compiling else _demanded.get()
    return None if within is None else check(within, "NEGLOG_BACKEND")


def best(device: str) -> str | None:
    """The kernel backend for tensors on "cpu" or "cuda"; None if none can run."""
    if device == "cuda":
        return "cuda" if _STATES["cuda"].usable else None
    return _BEST_ON_CPU


def state(name: str) -> Build:
    """Whether a backend can run here, and why or why not."""
    return _STATES[name]


@contextmanager
def use(backend: str | None) -> Iterator[None]:
    """Demand a backend for the calls within, of this thread or task, as NEGLOG_BACKEND would."""
    global _demanded_in_compiled
    if backend is not None:
        check(backend)
    token, demand = _demanded.set(backend), [backend]
    _demands.append(demand)
    _demanded_in_compiled = backend
    try:
        yield
    finally:
        _demanded.reset(token)
        # By identity, and not the last: threads leave in any order.
        _demands[:] = [other for other in _demands if other is not demand]
        (_demanded_in_compiled,) = _demands[-1]


@contextmanager
def record() -> Iterator[list[str]]:
    """Collect the backends that run within, in order: "nll:cython", "nll_backward:cython", ...

    Of all threads: autograd runs the backward of CUDA tensors in threads of its own.
    """
    ran: list[str] = []
    _recorders.append(ran)
    try:
        yield ran
    finally:
        # By identity: two lists with equal entries are equal.
        _recorders[:] = [other for other in _recorders if other is not ran]


def ran(op: str, backend: str) -> None:
    """Note for `record()` that an op ran by a backend; "" is the best of the CPU's."""
    for recorder in _recorders:
        recorder.append(f"{op}:{backend or _BEST_ON_CPU}")
