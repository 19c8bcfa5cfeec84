"""The losses that `bench` knows, and what a case file must give.

A case is the module of its loss's name with two functions:
  problem(shape, dtype, seed, device="cpu", ...) -> Problem   the inputs, and the truth about them
  contenders(problem) -> list[Contender]                      implementations, the baseline first
and its entry in OPS below. Nothing here imports torch: the command line reads it.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

Shape = dict[str, int]


class Op(NamedTuple):
    """The shape a loss is measured at, by name of dimension, and the shapes of its suites."""

    default: Shape
    large: tuple[Shape, ...]
    small: tuple[Shape, ...]


def shapes(names: tuple[str, ...], *sizes: tuple[int, ...]) -> tuple[Shape, ...]:
    """Those sizes, each with the names of its dimensions."""
    return tuple(dict(zip(names, size, strict=True)) for size in sizes)


ROWS = ("rows", "vocab")
HEAD = ("rows", "features", "vocab")
PAIRS = ("rows", "features")

OPS = {
    "clip_loss": Op(
        {"rows": 8192, "features": 512},
        shapes(PAIRS, (8192, 512), (32768, 256)),
        shapes(PAIRS, (8, 128), (32, 128), (64, 384), (128, 512), (256, 512)),
    ),
    "cross_entropy": Op(
        {"rows": 2048, "vocab": 32000},
        shapes(ROWS, (8192, 8192), (2048, 32000), (2048, 50257), (1024, 128256)),
        shapes(ROWS, (1, 2), (8, 10), (32, 100), (64, 1000), (128, 1000), (512, 1000)),
    ),
    "info_nce": Op(
        {"rows": 8192, "features": 512},
        shapes(PAIRS, (8192, 512), (4096, 768)),
        shapes(PAIRS, (8, 128), (32, 128), (64, 384), (128, 512), (256, 512)),
    ),
    "linear_cross_entropy": Op(
        {"rows": 2048, "features": 768, "vocab": 32000},
        shapes(HEAD, (2048, 768, 32000), (8192, 256, 65536)),
        shapes(HEAD, (8, 16, 10), (64, 64, 1000), (512, 64, 1000)),
    ),
    "masked_cross_entropy": Op(
        {"rows": 4096, "vocab": 30522},
        shapes(ROWS, (4096, 30522), (8192, 8192)),
        shapes(ROWS, (8, 10), (64, 1000), (512, 1000)),
    ),
    "nt_xent": Op(
        {"rows": 8192, "features": 256},
        shapes(PAIRS, (8192, 256), (4096, 128)),
        shapes(PAIRS, (16, 128), (64, 128), (128, 384), (256, 512)),
    ),
}


def load(op: str) -> Any:
    """The case module of a loss."""
    return importlib.import_module(f"{__name__}.{op}")
