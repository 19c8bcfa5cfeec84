"""Workspaces, and the tiles that fit in them: written once, for every op that owns its matmul."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterator

# Measured at 2048 x 768 x 32000 float32: 32, 64 and 128 MB within 5% of each other; below that the
# gradient of the weight, added to once a tile, costs more than the tile.
DEFAULT_WORKSPACE_MB = 64
# On a GPU a thin tile leaves it idle, and two tiles mean a float32 sum as large as the weight, read
# and written by each. 4096 rows of 128256 bfloat16 logits fit. Not measured yet.
CUDA_WORKSPACE_MB = 1024
# Rows of a tile come in multiples of this, so that no GEMM ends in a thin remainder.
ROWS = 64
LINE_BYTES = 128


def workspace_bytes(megabytes: float | None = None, default: float = DEFAULT_WORKSPACE_MB) -> int:
    """The budget for logits: the argument, else NEGLOG_WORKSPACE_MB, else the default.

    Raises TypeError or ValueError if it is not a number above 0.
    """
    source, value = "workspace_mb", megabytes
    if value is None:
        source, text = "NEGLOG_WORKSPACE_MB", os.environ.get("NEGLOG_WORKSPACE_MB")
        try:
            value = float(text) if text else default
        except ValueError:
            raise ValueError(f"{source}: expected a number above 0, got {text!r}") from None
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{source}: expected a number above 0, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{source}: expected a number above 0, got {value}")
    return int(value * (1 << 20))


def rows_per_tile(rows: int, bytes_per_row: int, workspace: int) -> int:
    """How many rows of logits fit in the workspace; a tile's height is at least ROWS."""
    fit = workspace // max(1, bytes_per_row) // ROWS * ROWS
    return min(rows, max(ROWS, fit))


def row_stride(columns: int, itemsize: int) -> int:
    """Numbers from one row of a workspace to the next, so that each begins where a line of the
    cache does: a product and a kernel of 16-byte vectors take odd columns as they take others."""
    lines = -(-columns * itemsize // LINE_BYTES)
    return lines * LINE_BYTES // itemsize


def grid(
    rows: int, columns: int, height: int, width: int, upper: bool = False
) -> Iterator[tuple[slice, slice]]:
    """Tiles that cover rows x columns, along the rows; `upper`: those on or above the diagonal."""
    for down in row_tiles(rows, height):
        for across in row_tiles(columns, width):
            if not upper or across.start >= down.start:
                yield down, across


def row_tiles(rows: int, height: int) -> Iterator[slice]:
    """Slices of up to `height` rows that cover all."""
    for start in range(0, rows, max(1, height)):
        yield slice(start, min(start + height, rows))
