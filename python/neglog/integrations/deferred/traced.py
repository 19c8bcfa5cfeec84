"""Logits that are not made, for torch.compile.

Dynamo builds no tensor of another class inside a graph, but it follows the __torch_function__ of
any object. So this is no tensor: it is what stands in a graph between a head and its loss, and what
a compiled model returns as its logits, which then makes them for whatever reads them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neglog.losses.linear_cross_entropy import linear_cross_entropy

# What a reader of a compiled model's logits may ask without a number of them.
OPERATORS = (
    "__sub__", "__rsub__", "__radd__", "__rtruediv__", "__pow__", "__neg__", "__matmul__",
    "__gt__", "__ge__", "__lt__", "__le__", "__eq__", "__ne__", "__len__", "__iter__", "__float__",
    "__int__", "__bool__", "__array__", "__format__", "__contains__", "__invert__", "__abs__",
)  # fmt: skip


class TracedLogits:
    """cap * tanh(scale * (hidden @ weight.T + bias) / cap); scale * (...) without a cap."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype,
        scale: float = 1.0, cap: float | None = None, version: int | None = None,
    ) -> None:  # fmt: skip
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.dtype, self.scale, self.cap = dtype, scale, cap
        self.version = weight._version if version is None else version

    def but(self, **changes: Any) -> TracedLogits:
        """With another value of an attribute."""
        given = {
            "hidden": self.hidden, "weight": self.weight, "bias": self.bias, "dtype": self.dtype,
            "scale": self.scale, "cap": self.cap, "version": self.version,
        }  # fmt: skip
        return TracedLogits(**{**given, **changes})

    def made(self) -> Tensor:
        """The logits as a tensor."""
        if not torch.compiler.is_compiling() and self.weight._version != self.version:
            raise RuntimeError(
                "logits: the head's weight was changed in place after the forward (by an "
                "optimizer's step?), and the logits had not been made; read them before"
            )
        logits = F.linear(self.hidden, self.weight, self.bias)
        logits = logits if self.scale == 1.0 else logits * self.scale
        logits = logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap
        return logits.to(self.dtype)

    def __getattr__(self, name: str) -> Any:
        """Anything else that a tensor has."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.made(), name)

    # Questions that need no numbers

    @property
    def shape(self) -> Any:
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def ndim(self) -> int:
        return self.hidden.ndim

    def dim(self) -> int:
        return self.hidden.dim()

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    # Changes that the loss can follow

    def float(self) -> TracedLogits:
        return self.to(torch.float32)

    def to(self, *where: Any, **how: Any) -> Any:
        dtype = where[0] if len(where) == 1 and isinstance(where[0], torch.dtype) else None
        here = len(where) == 1 and isinstance(where[0], torch.device) and where[0] == self.device
        if here and not how:
            return self
        if dtype is None or how or torch.finfo(dtype).eps > torch.finfo(self.dtype).eps:
            return self.made().to(*where, **how)
        return self.but(dtype=dtype)

    def contiguous(self) -> TracedLogits:
        return self

    def view(self, *shape: Any) -> Any:
        if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
            shape = tuple(shape[0])
        if shape and not isinstance(shape[0], torch.dtype) and shape[-1] == self.weight.shape[0]:
            return self.but(hidden=self.hidden.reshape(*shape[:-1], self.hidden.shape[-1]))
        return self.made().reshape(*shape)

    reshape = view

    def __getitem__(self, index: Any) -> Any:
        given = index if isinstance(index, tuple) else (index,)
        plain = all(isinstance(i, (int, slice)) or i is Ellipsis for i in given)
        ellipsis = any(i is Ellipsis for i in given)
        all_classes = isinstance(given[-1], slice) and given[-1] == slice(None)
        if plain and all_classes and (ellipsis or len(given) == self.ndim):
            return self.but(hidden=self.hidden[given])
        if plain and not ellipsis and len(given) < self.ndim:
            return self.but(hidden=self.hidden[given])
        return self.made()[index]

    def _times(self, factor: Any) -> Any:
        if not isinstance(factor, (int, float)) or factor <= 0:
            return self.made() * factor
        cap = None if self.cap is None else self.cap * factor
        return self.but(scale=self.scale * factor, cap=cap)

    def __mul__(self, factor: Any) -> Any:
        return self._times(factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Any:
        if not isinstance(divisor, (int, float)) or divisor <= 0:
            return self.made() / divisor
        return self._times(1 / divisor)

    def tanh(self) -> Any:
        if self.cap is not None:
            return self.made().tanh()
        return self.but(cap=1.0)

    def __add__(self, other: Any) -> Any:
        bias = isinstance(other, Tensor) and other.shape == self.weight.shape[:1]
        if not bias or self.cap is not None or self.scale != 1.0 or other.dtype != self.dtype:
            return self.made() + other
        return self.but(bias=other if self.bias is None else self.bias + other)

    def cross_entropy(
        self, target: Any, weight: Any = None, size_average: Any = None, ignore_index: int = -100,
        reduce: Any = None, reduction: Any = "mean", label_smoothing: Any = 0.0,
    ) -> Tensor:  # fmt: skip
        """torch.nn.functional.cross_entropy of the logits."""
        labels = isinstance(target, Tensor) and target.dtype == torch.int64
        if self.ndim != 2 or not labels or size_average is not None or reduce is not None:
            return F.cross_entropy(
                self.made(), target, weight, size_average, ignore_index, reduce, reduction,
                label_smoothing,
            )  # fmt: skip
        return linear_cross_entropy(
            self.hidden, self.weight, target, linear_bias=self.bias, weight=weight,
            ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
            logit_scale=self.scale, softcap=self.cap, loss_dtype=self._loss_dtype(),
        )  # fmt: skip

    def _loss_dtype(self) -> torch.dtype:
        """torch's: the logits' own, float32 of 16 bits under autocast."""
        autocast = torch.is_autocast_enabled(self.device.type)
        return torch.float32 if self.dtype.itemsize == 2 and autocast else self.dtype

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, TracedLogits):
            if func is F.cross_entropy:
                return first.cross_entropy(*args[1:], **kwargs)
            if func is torch.tanh:
                return first.tanh()
        real = [x.made() if isinstance(x, TracedLogits) else x for x in args]
        real_by_name = {
            k: x.made() if isinstance(x, TracedLogits) else x for k, x in kwargs.items()
        }
        return func(*real, **real_by_name)


def _operator(name: str) -> Any:
    def operator(self: TracedLogits, *others: Any) -> Any:
        return getattr(self.made(), name)(*others)

    return operator


for _name in OPERATORS:
    setattr(TracedLogits, _name, _operator(_name))
TracedLogits.__hash__ = object.__hash__  # type: ignore[method-assign]
