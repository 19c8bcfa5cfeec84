"""The CUDA kernels where there is no GPU: compiled for the CPU, as torch.ops.neglog_emulated."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from neglog.ops.kl import schema as kl
from neglog.ops.nll import schema as nll
from neglog.ops.pairs import schema as pairs

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"
COMPILER = os.environ.get("CXX", "g++")
AVAILABLE = shutil.which(COMPILER) is not None
_definitions = torch.library.Library("neglog_emulated", "DEF")


def _folder() -> Path:
    """For what these sources, this compiler and this torch make."""
    found = hashlib.sha256(f"{COMPILER} {torch.__version__} {sys.version}".encode())
    for path in sorted(SOURCES.rglob("*")):
        if path.is_file():
            found.update(path.read_bytes())
    return ROOT / "build" / f"emulated-{found.hexdigest()[:16]}"


def _compiled() -> Path:
    """The library. To compile it takes half a minute, so it is kept, and made by one process."""
    folder = _folder()
    folder.parent.mkdir(exist_ok=True)
    made = folder / "neglog_emulated.so"
    with open(folder.parent / "emulated.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            for other in folder.parent.glob("emulated-*"):
                shutil.rmtree(other)
            part = folder.with_suffix(".part")
            subprocess.run(
                [SOURCES / "emulator" / "emulate.sh", part],
                check=True,
                env={**os.environ, "PYTHON": sys.executable},
            )
            part.rename(folder)
    return made


@cache
def operators() -> Any:
    """The ops, defined and loaded."""
    library = _compiled()
    for op in (*nll.ON_CUDA, *kl.ON_CUDA, *pairs.CUDA_TILE):
        _definitions.define(op.schema)
    torch.ops.load_library(str(library))
    return torch.ops.neglog_emulated
