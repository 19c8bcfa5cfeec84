"""Ops that `bench` knows, and what a case file must give.

A case is the module of its op's name with three functions:
  problem(shape, dtype, seed) -> Problem                 the inputs, and the truth to verify against
  contenders(compiled, shape, dtype) -> list[Contender]  implementations, the baseline first
  small_contenders() -> list[Contender]                  the two that `--suite small` compares
and its line in OPS below. Nothing here imports torch: the command line reads it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Shape = dict[str, int]


class Op(NamedTuple):
    """The shape an op is measured at, by name of dimension, and the shapes of its suites."""

    default: Shape
    large: tuple[Shape, ...]
    small: tuple[Shape, ...]


def _shapes(names: tuple[str, ...], *sizes: tuple[int, ...]) -> tuple[Shape, ...]:
    return tuple(dict(zip(names, size, strict=True)) for size in sizes)


_ROWS = ("rows", "vocab")
_HEAD = ("rows", "features", "vocab")
_PAIRS = ("rows", "features")

OPS = {
    "clip_loss": Op(
        {"rows": 8192, "features": 512},
        _shapes(_PAIRS, (8192, 512), (32768, 256)),
        _shapes(_PAIRS, (8, 128), (32, 128), (64, 384), (128, 512), (256, 512)),
    ),
    "cross_entropy": Op(
        {"rows": 2048, "vocab": 32000},
        _shapes(_ROWS, (8192, 8192), (2048, 32000), (2048, 50257), (1024, 128256)),
        _shapes(_ROWS, (1, 2), (8, 10), (32, 100), (64, 1000), (128, 1000), (512, 1000)),
    ),
    "info_nce": Op(
        {"rows": 8192, "features": 512},
        _shapes(_PAIRS, (8192, 512), (4096, 768)),
        _shapes(_PAIRS, (8, 128), (32, 128), (64, 384), (128, 512), (256, 512)),
    ),
    "linear_cross_entropy": Op(
        {"rows": 2048, "features": 768, "vocab": 32000},
        _shapes(_HEAD, (2048, 768, 32000), (8192, 256, 65536)),
        _shapes(_HEAD, (8, 16, 10), (64, 64, 1000), (512, 64, 1000)),
    ),
    "masked_cross_entropy": Op(
        {"rows": 4096, "vocab": 30522},
        _shapes(_ROWS, (4096, 30522), (8192, 8192)),
        _shapes(_ROWS, (8, 10), (64, 1000), (512, 1000)),
    ),
    "nt_xent": Op(
        {"rows": 8192, "features": 256},
        _shapes(_PAIRS, (8192, 256), (4096, 128)),
        _shapes(_PAIRS, (16, 128), (64, 128), (128, 384), (256, 512)),
    ),
}


class Contender(NamedTuple):
    """One implementation. `loss(*leaves, *fixed)` gives a scalar tensor with a graph.

    work: what a forward and backward must move at the least, as a multiple of Spec.unit_work.
    in_place: the loss overwrites its leaves, so each call gets a copy that no timer sees.
    new_memory: the memory that neglog keeps for its next gradient is dropped before each call.
    backend: the neglog backend it must run by, None if it is not neglog's.
    """

    name: str
    label: str
    loss: Callable[..., Tensor]
    work: float
    in_place: bool = False
    new_memory: bool = False
    backend: str | None = None


class Truth(NamedTuple):
    """The loss and the compared part of the gradients, in float64."""

    loss: float
    grads: tuple[np.ndarray, ...]


class Spec(NamedTuple):
    """What the report needs to know of a problem.

    nbytes: of the inputs. yardstick: the least that any implementation must do, timed beside them.
    unit_work, unit: what one multiple of `work` is, and what 1e9 of it a second are called.
    model: how `work` is counted, in words.
    """

    shape: Shape
    dtype: str
    nbytes: int
    yardstick: str
    yardstick_work: float
    unit_work: float
    unit: str
    model: str


class Problem(NamedTuple):
    """One op at one shape.

    leaves: require gradients. fixed: the other arguments. check_fixed: those for verifying, where
    all but a slice is ignored, so that the full shape runs and the oracle stays small.
    compared: the part of the gradients that `truth` holds.
    by_norm: gradients are sums in which terms cancel, so that an error is small beside their norm,
    not beside each number.
    """

    spec: Spec
    leaves: tuple[Tensor, ...]
    fixed: tuple[Any, ...]
    check_fixed: tuple[Any, ...]
    truth: Truth
    compared: Callable[[tuple[Tensor, ...]], tuple[np.ndarray, ...]]
    yardstick: Callable[[], Any]
    by_norm: bool = False


def load(op: str) -> Any:
    """The case module of an op."""
    return importlib.import_module(f"neglog.benchmark.cases.{op}")
