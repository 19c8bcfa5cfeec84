"""Checks of arguments: torch's own error types, and messages that name argument, expected, got."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_probabilities(input: Tensor, target: Tensor) -> bool:
    """Whether torch reads the target as a distribution over classes: it has the input's shape."""
    return target.shape == input.shape


def class_dim(input: Tensor) -> int:
    return 0 if input.dim() == 1 else 1


def row_shape(input: Tensor) -> tuple[int, ...]:
    """The shape of the losses: the input's without the class axis."""
    axis = class_dim(input)
    return tuple(input.shape[:axis]) + tuple(input.shape[axis + 1 :])


def to_rows(x: Tensor) -> Tensor:
    """(C), (N, C) or (N, C, d1, ..., dK) as rows (N, C); a view where the strides allow it."""
    if x.dim() == 1:
        return x.unsqueeze(0)
    if x.dim() == 2:
        return x
    return x.movedim(1, -1).flatten(0, -2)


def under_autocast(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)


def check_cross_entropy(
    input: Any,
    target: Any,
    weight: Any,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> None:
    """Everything about the arguments but the values of the target."""
    for name, value in (("input", input), ("target", target)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    check_options(ignore_index, reduction, label_smoothing)
    if input.device != target.device:
        raise RuntimeError(f"target: expected device {input.device}, got {target.device}")
    if not input.dtype.is_floating_point:
        raise NotImplementedError(f"input: expected a floating-point dtype, got {input.dtype}")
    if is_probabilities(input, target):
        _check_probabilities(target, ignore_index)
    if input.dim() == 0:
        raise IndexError("input: expected shape (C), (N, C) or (N, C, d1, ...), got a scalar")
    if not is_probabilities(input, target):
        _check_indices(input, target)
    if weight is not None:
        _check_weight(input, target, weight)


def check_options(ignore_index: Any, reduction: Any, label_smoothing: Any) -> None:
    if not isinstance(ignore_index, int | torch.SymInt):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
    if not isinstance(label_smoothing, float | int | torch.SymFloat):
        raise TypeError(f"label_smoothing: expected a float, got {type(label_smoothing).__name__}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing: expected 0 <= value <= 1, got {label_smoothing}")


def _check_probabilities(target: Tensor, ignore_index: int) -> None:
    if not target.dtype.is_floating_point:
        raise RuntimeError(
            f"target: expected a floating-point dtype for the input's shape {_shape(target)} "
            f"(class probabilities), got {target.dtype}"
        )
    if ignore_index >= 0:
        raise RuntimeError(
            f"ignore_index: expected none with class probabilities as target, got {ignore_index}"
        )


def _check_indices(input: Tensor, target: Tensor) -> None:
    expected = list(row_shape(input))
    accepted = (expected, [1]) if input.dim() == 1 else (expected,)
    if _shape(target) not in accepted:
        # torch has a ValueError for batches that differ and a RuntimeError for all other shapes.
        batches_differ = input.dim() <= 2 and target.dim() <= input.dim() and target.dim() <= 1
        raise (ValueError if batches_differ else RuntimeError)(
            f"target: expected shape {expected} (class indices) or {_shape(input)} (class "
            f"probabilities) for input of shape {_shape(input)}, got {_shape(target)}"
        )
    _check_index_dtype(target)


def _check_index_dtype(target: Tensor) -> None:
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(
            f"target: expected dtype torch.int64 or torch.uint8 for class indices, "
            f"got {target.dtype}"
        )


def _check_weight(input: Tensor, target: Tensor, weight: Any) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a Tensor or None, got {type(weight).__name__}")
    classes = input.shape[class_dim(input)]
    if weight.dim() != 1 or weight.shape[0] != classes:
        raise RuntimeError(f"weight: expected shape [{classes}], got {_shape(weight)}")
    if weight.device != input.device:
        raise RuntimeError(f"weight: expected device {input.device}, got {weight.device}")
    converts = is_probabilities(input, target) or under_autocast(input)
    if not weight.dtype.is_floating_point or (weight.dtype != input.dtype and not converts):
        raise RuntimeError(f"weight: expected dtype {input.dtype}, got {weight.dtype}")


def check_masked(input: Any, target: Any, mask: Any) -> None:
    """Shapes and dtypes of a loss whose class axis is the last and whose positions are masked."""
    for name, value in (("input", input), ("target", target), ("mask", mask)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if input.dim() < 1:
        raise IndexError("input: expected shape (..., C), got a scalar")
    positions = list(input.shape[:-1])
    if target.shape != input.shape and _shape(target) != positions:
        raise RuntimeError(
            f"target: expected shape {positions} (class indices) or {_shape(input)} (class "
            f"probabilities) for input of shape {_shape(input)}, got {_shape(target)}"
        )
    if target.shape != input.shape:
        _check_index_dtype(target)
    if mask.dtype != torch.bool:
        raise RuntimeError(f"mask: expected dtype torch.bool, got {mask.dtype}")
    if mask.device != input.device:
        raise RuntimeError(f"mask: expected device {input.device}, got {mask.device}")
    check_mask_shape(mask, positions)


def check_mask_shape(mask: Tensor, positions: list[int]) -> None:
    fits = mask.dim() <= len(positions) and all(
        size in (1, whole)
        for size, whole in zip(reversed(mask.shape), reversed(positions), strict=False)
    )
    if not fits:
        raise RuntimeError(
            f"mask: expected shape {positions} or one that broadcasts to it, got {_shape(mask)}"
        )


def check_range(input: Tensor, target: Tensor, ignore_index: int) -> None:
    """Raise IndexError, naming value and row, for the first index outside the classes."""
    if is_probabilities(input, target) or target.device.type != "cpu":
        return
    classes = input.shape[class_dim(input)]
    index = target.reshape(-1)
    bad = (index != ignore_index) & ((index < 0) | (index >= classes))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise IndexError(
            f"target {int(index[row])} at row {row} is out of range: "
            f"expected 0 <= target < {classes}"
        )


def check_extensions(reduction: str, softcap: float | None, num_items: int | Tensor | None) -> None:
    """What neglog adds to torch's arguments."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a number above 0 or None, got {softcap}")
    if num_items is None:
        return
    if reduction == "none":
        raise ValueError("num_items: expected reduction 'mean' or 'sum', got 'none'")
    if isinstance(num_items, Tensor) and num_items.numel() != 1:
        raise ValueError(f"num_items: expected one number, got shape {_shape(num_items)}")
