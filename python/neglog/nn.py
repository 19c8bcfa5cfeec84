"""The losses as modules."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import torch
from torch import Tensor

from neglog.losses.clip import clip_loss, siglip_loss
from neglog.losses.cross_entropy import cross_entropy, masked_cross_entropy
from neglog.losses.info_nce import info_nce
from neglog.losses.linear_cross_entropy import linear_cross_entropy
from neglog.losses.nt_xent import dcl, nt_xent
from neglog.losses.sup_con import sup_con


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
        """options: the further ones of `CrossEntropyLoss`."""
        for name in ("ignore_index", "size_average", "reduce"):
            if name in options:
                raise TypeError(f"{name}: expected none, as the mask says what counts")
        super().__init__(weight, reduction=reduction, label_smoothing=label_smoothing, **options)

    def extra_repr(self) -> str:
        return super().extra_repr().partition(", ")[2]  # without ignore_index

    def forward(  # type: ignore[override]
        self, input: Tensor, target: Tensor, mask: Tensor, num_items: int | Tensor | None = None
    ) -> Any:
        return masked_cross_entropy(input, target, mask, **self._options(num_items))


class _Head(torch.nn.modules.loss._WeightedLoss):
    """What torch.nn.LinearCrossEntropyLoss holds, for a torch that has none: before 2.13."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"weight: expected ({num_classes},), got {tuple(weight.shape)}")
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(f"label_smoothing: expected 0 to 1, got {label_smoothing}")
        super().__init__(weight, reduction=reduction)
        self.num_classes, self.out_features = num_classes, out_features
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        rows = num_classes * math.prod(out_features)
        self.linear = torch.nn.Linear(in_features, rows, bias=bias, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        names = ("num_classes", "out_features", "reduction", "ignore_index", "label_smoothing")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


_Torchs: Any = getattr(torch.nn, "LinearCrossEntropyLoss", _Head)


class LinearCrossEntropyLoss(_Torchs):
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

    def extra_repr(self) -> str:
        further = (f"{name}={value!r}" for name, value in self.further.items())
        return ", ".join([super().extra_repr(), *further])

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
            self.linear.weight.view(*classes, self.linear.in_features),
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


class _ContrastiveLoss(torch.nn.Module):
    """A module that keeps the options of a contrastive loss."""

    def __init__(self, function: Any, **options: Any) -> None:
        super().__init__()
        taken = inspect.signature(function).parameters
        for name in options:
            if name not in taken:
                raise TypeError(f"{type(self).__name__}: got an unexpected argument {name!r}")
        self.options = options

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        group = self.options.get("group")
        if group is not None:  # cannot be copied, and the copy belongs to the same processes
            memo[id(group)] = group
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class InfoNCELoss(_ContrastiveLoss):
    """neglog.info_nce as a module, called with query, positive_key and perhaps negative_keys.

    Its options may also be given to the call, where they come first.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        reduction: str = "mean",
        negative_mode: str = "unpaired",
        **options: Any,
    ) -> None:
        super().__init__(info_nce, reduction=reduction, negative_mode=negative_mode, **options)
        self.temperature = temperature  # a Parameter becomes one of this module

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Tensor | None = None,
        **options: Any,
    ) -> Any:
        options = {"temperature": self.temperature, **self.options, **options}
        return info_nce(query, positive_key, negative_keys, **options)


class CLIPLoss(_ContrastiveLoss):
    """neglog.clip_loss as a module, called as open_clip's ClipLoss."""

    def __init__(
        self, *, group: Any = None, options: Any = None, backend: str | None = None
    ) -> None:
        super().__init__(clip_loss, group=group, options=options, backend=backend)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> Tensor:
        return clip_loss(image_features, text_features, logit_scale, logit_bias, **self.options)


class SigLIPLoss(_ContrastiveLoss):
    """neglog.siglip_loss as a module, called as open_clip's SigLipLoss."""

    def __init__(
        self, *, group: Any = None, options: Any = None, backend: str | None = None
    ) -> None:
        super().__init__(siglip_loss, group=group, options=options, backend=backend)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor,
    ) -> Tensor:
        return siglip_loss(image_features, text_features, logit_scale, logit_bias, **self.options)


class _TwoViewLoss(_ContrastiveLoss):
    def __init__(
        self, function: Any, temperature: float | Tensor, reduction: str, options: Any
    ) -> None:
        super().__init__(function, reduction=reduction, **options)
        self.temperature = temperature


class NTXentLoss(_TwoViewLoss):
    """neglog.nt_xent as a module, called with two views z_i, z_j."""

    def __init__(
        self, temperature: float | Tensor = 0.5, reduction: str = "mean", **options: Any
    ) -> None:
        super().__init__(nt_xent, temperature, reduction, options)

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        return nt_xent(z_i, z_j, self.temperature, **self.options)


class DCLLoss(_TwoViewLoss):
    """neglog.dcl as a module, called with two views z_i, z_j."""

    def __init__(
        self, temperature: float | Tensor = 0.1, reduction: str = "mean", **options: Any
    ) -> None:
        super().__init__(dcl, temperature, reduction, options)

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        return dcl(z_i, z_j, self.temperature, **self.options)


class SupConLoss(_TwoViewLoss):
    """neglog.sup_con as a module, called with features and labels."""

    def __init__(
        self, temperature: float | Tensor = 0.1, reduction: str = "mean", **options: Any
    ) -> None:
        super().__init__(sup_con, temperature, reduction, options)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return sup_con(features, labels, self.temperature, **self.options)


class Queue(torch.nn.Module):
    """The last `size` keys pushed, as negatives for `info_nce` (MoCo, arXiv:1911.05722).

    A batch may have any number of rows, the last of an epoch too. The keys are a buffer, so they
    move and are saved with the module; `push` needs no gradient and keeps none. Call both outside
    what torch.compile compiles, and give it the keys: it takes a module's numbers for constants.
    """

    keys: Tensor

    def __init__(
        self, size: int, dim: int, *, dtype: torch.dtype | None = None, device: Any = None
    ) -> None:
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"Queue: expected size and dim of at least 1, got {size} and {dim}")
        self.register_buffer("keys", torch.zeros(size, dim, dtype=dtype, device=device))
        self.filled = 0
        self.next = 0

    def __len__(self) -> int:
        return self.filled

    def forward(self) -> Tensor:
        """(len, D): a copy, since the next push may come before the backward of what used it."""
        return self.keys[: self.filled].clone()

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Take (N, D) in, in place of the oldest.

        Raises RuntimeError for another number of features.
        """
        size, dim = self.keys.shape
        if not isinstance(keys, Tensor):
            raise TypeError(f"keys: expected a Tensor, got {type(keys).__name__}")
        if keys.dim() != 2 or keys.shape[1] != dim:
            raise RuntimeError(f"keys: expected shape (N, {dim}), got {list(keys.shape)}")
        if not keys.dtype.is_floating_point:
            raise RuntimeError(f"keys: expected a floating-point dtype, got {keys.dtype}")
        if keys.untyped_storage().data_ptr() == self.keys.untyped_storage().data_ptr():
            keys = keys.clone()  # its own keys
        keys = keys[-size:]
        rows = keys.shape[0]
        to_end = min(rows, size - self.next)
        self.keys[self.next : self.next + to_end] = keys[:to_end]
        self.keys[: rows - to_end] = keys[to_end:]
        self.next = (self.next + rows) % size
        self.filled = min(size, self.filled + rows)

    def get_extra_state(self) -> dict[str, int]:
        return {"filled": self.filled, "next": self.next}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.filled, self.next = state["filled"], state["next"]

    def extra_repr(self) -> str:
        return f"size={self.keys.shape[0]}, dim={self.keys.shape[1]}"
