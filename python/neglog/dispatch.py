"""Which backend runs a call, and why the others do not.

Backends: "cython" (compiled kernels), "numba" (their twins), "cuda" (those of a GPU, for tensors
that lie there) and "torch" (torch's own functions, which also take what no kernel does: other
devices, tiny inputs, tensor subclasses). NEGLOG_BACKEND
in the environment, `use()` or the argument `backend=` name one; otherwise the best available runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from neglog import cuda, kernels
from neglog.kernels import Build

try:
    import torch
    from torch._subclasses import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    # What torch.compile and torch.export put in a tensor's place; no other subclass is known.
    TRACED: tuple[type, ...] = (FakeTensor, FunctionalTensor)
except ImportError:  # `describe()` still tells a NumPy user what runs
    torch = None  # type: ignore[assignment]

BACKENDS = (*kernels.BACKENDS, "cuda", "torch")

# Logits, in numbers, up to which torch's own function is the faster: there the fixed cost of two
# custom ops outweighs its slower arithmetic (docs/performance.md, "Small shapes").
CROSSOVER = 196608

# Found once, at import: torch.compile would otherwise trace the search.
_STATES = {name: kernels.available(name) for name in kernels.BACKENDS}
_DEFAULT = next((name for name in kernels.BACKENDS if _STATES[name].usable), None)
if torch is not None:
    _STATES["cuda"] = cuda.state()

_forced: str | None = os.environ.get("NEGLOG_BACKEND") or None
_recorders: list[list[str]] = []


def describe() -> list[Build]:
    """Every backend, best first: its name, whether it can run here, and why or why not."""
    if torch is None:
        missing = "torch is not installed: pip install torch"
        return [*_STATES.values(), *(Build(name, False, missing) for name in ("cuda", "torch"))]
    return [
        *_STATES.values(),
        Build("torch", True, f"torch {torch.__version__}, its own functions"),
    ]


def _refusal(source: str, name: str, problem: str) -> str:
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
        raise ValueError(_refusal(source, name, "unknown backend"))
    if name != "torch" and not (name in _STATES and _STATES[name].usable):
        raise RuntimeError(_refusal(source, name, "backend not available here"))
    return name


def forced(backend: str | None = None) -> str | None:
    """The backend that the argument, `use()` or the environment demands, checked; else None."""
    if backend is not None:
        return check(backend)
    if _forced is not None:
        return check(_forced, "NEGLOG_BACKEND")
    return None


@contextmanager
def use(backend: str | None) -> Iterator[None]:
    """Force a backend for the calls within, as NEGLOG_BACKEND would."""
    global _forced
    if backend is not None:
        check(backend)
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


@contextmanager
def record() -> Iterator[list[str]]:
    """Collect the backends that run within, in order: "nll:cython", "nll_backward:cython", ..."""
    ran: list[str] = []
    _recorders.append(ran)
    try:
        yield ran
    finally:
        _recorders.remove(ran)


def ran(op: str, backend: str) -> None:
    """Note for `record()` that an op ran by a backend."""
    for recorder in _recorders:
        recorder.append(f"{op}:{backend}")


def kernels_refuse(logits: Any, weight: Any = None, backend: str | None = None) -> str | None:
    """Why no kernel, or not that backend's, can take these logits, or None."""
    elsewhere = _refused_by_device(logits.device, backend)
    if elsewhere is not None:
        return elsewhere
    if logits.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"logits of dtype {logits.dtype}"
    if type(logits) not in (torch.Tensor, torch.nn.Parameter, *TRACED):
        return f"logits of type {type(logits).__name__}, which decides for itself what an op does"
    if logits.layout != torch.strided:
        return f"logits of layout {logits.layout}"
    if weight is not None and weight.requires_grad:
        return "weight requires grad, which only torch's own formula gives"
    if torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is being compiled, for which an op has no formula"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is on, which the kernels have no formula for"
    return None


def _refused_by_device(device: Any, backend: str | None) -> str | None:
    if device.type == "cuda":
        if backend in kernels.BACKENDS:
            return f"logits on device {device}, and its kernels run on the CPU"
        return None if _STATES["cuda"].usable else f"logits on {device}: {_STATES['cuda'].why}"
    if device.type not in ("cpu", "meta") or backend == "cuda":
        return f"logits on device {device}, which its kernels do not run on"
    return None


def prefers_torch(input: Any) -> bool:
    """Whether torch's own cross_entropy should run: tiny inputs, and what no kernel takes."""
    if not isinstance(input, torch.Tensor):
        return True  # for torch's own error
    few = input.numel() < CROSSOVER
    return few or kernels_refuse(input) is not None or not kernel_backend(input)


def kernel_backend(like: Any = None) -> str | None:
    """The kernel backend that runs for such tensors unless one is forced; None if none can."""
    if like is not None and like.is_cuda:
        return "cuda" if _STATES["cuda"].usable else None
    return _DEFAULT
