"""The CUDA kernels where there is no GPU: compiled for the CPU, as torch.ops.neglog_emulated."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from neglog.ops import nll, pairs_tile

SOURCES = Path(__file__).parents[1] / "csrc"
AVAILABLE = shutil.which(os.environ.get("CXX", "g++")) is not None
_definitions = torch.library.Library("neglog_emulated", "DEF")


@cache
def operators(out: Path) -> Any:
    """The ops, compiled into the folder `out`."""
    subprocess.run(
        [SOURCES / "emulate.sh", out], check=True, env={**os.environ, "PYTHON": sys.executable}
    )
    for schema in (*nll.SCHEMAS, *pairs_tile.SCHEMAS):
        _definitions.define(schema)
    torch.ops.load_library(str(out / "neglog_emulated.so"))
    return torch.ops.neglog_emulated
