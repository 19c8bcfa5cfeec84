"""neglog's CPU kernels, on NumPy arrays. Needs no torch.

    nll_forward, nll_backward, nll_forward_backward    log-softmax and negative log-likelihood
    kl_forward, kl_forward_backward                    a student's divergence from a teacher
    pairs_forward, pairs_backward                      log-sum-exps of rows and columns, contrastive
    load, available, isa_builds, isa_level             which kernels run here, and why others do not

Importing this package imports neither torch, Numba nor a kernel: the first call does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from neglog.kernels.builds import (
    BACKENDS,
    ISA_LEVELS,
    Build,
    available,
    isa_builds,
    isa_level,
    load,
)

__all__ = [
    "BACKENDS",
    "ISA_LEVELS",
    "KL",
    "NLL",
    "Build",
    "Pairs",
    "available",
    "isa_builds",
    "isa_level",
    "kl_forward",
    "kl_forward_backward",
    "load",
    "nll_backward",
    "nll_forward",
    "nll_forward_backward",
    "pairs_backward",
    "pairs_forward",
]

if TYPE_CHECKING:
    from neglog.kernels.numpy.kl import KL, kl_forward, kl_forward_backward
    from neglog.kernels.numpy.nll import NLL, nll_backward, nll_forward, nll_forward_backward
    from neglog.kernels.numpy.pairs import Pairs, pairs_backward, pairs_forward
else:
    # Imported when first used, because they import NumPy.
    _MODULES = {
        "KL": "neglog.kernels.numpy.kl",
        "kl_forward": "neglog.kernels.numpy.kl",
        "kl_forward_backward": "neglog.kernels.numpy.kl",
        "NLL": "neglog.kernels.numpy.nll",
        "nll_backward": "neglog.kernels.numpy.nll",
        "nll_forward": "neglog.kernels.numpy.nll",
        "nll_forward_backward": "neglog.kernels.numpy.nll",
        "Pairs": "neglog.kernels.numpy.pairs",
        "pairs_backward": "neglog.kernels.numpy.pairs",
        "pairs_forward": "neglog.kernels.numpy.pairs",
    }

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
