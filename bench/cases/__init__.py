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
    suites: dict[str, tuple[Shape, ...]]


def shapes(names: tuple[str, ...], *sizes: tuple[int, ...]) -> tuple[Shape, ...]:
    """Those sizes, each with the names of its dimensions."""
    return tuple(dict(zip(names, size, strict=True)) for size in sizes)


ROWS = ("rows", "vocab")
HEAD = ("rows", "features", "vocab")
PAIRS = ("rows", "features")
IMAGES = ("images", "classes", "height", "width")

# A table for each shape, and one row a shape.
LONG, BRIEF = ("large", "memory"), ("small", "classes")
SUITES = {
    "large": "sizes of training",
    "memory": "four sizes of logits, whose unit is a copy of them in the same run",
    "small": "calls whose fixed cost decides",
    "classes": "few classes, and images whose class axis is not the last",
}
_SMALL_PAIRS = shapes(PAIRS, (8, 16), (8, 128), (32, 128), (64, 384), (128, 512), (256, 512))
_SMALL_VIEWS = shapes(PAIRS, (16, 16), (16, 128), (64, 128), (128, 384), (256, 512))

OPS = {
    "clip_loss": Op(
        {"rows": 8192, "features": 512},
        {"large": shapes(PAIRS, (8192, 512), (32768, 256)), "small": _SMALL_PAIRS},
    ),
    "cross_entropy": Op(
        {"rows": 2048, "vocab": 32000},
        {
            "large": shapes(ROWS, (8192, 8192), (2048, 32000), (2048, 50257), (1024, 128256)),
            "memory": shapes(ROWS, (2048, 32000), (8192, 8192), (1024, 50257), (512, 128256)),
            "small": shapes(ROWS, (1, 2), (8, 10), (32, 100), (64, 1000), (128, 1000), (512, 1000)),
            "classes": (
                *shapes(ROWS, (200_000, 2), (100_000, 3), (20_000, 21), (8000, 77)),
                *shapes(IMAGES, (4, 19, 128, 128), (2, 150, 96, 96)),
            ),
        },
    ),
    "info_nce": Op(
        {"rows": 8192, "features": 512},
        {"large": shapes(PAIRS, (8192, 512), (4096, 768)), "small": _SMALL_PAIRS},
    ),
    "kl_div": Op(
        {"rows": 2048, "vocab": 32000},
        {
            "large": shapes(ROWS, (8192, 8192), (2048, 32000), (512, 128256)),
            "small": shapes(ROWS, (8, 10), (64, 1000), (512, 1000)),
        },
    ),
    "kl_div_top_k": Op(
        {"rows": 2048, "vocab": 32000},
        {
            "large": shapes(ROWS, (8192, 8192), (2048, 32000), (1024, 128256)),
            "small": shapes(ROWS, (8, 10), (64, 1000), (512, 1000)),
        },
    ),
    "linear_cross_entropy": Op(
        {"rows": 2048, "features": 768, "vocab": 32000},
        {
            "large": shapes(HEAD, (2048, 768, 32000), (8192, 256, 65536)),
            "small": shapes(HEAD, (8, 16, 10), (64, 64, 1000), (512, 64, 1000)),
        },
    ),
    "linear_kl_div": Op(
        {"rows": 2048, "features": 768, "vocab": 32000},
        {
            "large": shapes(HEAD, (2048, 768, 32000), (4096, 256, 65536)),
            "small": shapes(HEAD, (8, 16, 10), (64, 64, 1000), (512, 64, 1000)),
        },
    ),
    "linear_token_logprobs": Op(
        {"rows": 2048, "features": 768, "vocab": 32000},
        {
            "large": shapes(HEAD, (2048, 768, 32000), (4096, 256, 65536)),
            "small": shapes(HEAD, (8, 16, 10), (64, 64, 1000), (512, 64, 1000)),
        },
    ),
    "masked_cross_entropy": Op(
        {"rows": 4096, "vocab": 30522},
        {
            "large": shapes(ROWS, (4096, 30522), (8192, 8192)),
            "small": shapes(ROWS, (8, 10), (64, 1000), (512, 1000)),
        },
    ),
    "nt_xent": Op(
        {"rows": 8192, "features": 256},
        {"large": shapes(PAIRS, (8192, 256), (4096, 128)), "small": _SMALL_VIEWS},
    ),
    "siglip_loss": Op(
        {"rows": 8192, "features": 512},
        {"large": shapes(PAIRS, (8192, 512), (4096, 768)), "small": _SMALL_PAIRS},
    ),
    "sup_con": Op(
        {"rows": 4096, "features": 128},
        {"large": shapes(PAIRS, (4096, 128), (2048, 256)), "small": _SMALL_VIEWS},
    ),
    "token_logprobs": Op(
        {"rows": 2048, "vocab": 32000},
        {
            "large": shapes(ROWS, (8192, 8192), (2048, 32000), (1024, 128256)),
            "small": shapes(ROWS, (8, 10), (64, 1000), (512, 1000)),
        },
    ),
}


def load(op: str) -> Any:
    """The case module of a loss."""
    return importlib.import_module(f"{__name__}.{op}")
