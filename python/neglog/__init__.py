"""Pretraining losses with native kernels, for PyTorch and NumPy.

`neglog.kernels` needs NumPy alone: torch is imported when a torch function is first touched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives; None where the name is a module.
_HOMES = {
    "LossStats": "losses.cross_entropy",
    "cached_step": "grad_cache",
    "clip_loss": "losses.contrastive",
    "cross_entropy": "losses.cross_entropy",
    "dcl": "losses.contrastive",
    "dispatch": None,
    "info_nce": "losses.contrastive",
    "kernels": None,
    "linear_cross_entropy": "losses.linear_cross_entropy",
    "masked_cross_entropy": "losses.cross_entropy",
    "nn": None,
    "nt_xent": "losses.contrastive",
    "patch_torch": "patch",
    "reference": None,
    "siglip_loss": "losses.contrastive",
    "sup_con": "losses.contrastive",
}
_NEED_TORCH = ("losses", "grad_cache", "nn", "patch")

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from neglog import dispatch, kernels, nn, reference
    from neglog.grad_cache import cached_step
    from neglog.losses.contrastive import clip_loss, dcl, info_nce, nt_xent, siglip_loss, sup_con
    from neglog.losses.cross_entropy import LossStats, cross_entropy, masked_cross_entropy
    from neglog.losses.linear_cross_entropy import linear_cross_entropy
    from neglog.patch import patch_torch


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'neglog' has no attribute {name!r}")
    home = _HOMES[name] or name
    try:
        module = importlib.import_module(f"neglog.{home}")
    except ModuleNotFoundError as error:
        if error.name == "torch" and home.split(".")[0] in _NEED_TORCH:
            raise ImportError(
                f"neglog.{name} needs PyTorch: pip install 'neglog[torch]' "
                "(neglog.kernels works on NumPy arrays without it)"
            ) from error
        raise
    value = module if _HOMES[name] is None else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
