"""Pretraining losses with native kernels, for PyTorch and NumPy.

`neglog.kernels` needs NumPy alone: torch is imported when a torch function is first touched. The
public names, and where each lives, stand in __init__.pyi, which editors and type checkers read too.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def _public_names() -> dict[str, tuple[str, str]]:
    """By public name what the stub imports: a module, and the name in it."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    found: dict[str, tuple[str, str]] = {"dispatch": ("neglog", "availability")}
    for node in stub.body:
        if isinstance(node, ast.ImportFrom):
            found |= {alias.name: (str(node.module), alias.name) for alias in node.names}
    del found["availability"]  # its public name is dispatch
    return found


_HOMES = _public_names()
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'neglog' has no attribute {name!r}")
    home, its_name = _HOMES[name]
    try:
        if home == "neglog":
            value: Any = importlib.import_module(f"neglog.{its_name}")
        else:
            value = getattr(importlib.import_module(home), its_name)
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise ImportError(
                f"neglog.{name} needs PyTorch: pip install 'neglog[torch]' "
                "(neglog.kernels works on NumPy arrays without it)"
            ) from error
        raise
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
