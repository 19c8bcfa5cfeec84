"""Where a call runs: decided here, once, after its arguments were checked.

    where = route.choose(logits, backend=backend, weight=weight)

The answer is handed down: nothing below asks again, and a loss that composes another enters below
its public function. `explain` gives a user the same answer without the computation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neglog import availability, torch_state
from neglog.tiles import gemm

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NO_KERNELS = "no kernels can run here; see neglog.dispatch.describe()"
# Of contrastive losses. At 1024 x 256 both ways take the same time. At 8192 x 512 in float32 pairs
# whose similarities are kept take 0.87 of the other.
FEW_ROWS = 1024
ACCEPTED = (*torch_state.PLAIN, *torch_state.TRACED)


class Route(NamedTuple):
    """Where a call runs.

    backend: "cython", "numba", "cuda" or "torch".
    why: the reason, in words.
    tiled: scores are made a tile at a time, in `workspace` bytes; otherwise they are the caller's,
        or lie in memory whole.
    tile_dtype: the dtype of a tile.
    demanded: the backend if the caller demanded it; else "", and the op takes the best there is
        when it runs, so that a graph exported on one machine runs on another.
    """

    backend: str
    why: str
    tiled: bool
    tile_dtype: torch.dtype
    workspace: int
    demanded: str

    def for_op(self) -> tuple[int, torch.dtype, str]:
        """The arguments workspace, tile_dtype and backend of an op."""
        return self.workspace, self.tile_dtype, self.demanded

    @property
    def sends(self) -> str:
        """What processes that compute together must have alike: kernels of any kind exchange the
        same, torch's formula something else."""
        return "torch" if self.backend == "torch" else "kernels"

    def __str__(self) -> str:
        how = "in memory"
        if self.tiled:
            dtype = str(self.tile_dtype).removeprefix("torch.")
            how = f"in tiles of {dtype}, up to {self.workspace / 2**20:g} MB"
        return f"{self.backend}, {how}: {self.why}"


_explaining: ContextVar[bool] = ContextVar("neglog_explaining", default=False)


class _Explained(BaseException):
    """Leaves the function that `explain` called, with what was decided."""

    def __init__(self, route: Route) -> None:
        self.route = route


def explain(function: Callable[..., Any], *arguments: Any, **options: Any) -> Route:
    """Where `function(*arguments, **options)` would run, and why. Nothing is computed.

        print(neglog.explain(neglog.cross_entropy, logits, target))

    function: a loss of neglog, a module of neglog.nn, or a functools.partial of one; compiled, it
    is explained as it is without torch.compile. Raises what the call's checks of its arguments
    raise (the values of a target are not read), and TypeError for another function, which is not
    called.
    """
    inner = function.func if isinstance(function, partial) else function
    inner = getattr(inner, "_orig_mod", inner)
    if isinstance(inner, type):
        raise TypeError(f"function: expected a loss or an instance of a module, got {inner!r}")
    if isinstance(inner, torch.nn.Module):
        inner = type(inner).forward
    if not str(getattr(inner, "__module__", "")).startswith(("neglog.losses.", "neglog.nn")):
        raise TypeError(f"function: expected a loss of neglog, got {function!r}")
    if torch_state.compiling():
        raise RuntimeError("neglog.explain: expected a call outside what torch.compile traces")
    token = _explaining.set(True)
    try:
        with torch_state.without_dynamo():
            function(*arguments, **options)
    except _Explained as explained:
        return explained.route
    finally:
        _explaining.reset(token)
    raise TypeError(f"function: expected a loss of neglog, got {function!r}")


def choose(
    x: Tensor,
    *others: Tensor,
    backend: str | None = None,
    weight: Tensor | None = None,
    workspace: int | None = None,
    logits_dtype: torch.dtype | None = None,
    by_torch: str | None = None,
) -> Route:
    """Where scores of `x`, and of what it is multiplied with, are worked on.

    weight: class weights, whose gradient only torch's formula gives. workspace: bytes for tiles of
    scores; None where the scores are given. logits_dtype: of a tile, None for the fastest.
    by_torch: the reason if no kernel is for this loss.

    Raises RuntimeError if a backend is demanded that cannot take the call.
    """
    compiling = torch_state.compiling()
    demanded = availability.demanded(backend, compiling)
    # A lookup takes half the time of the questions; torch.compile would trace the cache.
    find = _for_tensor.__wrapped__ if compiling else _for_tensor
    where = find(type(x), x.dtype, x.device, demanded)
    for other in others:
        beside = find(type(other), other.dtype, other.device, demanded)
        where = beside if beside.backend == "torch" else where
    if weight is not None or compiling or torch_state.differentiating_forward():
        where = _unless_refused_now(where, weight, compiling)
    if by_torch is not None:
        where = _by_torch(where, by_torch)
    elif where.backend == "torch" and demanded not in (None, "torch"):
        raise RuntimeError(f"backend={demanded!r} cannot take this call: {where.why}")
    if workspace is not None and where.backend != "torch":
        tile_dtype = gemm.tile_dtype(x) if logits_dtype is None else logits_dtype
        where = where._replace(tiled=True, tile_dtype=tile_dtype, workspace=workspace)
    if not compiling and _explaining.get():
        raise _Explained(where)
    return where


def keeps(route: Route, rows: Any, columns: Any, learns: bool) -> bool:
    """Whether all rows x columns similarities are kept for the backward: they fit in the workspace.

    While a size is symbolic this is not known, and they are not kept: no graph depends on a size.
    """
    size = rows * columns * route.tile_dtype.itemsize
    return learns and torch_state.known_true(size <= route.workspace)


@cache
def _for_tensor(
    kind: type, dtype: torch.dtype, device: torch.device, demanded: str | None
) -> Route:
    """For scores that are given, in such a tensor."""
    refusal = _refused_by_device(device, demanded)
    if refusal is None and dtype not in DTYPES:
        refusal = f"logits of dtype {dtype}"
    elif refusal is None and kind not in ACCEPTED:
        refusal = f"logits of type {kind.__name__}, which decides for itself what an op does"
    best = availability.best(device.type)
    if demanded == "torch" or refusal or best is None:
        why = "it was demanded" if demanded == "torch" else refusal or NO_KERNELS
        if why is NO_KERNELS and not torch_state.compiling():
            _warn_once_that_torch_runs()
        return Route("torch", why, False, dtype, 0, "")
    why = "it was demanded" if demanded else availability.state(best).why
    return Route(demanded or best, why, False, dtype, 0, demanded or "")


@cache
def _warn_once_that_torch_runs() -> None:
    reasons = "; ".join(f"{name}: {availability.state(name).why}" for name in ("cython", "numba"))
    warnings.warn(
        f"neglog: no kernels can run here, so torch's own functions compute ({reasons})",
        RuntimeWarning,
        stacklevel=5,
    )


def _by_torch(where: Route, why: str) -> Route:
    return Route("torch", why, False, where.tile_dtype, 0, "")


def _unless_refused_now(where: Route, weight: Tensor | None, compiling: bool) -> Route:
    """`where`, unless no kernel can take the call in this state of torch."""
    if weight is not None and weight.requires_grad:
        return _by_torch(where, "weight requires grad, which only torch's own formula gives")
    if compiling and torch_state.transforming():
        why = "a transform of torch.func is being compiled, for which an op has no formula"
        return _by_torch(where, why)
    if torch_state.differentiating_forward():
        why = "forward-mode differentiation is on, which the kernels have no formula for"
        return _by_torch(where, why)
    return where


def forms_early(route: Route, query: Tensor, temperature: float | Tensor) -> bool:
    """Whether the loss of rows alone is taken as linear cross-entropy, with the keys for classes.

    It forms gradients in the forward: 3 matmuls, where the op pairs has 4 if it cannot keep the
    similarities, and a third less of the fixed cost of a call. A temperature that learns is
    multiplied in before, which 16 bits would round.
    """
    exact = not isinstance(temperature, Tensor) or query.itemsize > 2
    rows = query.shape[0]
    few = torch_state.known_true(rows <= FEW_ROWS)
    return exact and route.backend != "torch" and (few or not keeps(route, rows, rows, True))


def _refused_by_device(device: Any, demanded: str | None) -> str | None:
    if device.type == "cuda":
        if demanded in ("cython", "numba"):
            return f"logits on device {device}, and its kernels run on the CPU"
        usable = availability.best("cuda") is not None
        return None if usable else f"logits on {device}: {availability.state('cuda').why}"
    if device.type not in ("cpu", "meta") or demanded == "cuda":
        return f"logits on device {device}, which its kernels do not run on"
    return None
