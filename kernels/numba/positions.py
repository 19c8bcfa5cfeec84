"""Logits (B, V, P) for the Numba version of nll: copied to rows (B * P, V), and the gradient back.

The compiled version reads them where they are (cython/positions.hpp). Here to compile a kernel of
its own would take longer than many copies.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of the kernels' dtypes, by size: NumPy has no bfloat16.
_TYPES = (np.float32, np.float64, np.uint16, np.uint16)


def takes_layout(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of rows that takes the `layout` of nll.pyx as one more argument."""
    names = tuple(signature(function).parameters)

    @wraps(function)
    def call(*given: Any) -> Any:
        if len(given) == len(names) or given[-1] is None:
            return function(*given[: len(names)])
        return _over_copies(function, dict(zip(names, given, strict=False)), given[-1])

    return call


def _over_copies(function: Callable[..., Any], a: dict[str, Any], layout: tuple[int, ...]) -> Any:
    positions, *axes = layout
    dtype = np.dtype(_TYPES[a["dtype"]])
    shape = (a["rows"] // positions if positions else 0, a["vocab"], positions)

    def array(name: str, axis: int) -> NDArray[Any]:
        strides = (a[f"{name}_stride"], axes[axis], axes[axis + 1])
        return array_at(a[name], dtype, shape, strides).swapaxes(1, 2)

    def as_rows(array: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(array).reshape(shape[0] * positions, shape[1])

    by_rows, copies = dict(a), []
    for axis, name in enumerate(("logits", "probs")):
        if a[name] != 0:
            copies.append(as_rows(array(name, 2 * axis)))
            by_rows |= {name: copies[-1].ctypes.data, f"{name}_stride": shape[1]}
    if "out" not in a:
        return function(*by_rows.values())
    gradient = np.empty((a["rows"], a["vocab"]), dtype)
    by_rows |= {"out": gradient.ctypes.data, "out_stride": shape[1]}
    result = function(*by_rows.values())
    out = array("out", 4)
    out[...] = gradient.reshape(out.shape)
    return result


def array_at(
    address: int, dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...]
) -> NDArray[Any]:
    """An array over memory that is not Python's; strides in numbers."""
    if 0 in shape:
        return np.empty(shape, dtype)
    reach = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    memory: Any = (ctypes.c_char * (reach * dtype.itemsize)).from_address(address)
    return np.ndarray(shape, dtype, memory, strides=tuple(dtype.itemsize * x for x in strides))
