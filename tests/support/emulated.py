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

from neglog.ops.nll import schema as nll
from neglog.ops.pairs import schema as pairs

SOURCES = Path(__file__).parents[2] / "csrc"
AVAILABLE = shutil.which(os.environ.get("CXX", "g++")) is not None
_definitions = torch.library.Library("neglog_emulated", "DEF")


@cache
def operators(out: Path) -> Any:
    """The ops, compiled into the folder `out`."""
    subprocess.run(
        [SOURCES / "emulator" / "emulate.sh", out],
        check=True,
        env={**os.environ, "PYTHON": sys.executable},
    )
    ops = (nll.forward, nll.backward, nll.in_place, nll.scale_in_place, *pairs.CUDA_TILE)
    for op in ops:
        _definitions.define(op.schema)
    torch.ops.load_library(str(out / "neglog_emulated.so"))
    return torch.ops.neglog_emulated
