"""The nll kernels called for logits (B, V, P) where they lie in memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from neglog import kernels
from neglog.kernels.numpy.nll import DTYPE_CODES


class Result(NamedTuple):
    """By row; of an array (B, V, P) the rows are B * P."""

    loss: NDArray[Any]
    lse: NDArray[Any]
    lse_low: NDArray[Any]
    correct: NDArray[Any]
    entropy: NDArray[Any]
    argmax: NDArray[Any]


def places(order: str, shape: tuple[int, int, int], dtype: Any) -> NDArray[Any]:
    """Memory for (B, V, P): its axes in this order, with numbers between where it says "apart"."""
    axes = ["BVP".index(letter) for letter in order[:3]]
    sizes = [shape[axis] for axis in axes]
    if order.endswith("apart"):
        memory = np.full([2 * size for size in sizes], 7, dtype)[::2, ::2, ::2]
        memory = memory[tuple(slice(size) for size in sizes)]
    else:
        memory = np.full(sizes, 7, dtype)
    return memory.transpose(np.argsort(axes))


def as_rows(x: NDArray[Any]) -> NDArray[Any]:
    return x.transpose(0, 2, 1).reshape(-1, x.shape[1])


def _strides(x: NDArray[Any] | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else tuple(stride // x.itemsize for stride in x.strides)


def _address(x: NDArray[Any] | None) -> int:
    return 0 if x is None else x.ctypes.data


class Call:
    """Logits (B, V, P), a target (B * P,) or (B, V, P), and options as those of the oracle."""

    def __init__(
        self, backend: str, logits: NDArray[Any], target: NDArray[Any], **options: Any
    ) -> None:
        self.kernel = kernels.load("nll", backend)
        self.logits, self.threads = logits, 2
        self.real = np.float64 if logits.dtype == np.float64 else np.float32
        self.probs = target if target.ndim == 3 else None
        self.index = None if target.ndim == 3 else np.ascontiguousarray(target, np.int64)
        weight = options.get("weight")
        self.weight = None if weight is None else np.ascontiguousarray(weight, self.real)
        of_rows = options.get("token_weight")
        self.token_weight = None if of_rows is None else np.ascontiguousarray(of_rows, self.real)
        self.options = options
        self.rows = logits.shape[0] * logits.shape[2]

    def _given(self) -> tuple[Any, ...]:
        option = self.options.get
        return (
            DTYPE_CODES[self.logits.dtype.name], self.rows, self.logits.shape[1],
            _address(self.logits), _strides(self.logits)[0], _address(self.index),
            _address(self.probs), _strides(self.probs)[0], _address(self.weight),
            _address(self.token_weight), option("ignore_index", -100),
            option("label_smoothing", 0.0), option("logit_scale", 1.0), option("softcap") or 0.0,
            option("z_loss", 0.0),
        )  # fmt: skip

    def _layout(self, out: NDArray[Any] | None) -> tuple[int, ...]:
        return (self.logits.shape[2], *_strides(self.logits)[1:], *_strides(self.probs)[1:],
                *_strides(out)[1:])  # fmt: skip

    def _new(self) -> Result:
        loss, lse, low, entropy = (np.empty(self.rows, self.real) for _ in range(4))
        argmax = np.empty(self.rows, np.int64)
        return Result(loss, lse, low, np.empty(self.rows, bool), entropy, argmax)

    def _outputs(self, result: Result, stats: bool) -> tuple[int, ...]:
        loss, lse, low, *of_stats = map(_address, result)
        return (loss, lse, low, *of_stats) if stats else (loss, lse, low, 0, 0, 0)

    def forward(self, stats: bool = True) -> Result:
        result = self._new()
        self.kernel.forward(
            *self._given(), *self._outputs(result, stats), self.threads, self._layout(None)
        )
        return result

    def backward(
        self, grad: NDArray[Any], grad_lse: NDArray[Any] | None, result: Result, out: NDArray[Any],
        grad_entropy: NDArray[Any] | None = None,
    ) -> None:  # fmt: skip
        grad = np.array(grad, self.real)  # () stays ()
        grad_lse, grad_entropy = (
            None if g is None else np.ascontiguousarray(g, self.real)
            for g in (grad_lse, grad_entropy)
        )  # fmt: skip
        self.kernel.backward(
            *self._given(), _address(result.lse), _address(result.lse_low), _address(grad),
            1 if grad.ndim else 0, 1.0, _address(grad_lse), _address(grad_entropy),
            _address(result.entropy), _address(out), _strides(out)[0], self.threads,
            self._layout(out),
        )  # fmt: skip

    def forward_backward(self, scale: float, out: NDArray[Any], stats: bool = True) -> Result:
        result = self._new()
        self.kernel.forward_backward(
            *self._given(), *self._outputs(result, stats), scale, _address(out), _strides(out)[0],
            self.threads, self._layout(out),
        )  # fmt: skip
        return result
