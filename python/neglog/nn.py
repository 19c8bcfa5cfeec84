"""The losses as modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neglog.functional import cross_entropy, masked_cross_entropy
from neglog.linear import linear_cross_entropy


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
            f"softcap={self.softcap}, z_loss={self.z_loss}, "
            f"inplace_backward={self.inplace_backward}, return_stats={self.return_stats}, "
            f"backend={self.backend!r}"
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


class LinearCrossEntropyLoss(torch.nn.LinearCrossEntropyLoss):
    """torch.nn.LinearCrossEntropyLoss by neglog.linear_cross_entropy; its parameter is `linear`.

    Called with input (..., in_features) and target; `mask` and `num_items` by keyword.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        shift: bool = False,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        return_stats: bool = False,
        backend: str | None = None,
        options: Any = None,
        **torch_options: Any,
    ) -> None:
        super().__init__(in_features, num_classes, **torch_options)
        self.options = options
        self.further: dict[str, Any] = {
            "shift": shift, "logit_scale": logit_scale, "softcap": softcap, "z_loss": z_loss,
            "return_stats": return_stats, "backend": backend,
        }  # fmt: skip

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Any:
        classes = (self.num_classes, *self.out_features)
        bias = self.linear.bias
        return linear_cross_entropy(
            input,
            self.linear.weight.view(*classes, -1),
            target,
            linear_bias=None if bias is None else bias.view(classes),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            mask=mask,
            num_items=num_items,
            **self.further,
        )
