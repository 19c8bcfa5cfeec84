"""The types of arguments that take one of a few values."""

from __future__ import annotations

from typing import Literal, TypeAlias, TypedDict

import torch
from torch import Tensor

Reduction: TypeAlias = Literal["none", "mean", "sum"]
NegativeMode: TypeAlias = Literal["unpaired", "paired", "in_batch"]
Positives: TypeAlias = Tensor | tuple[Tensor, Tensor] | None
Exchange: TypeAlias = Literal["gather", "ring", "detached"]
LogitsDtype: TypeAlias = torch.dtype | Literal["float32"] | None
Backend: TypeAlias = Literal["cython", "numba", "cuda", "torch"]


class WorkspaceOptions(TypedDict, total=False):
    workspace_mb: float


class TileOptions(WorkspaceOptions, total=False):
    filter_eps: float | Literal["auto"]
