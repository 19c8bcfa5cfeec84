"""Checks of arguments: torch's own error types, and messages that name argument, expected, got."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neglog import torch_state
from neglog.ops.dtypes import real_dtype
from neglog.ops.memory import check_not_freed
from neglog.torch_state import autocast_dtype, under_autocast

# Made once: to join types takes longer than to ask for one of them.
INTEGERS: tuple[Any, ...] = (int, torch.SymInt)
REALS: tuple[Any, ...] = (float, int, torch.SymFloat)
STRIDED = torch.strided
# As aten numbers them.
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


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


def to_positions(x: Tensor) -> Tensor:
    """(C) and (N, C) as rows (N, C); (N, C, d1, ..., dK) as (N, C, P), a view of dense ones."""
    return to_rows(x) if x.dim() <= 2 else x.flatten(2)


def multiplied_alike(x: Tensor, y: Tensor) -> bool:
    """Whether they have one dtype when they are multiplied."""
    return x.dtype == y.dtype or autocast_dtype(x) == autocast_dtype(y)


def rows_of_last_axis(x: Tensor) -> Tensor:
    """(..., C) as (N, C), where C may be 0."""
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def number_on(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number, or a tensor of one, there. A number is filled in where it is wanted: to copy it to
    a GPU would be to wait for what runs on it, which nothing can while a graph is captured."""
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    if torch_state.varies(value):  # torch.full would make a constant of a symbol
        return value * torch.ones((), dtype=dtype, device=device)
    return torch.full((), float(value), dtype=dtype, device=device)  # an int may be beyond int64


def shown(number: Any) -> Any:
    """A number for a message. torch.compile does not trace the formatting of a symbol, and would
    raise an error of its own; Python formats no int of more than 4300 digits."""
    if torch_state.varies(number):
        return "a number that changes from call to call"
    if isinstance(number, int) and abs(number) >= 2**1024:
        return f"an int of {number.bit_length()} bits"
    return number


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)


def check_cross_entropy(
    input: Any,
    target: Any,
    weight: Any,
    ignore_index: int,
) -> bool:
    """Everything about the tensors but the values of the target; whether it is probabilities."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a Tensor, got {type(input).__name__}")
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a Tensor, got {type(target).__name__}")
    if input.device != target.device:
        raise RuntimeError(f"target: expected device {input.device}, got {target.device}")
    if not input.dtype.is_floating_point:
        raise NotImplementedError(f"input: expected a floating-point dtype, got {input.dtype}")
    if input.layout is not STRIDED or target.layout is not STRIDED:  # calls would cost a third more
        check_dense("input", input)
        check_dense("target", target)
    shape, shape_of_target = input.shape, target.shape
    probabilities = shape_of_target == shape
    if probabilities:
        _check_probabilities(target, ignore_index)
    if len(shape) == 0:
        raise IndexError("input: expected shape (C), (N, C) or (N, C, d1, ...), got a scalar")
    if not probabilities:
        if len(shape) != 2 or len(shape_of_target) != 1 or shape[0] != shape_of_target[0]:
            _check_shape_of_indices(input, target)
        check_index_dtype(target)
    if weight is not None:
        check_weight(weight, input.shape[class_dim(input)], input, probabilities)
    return probabilities


def to_options(ignore_index: Any, reduction: Any, label_smoothing: Any) -> tuple[int, float]:
    """ignore_index and label_smoothing as numbers of Python, checked as `reduction` is."""
    check_reduction(reduction)
    return to_ignore_index(ignore_index), to_smoothing(label_smoothing)


def to_ignore_index(value: Any) -> int:
    """As torch takes it: an integer of Python, of NumPy or in a tensor of one; not a bool."""
    number = value if type(value) is int else _to_number(value)
    if not isinstance(number, INTEGERS) or isinstance(number, bool):
        raise TypeError(f"ignore_index: expected an int, got {_type(value)}")
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"ignore_index: expected an int of 64 bits, got {shown(number)}")
    return number


def to_smoothing(value: Any) -> float:
    """As torch takes it: a number of Python, of NumPy or in a tensor of one without gradient."""
    number = value if type(value) is float else _to_number(value)
    if not isinstance(number, REALS):
        raise TypeError(f"label_smoothing: expected a float, got {_type(value)}")
    if not 0.0 <= number <= 1.0:
        raise RuntimeError(f"label_smoothing: expected 0 <= value <= 1, got {shown(number)}")
    return number


def _to_number(value: Any) -> Any:
    """The number that a scalar of NumPy or a tensor holds; anything else as it is."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 and not value.requires_grad else value
    # torch.compile knows a tuple of types and not their union, and the item() of a tensor alone.
    if isinstance(value, (np.generic, np.ndarray)):
        return torch.as_tensor(value).item() if value.ndim == 0 else value
    return value


def _type(value: Any) -> str:
    """A type, for a message; of a tensor, what tells it from one that would be taken."""
    if isinstance(value, Tensor):
        learns = " that requires grad" if value.requires_grad else ""
        return f"a Tensor of {value.dtype} and shape {_shape(value)}{learns}"
    return type(value).__name__


def _check_probabilities(target: Tensor, ignore_index: int) -> None:
    if not target.dtype.is_floating_point:
        raise RuntimeError(
            f"target: expected a floating-point dtype for the input's shape {_shape(target)} "
            f"(class probabilities), got {target.dtype}"
        )
    check_no_ignore_index(ignore_index if ignore_index >= 0 else None)


def check_no_ignore_index(ignore_index: int | None) -> None:
    if ignore_index is not None:
        raise RuntimeError(
            f"ignore_index: expected none with class probabilities as target, got {ignore_index}"
        )


def _check_shape_of_indices(input: Tensor, target: Tensor) -> None:
    expected = list(row_shape(input))
    accepted = (expected, [1]) if input.dim() == 1 else (expected,)
    if _shape(target) not in accepted:
        # torch has a ValueError for batches that differ and a RuntimeError for all other shapes.
        batches_differ = input.dim() <= 2 and target.dim() <= input.dim() and target.dim() <= 1
        hint = ""
        if _shape(target) == _shape(input)[:-1]:
            hint = (
                "; classes are dimension 1, here perhaps the last: input.movedim(-1, 1), or "
                "input.flatten(0, -2) and target.flatten()"
            )
        raise (ValueError if batches_differ else RuntimeError)(
            f"target: expected shape {expected} (class indices) or {_shape(input)} (class "
            f"probabilities) for input of shape {_shape(input)}, got {_shape(target)}{hint}"
        )


def check_index_dtype(target: Tensor) -> None:
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(
            f"target: expected dtype torch.int64 or torch.uint8 for class indices, "
            f"got {target.dtype}"
        )


def check_weight(weight: Any, classes: int, input: Tensor, converts: bool = False) -> None:
    """Class weights (C,); `converts` where torch takes them in any dtype."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a Tensor or None, got {type(weight).__name__}")
    if weight.dim() != 1 or weight.shape[0] != classes:
        raise RuntimeError(f"weight: expected shape [{classes}], got {_shape(weight)}")
    check_dense("weight", weight)
    if weight.device != input.device:
        raise RuntimeError(f"weight: expected device {input.device}, got {weight.device}")
    if converts:
        return
    autocast = weight.dtype.is_floating_point and under_autocast(input)
    if weight.dtype != input.dtype and not autocast:
        raise RuntimeError(f"weight: expected dtype {input.dtype}, got {weight.dtype}")


def check_masked(input: Any, target: Any, mask: Any) -> None:
    """Shapes and dtypes of a loss whose class axis is the last and whose positions are masked."""
    for name, value in (("input", input), ("target", target), ("mask", mask)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
        check_dense(name, value)
    if input.dim() < 1:
        raise IndexError("input: expected shape (..., C), got a scalar")
    positions = list(input.shape[:-1])
    if target.shape != input.shape and _shape(target) != positions:
        raise RuntimeError(
            f"target: expected shape {positions} (class indices) or {_shape(input)} (class "
            f"probabilities) for input of shape {_shape(input)}, got {_shape(target)}"
        )
    if target.shape != input.shape:
        check_index_dtype(target)
    if target.device != input.device:
        raise RuntimeError(f"target: expected device {input.device}, got {target.device}")
    if mask.dtype != torch.bool:
        raise RuntimeError(f"mask: expected dtype torch.bool, got {mask.dtype}")
    if mask.device != input.device:
        raise RuntimeError(f"mask: expected device {input.device}, got {mask.device}")
    check_mask_shape(mask, positions)


def check_index_target(logits: Any, target: Any, mask: Any, shift: Any) -> None:
    """Logits whose class axis is the last, and class indices, mask and shift of their positions."""
    for name, value in (("logits", logits), ("target", target)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
        check_dense(name, value)
    if not logits.dtype.is_floating_point:
        raise NotImplementedError(f"logits: expected a floating-point dtype, got {logits.dtype}")
    if logits.dim() < 1:
        raise IndexError("logits: expected shape (..., C), got a scalar")
    if target.device != logits.device:
        raise RuntimeError(f"target: expected device {logits.device}, got {target.device}")
    check_target_of_positions(list(logits.shape[:-1]), None, target, mask, shift, "C")


def check_linear(
    input: Any, linear_weight: Any, linear_bias: Any, target: Any, mask: Any, shift: Any,
    indices: bool = False,
) -> None:  # fmt: skip
    """Shapes, dtypes and devices of a projection to logits, and of what it is held against.
    indices: the target is of class indices, and linear_weight (C, in_features)."""
    tensors = {"input": input, "linear_weight": linear_weight, "target": target}
    if linear_bias is not None:
        tensors["linear_bias"] = linear_bias
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
        check_dense(name, value)
        if name == "input" and not value.dtype.is_floating_point:
            raise NotImplementedError(f"input: expected a floating-point dtype, got {value.dtype}")
        if value.device != input.device:
            raise RuntimeError(f"{name}: expected device {input.device}, got {value.device}")
        if name != "target" and not multiplied_alike(value, input):
            raise RuntimeError(f"{name}: expected dtype {input.dtype}, got {value.dtype}")
    if input.dim() < 1:
        raise RuntimeError("input: expected shape (..., in_features), got a scalar")
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"linear_weight: expected shape (C, [d1, ..., dK,] in_features), "
            f"got {_shape(linear_weight)}"
        )
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            f"linear_weight: expected in_features {input.shape[-1]}, that of input, as the last "
            f"dimension, got {_shape(linear_weight)}"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(
            f"linear_bias: expected shape {_shape(linear_weight)[:-1]}, got {_shape(linear_bias)}"
        )
    if indices and linear_weight.dim() != 2:
        raise RuntimeError(
            f"linear_weight: expected shape (C, in_features), got {_shape(linear_weight)}"
        )
    if linear_weight.dim() > 2 and input.dim() != 2:
        raise RuntimeError(
            f"input: expected shape (N, in_features) with a K-dimensional linear_weight, "
            f"got {_shape(input)}"
        )
    if linear_weight.dim() == 2:
        positions = list(input.shape[:-1])
        logits = None if indices else [*positions, linear_weight.shape[0]]
        check_target_of_positions(positions, logits, target, mask, shift)
        return
    for name, given in (("mask", mask is not None), ("shift", shift)):
        if given:
            raise RuntimeError(f"{name}: expected none with a K-dimensional linear_weight")


def check_target_of_positions(
    positions: list[int], logits: list[int] | None, target: Tensor, mask: Any, shift: bool,
    last: str = "in_features",
) -> None:  # fmt: skip
    """Index targets (...), or where `logits` is their shape probabilities, and the mask. last: the
    axis of the input behind its positions."""
    if _shape(target) not in (positions, logits):
        # As torch has it: a ValueError for batches that differ.
        batches_differ = len(positions) == target.dim() == 1
        hint = ""
        if shift and positions and _shape(target) == [*positions[:-1], positions[-1] - 1]:
            hint = "; with shift=True pass the targets of all positions, they are shifted here"
        others = "" if logits is None else f" or {logits} (class probabilities)"
        raise (ValueError if batches_differ else RuntimeError)(
            f"target: expected shape {positions} (class indices){others}, "
            f"got {_shape(target)}{hint}"
        )
    if _shape(target) == positions:
        check_index_dtype(target)
    if not isinstance(shift, bool):
        raise TypeError(f"shift: expected a bool, got {type(shift).__name__}")
    if shift and not positions:
        raise RuntimeError(f"shift: expected an input of shape (..., T, {last}), got one vector")
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a Tensor or None, got {type(mask).__name__}")
    check_dense("mask", mask)
    if mask.dtype != torch.bool:
        raise RuntimeError(f"mask: expected dtype torch.bool, got {mask.dtype}")
    if mask.device != target.device:
        raise RuntimeError(f"mask: expected device {target.device}, got {mask.device}")
    check_mask_shape(mask, positions)


def check_mask_shape(mask: Tensor, positions: list[int], name: str = "mask") -> None:
    fits = mask.dim() <= len(positions) and all(
        size in (1, whole)
        for size, whole in zip(reversed(mask.shape), reversed(positions), strict=False)
    )
    if not fits:
        raise RuntimeError(
            f"{name}: expected shape {positions} or one that broadcasts to it, got {_shape(mask)}"
        )


def check_range(input: Tensor, target: Tensor, ignore_index: int) -> None:
    """Raise IndexError, naming value and row, for the first index outside the classes."""
    if is_probabilities(input, target) or target.device.type != "cpu":
        return
    index = target.reshape(-1).long()  # uint8 is compared modulo 256
    check_classes(index, input.shape[class_dim(input)], ignore_index)


def check_classes(index: Tensor, classes: Any, ignore_index: int) -> None:
    """The same of int64 indices (N,), whose values may be read."""
    bad = (index != ignore_index) & ((index < 0) | (index >= classes))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise IndexError(
            f"target {int(index[row])} at row {row} is out of range: "
            f"expected 0 <= target < {classes}"
        )


def check_extensions(
    input: Tensor, reduction: str, logit_scale: Any, softcap: Any, z_loss: Any, num_items: Any
) -> None:
    """What neglog adds to torch's arguments."""
    real = real_dtype(input.dtype)
    check_number("logit_scale", logit_scale, input, real, learns=True)
    check_number("z_loss", z_loss, input, real)
    if known(z_loss) and z_loss < 0:
        raise ValueError(f"z_loss: expected a number from 0, got {shown(z_loss)}")
    if softcap is not None:
        _check_type_of_number("softcap", softcap, input)
        if known(softcap) and not (softcap > 0 and fits(softcap, torch.float64)):
            raise ValueError(
                f"softcap: expected a finite number above 0 or None, got {shown(softcap)}"
            )
    if num_items is None:
        return
    check_number("num_items", num_items, input, real)
    if known(num_items) and num_items < 0:
        raise ValueError(f"num_items: expected a number from 0, got {shown(num_items)}")
    if reduction == "none":
        raise ValueError("num_items: expected reduction 'mean' or 'sum', got 'none'")


def check_temperature(temperature: Any, input: Tensor) -> None:
    """A number above 0."""
    check_number("temperature", temperature, input, real_dtype(input.dtype))
    if known(temperature) and not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {shown(temperature)}")


def known(value: Any) -> bool:
    """Whether a number can be compared: not one in a tensor that is traced, or on a device."""
    return not isinstance(value, Tensor) or torch_state.readable(value)


def check_loss_dtype(loss_dtype: Any, input: Tensor) -> None:
    """None, a dtype that loses nothing of what is computed in float32, or the input's own."""
    if loss_dtype is None:
        return
    if not isinstance(loss_dtype, torch.dtype):
        raise TypeError(f"loss_dtype: expected a torch.dtype, got {type(loss_dtype).__name__}")
    if loss_dtype not in (torch.float32, torch.float64, input.dtype):
        raise ValueError(
            f"loss_dtype: expected torch.float32, torch.float64 or the input's {input.dtype}, "
            f"got {loss_dtype}"
        )


def to_logits_dtype(logits_dtype: Any, input: Tensor) -> torch.dtype | None:
    """As torch.dtype; None for what the product of a head has by itself."""
    if logits_dtype is None:
        return None
    if logits_dtype == "float32":
        logits_dtype = torch.float32
    if not isinstance(logits_dtype, torch.dtype):
        raise TypeError(
            f"logits_dtype: expected a torch.dtype, 'float32' or None, got {logits_dtype!r}"
        )
    own = autocast_dtype(input)
    if logits_dtype != own and (logits_dtype != torch.float32 or own.itemsize > 2):
        raise ValueError(
            f"logits_dtype: expected {own}, that of the product, or for 16 bits torch.float32, "
            f"got {logits_dtype}"
        )
    return logits_dtype


def check_number(
    name: str, value: Any, input: Tensor, real: torch.dtype, learns: bool = False
) -> None:
    """A number that `real` holds or a tensor of one; unless it `learns`, not one whose gradient
    would be lost."""
    _check_type_of_number(name, value, input, learns)
    if not isinstance(value, Tensor) and not fits(value, real):
        raise ValueError(f"{name}: expected a finite number of {real}, got {shown(value)}")


def _check_type_of_number(name: str, value: Any, input: Tensor, learns: bool = False) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: expected one number, got shape {_shape(value)}")
        check_real_dtype(name, value)
        check_not_freed(value, name)
        check_has_number(name, value, input)
        if value.requires_grad and torch.is_grad_enabled() and not learns:
            raise ValueError(
                f"{name}: expected a number without gradient, got a tensor that requires grad; "
                "multiply by it outside the loss, or detach() it"
            )
    elif not isinstance(value, numbers.Real | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def fits(value: Any, real: torch.dtype) -> bool:
    """Whether a number, or that of a tensor, is a finite one of `real`."""
    try:
        return abs(float(value)) <= torch.finfo(real).max
    except OverflowError:  # an int beyond float64
        return False


def check_real_dtype(name: str, x: Tensor) -> None:
    if x.is_complex() or x.dtype == torch.bool:
        raise RuntimeError(f"{name}: expected a real dtype, got {x.dtype}")


def check_dense(name: str, x: Tensor) -> None:
    """Strided, in memory that was not freed."""
    if x.layout is not STRIDED:
        raise RuntimeError(f"{name}: expected a dense Tensor, got layout {x.layout}")
    check_not_freed(x, name)


def to_count(name: str, value: Any) -> int:
    """An integer from 1, of Python or NumPy; True is none."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return int(value)


def check_has_number(name: str, value: Any, like: Tensor) -> None:
    """Not a tensor on the meta device, unless `like` is there too: it holds no number."""
    if isinstance(value, Tensor) and value.is_meta and not like.is_meta:
        raise RuntimeError(f"{name}: expected device {like.device}, got {value.device}")


def check_reduction(reduction: Any) -> None:
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")


def check_flags(**named: Any) -> None:
    """True or False: any other object would stand for one of them by its truth, 'no' for True."""
    for name, value in named.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
