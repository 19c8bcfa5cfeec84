"""Checks of embeddings, of what they are compared by, and of the ids of their rows."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from neglog import torch_state
from neglog.checks import (
    check_dense,
    check_flags,
    check_has_number,
    check_real_dtype,
    check_reduction,
    fits,
    multiplied_alike,
    shown,
)

# In which embeddings are multiplied; torch multiplies no others, such as float8, into losses.
EMBEDDINGS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Below this, 1 / temperature overflows float32.
SMALLEST_TEMPERATURE = 3e-39


def check_embeddings(same_rows: bool = True, /, **named: Any) -> None:
    """Embeddings (N, D) that are to be compared: of the first's dtype, device, D and, with
    same_rows, N."""
    (first_name, first), *_ = named.items()
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
        if x.dim() != 2:
            raise RuntimeError(f"{name}: expected shape (N, D), got {list(x.shape)}")
        if x.dtype not in EMBEDDINGS:
            raise RuntimeError(
                f"{name}: expected dtype float32, float64, bfloat16 or float16, got {x.dtype}"
            )
        check_dense(name, x)
        if x.device != first.device:
            raise RuntimeError(f"{name}: expected device {first.device}, got {x.device}")
        if x.dtype != first.dtype and not multiplied_alike(x, first):
            raise RuntimeError(f"{name}: expected dtype {first.dtype}, got {x.dtype}")
        if x.shape[1] != first.shape[1]:
            raise RuntimeError(
                f"{name}: expected {first.shape[1]} features, those of {first_name}, "
                f"got {list(x.shape)}"
            )
        if same_rows and x.shape[0] != first.shape[0]:
            raise RuntimeError(
                f"{name}: expected {first.shape[0]} rows, those of {first_name}, "
                f"got {list(x.shape)}"
            )


def check_comparison(
    temperature: Any, reduction: Any, normalize: Any, /, per_sample: bool = False,
    same_rows: bool = True, **named: Any,
) -> None:  # fmt: skip
    """What every loss of embeddings takes; per_sample: a temperature for each row too."""
    check_embeddings(same_rows, **named)
    check_reduction(reduction)
    check_flags(normalize=normalize)
    (first, *_) = named.values()
    check_temperature(temperature, first.shape[0], per_sample)
    check_has_number("temperature", temperature, first)


def check_temperature(temperature: Any, rows: int, per_sample: bool) -> None:
    """A number above 0, or a tensor of them: one, or one for each row."""
    expected = "a number above 0"
    if not isinstance(temperature, Tensor):
        if not isinstance(temperature, numbers.Real | torch.SymFloat | torch.SymInt):
            raise TypeError(f"temperature: expected {expected}, got {type(temperature).__name__}")
        number: Any = temperature  # numbers.Real has no comparison that types know
        if not (number > SMALLEST_TEMPERATURE and fits(number, torch.float64)):
            raise ValueError(f"temperature: expected {expected}, got {shown(temperature)}")
        return
    shape = list(temperature.shape)
    if shape not in ([], [1]) and not (per_sample and shape == [rows]):
        shapes = f"[] or [{rows}]" if per_sample else "[]"
        raise RuntimeError(f"temperature: expected shape {shapes}, got {shape}")
    check_real_dtype("temperature", temperature)
    for value in extremes(temperature):
        if not SMALLEST_TEMPERATURE < value < math.inf:
            raise ValueError(f"temperature: expected numbers above 0, got {value}")


def check_scalar(name: str, value: Any, like: Tensor) -> None:
    """A number or a tensor of one, whose gradient is given."""
    check_has_number(name, value, like)
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dim() > 1:
            raise RuntimeError(f"{name}: expected shape [], got {list(value.shape)}")
        check_real_dtype(name, value)
        return
    check_real(name, value)


def check_finite(name: str, value: Any) -> None:
    """Of a number, and of a tensor where it can be read."""
    for found in extremes(value):
        if not fits(found, torch.float64):
            raise ValueError(f"{name}: expected a finite number, got {shown(found)}")


def check_real(name: str, value: Any) -> None:
    if not isinstance(value, numbers.Real | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{name}: expected a number or a Tensor, got {type(value).__name__}")


def check_shape(name: str, x: Tensor, shapes: list[list[int]]) -> None:
    """One of some."""
    # Not `in`, nor str() of a list: torch.compile finds no fixed size among symbolic ones by the
    # one, and does not trace the other.
    if not any(list(x.shape) == shape for shape in shapes):
        expected = " or ".join([f"{shape}" for shape in shapes])
        raise RuntimeError(f"{name}: expected shape {expected}, got {list(x.shape)}")


def extremes(x: Any) -> tuple[Any, ...]:
    """The least and the greatest number of a tensor, NaN both if one is; none where to read them
    would wait for a device, or break the graph that is being compiled. A number itself."""
    if not isinstance(x, Tensor):
        return (x,)
    if not torch_state.readable(x) or not x.numel():
        return ()
    if x.numel() == 1:  # a few microseconds less
        return (float(x.detach()),)
    low, high = x.detach().double().aminmax()  # which unsigned dtypes do not have
    return float(low), float(high)


def check_groups(name: str, groups: Any, like: Tensor) -> None:
    """Ids or labels (N,), integers, of the rows of `like`."""
    check_integers(name, groups, like)
    if groups.dim() != 1 or groups.shape[0] != like.shape[0]:
        raise RuntimeError(f"{name}: expected shape [{like.shape[0]}], got {list(groups.shape)}")


def check_integers(name: str, x: Any, like: Tensor) -> None:
    """Integers of any shape, where `like` is."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool:
        raise RuntimeError(f"{name}: expected integers, got {x.dtype}")
    if x.dtype == torch.uint64:  # whose largest would be other ids as int64, -1 among them
        raise RuntimeError(f"{name}: expected integers that int64 holds, got {x.dtype}")
    check_dense(name, x)
    if x.device != like.device:
        raise RuntimeError(f"{name}: expected device {like.device}, got {x.device}")
