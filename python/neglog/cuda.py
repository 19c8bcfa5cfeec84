"""The CUDA kernels: whether they were built and can run here, and why not."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from neglog.kernels import Build

LIBRARY = Path(__file__).with_name("neglog_cuda.so")
NOT_BUILT = (
    "not built: installing with NEGLOG_CUDA=1 builds it, where nvcc and a CUDA build of torch are"
)


@cache
def state() -> Build:
    """Loads the library if there is one. Asks for no device: a process that has may not fork."""
    import torch

    if torch.version.cuda is None:
        return Build("cuda", False, f"torch {torch.__version__} is built without CUDA")
    if not LIBRARY.is_file():
        return Build("cuda", False, NOT_BUILT)
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return Build("cuda", False, f"{LIBRARY.name} does not load: {error}")
    return Build("cuda", True, f"compiled, for tensors on a GPU; torch's CUDA {torch.version.cuda}")
