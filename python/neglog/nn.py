"""The losses as modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neglog.functional import cross_entropy, masked_cross_entropy


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss by neglog.cross_entropy; takes its further options by keyword.

    Shapes, dtypes and errors as in `neglog.cross_entropy`.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        inplace_backward: bool = False,
        return_stats: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.z_loss = z_loss
        self.inplace_backward = inplace_backward
        self.return_stats = return_stats
        self.backend = backend

    def _options(self, num_items: int | Tensor | None) -> dict[str, Any]:
        return {
            "weight": self.weight, "reduction": self.reduction,
            "label_smoothing": self.label_smoothing, "logit_scale": self.logit_scale,
            "softcap": self.softcap, "z_loss": self.z_loss, "num_items": num_items,
            "inplace_backward": self.inplace_backward, "return_stats": self.return_stats,
            "backend": self.backend,
        }  # fmt: skip

    def forward(self, input: Tensor, target: Tensor, num_items: int | Tensor | None = None) -> Any:
        options = self._options(num_items)
        return cross_entropy(input, target, ignore_index=self.ignore_index, **options)

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"label_smoothing={self.label_smoothing}, logit_scale={self.logit_scale}, "
            f"softcap={self.softcap}, z_loss={self.z_loss}"
        )


class MaskedCrossEntropyLoss(CrossEntropyLoss):
    """neglog.masked_cross_entropy as a module, called with input (..., C), target, mask (...)."""

    def __init__(
        self,
        weight: Tensor | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(weight, reduction=reduction, label_smoothing=label_smoothing, **options)

    def forward(  # type: ignore[override]
        self, input: Tensor, target: Tensor, mask: Tensor, num_items: int | Tensor | None = None
    ) -> Any:
        return masked_cross_entropy(input, target, mask, **self._options(num_items))
