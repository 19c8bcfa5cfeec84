"""Checks of what a student learns from: its teacher, and how the two are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neglog.checks import (
    check_dense,
    check_flags,
    check_number,
    check_target_of_positions,
    check_temperature,
    known,
    multiplied_alike,
    shown,
)
from neglog.ops.dtypes import DTYPE_CODES, real_dtype


def check_student(input: Any, target: Any, mask: Any, shift: Any) -> None:
    """Logits whose class axis is the last, and class indices, if any, mask and shift of their
    positions."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a Tensor, got {type(input).__name__}")
    check_dense("input", input)
    if not input.dtype.is_floating_point:
        raise NotImplementedError(f"input: expected a floating-point dtype, got {input.dtype}")
    if input.dim() < 1 or input.shape[-1] < 1:
        raise RuntimeError(
            f"input: expected shape (..., C) of some classes, got {list(input.shape)}"
        )
    check_hard_target(input, target, mask, shift, "C")


def check_hard_target(input: Tensor, target: Any, mask: Any, shift: Any, last: str) -> None:
    """Class indices of the positions of `input`, if any, and their mask and shift."""
    positions = list(input.shape[:-1])
    if target is None:  # the mask is checked beside a target
        target = torch.empty(positions, dtype=torch.int64, device=input.device)
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a Tensor or None, got {type(target).__name__}")
    check_dense("target", target)
    if target.device != input.device:
        raise RuntimeError(f"target: expected device {input.device}, got {target.device}")
    check_target_of_positions(positions, None, target, mask, shift, last)


def check_teacher(
    input: Tensor, classes: int, teacher: Any, teacher_ids: Any, teacher_probabilities: Any
) -> None:
    """Scores, probabilities, or log-probabilities of some classes, of the input's positions."""
    check_flags(teacher_probabilities=teacher_probabilities)
    check_teacher_tensor("teacher", teacher, input)
    positions = list(input.shape[:-1])
    if teacher_ids is None:
        if list(teacher.shape) != [*positions, classes]:
            raise RuntimeError(
                f"teacher: expected shape {[*positions, classes]}, got {list(teacher.shape)}"
            )
        return
    if teacher_probabilities:
        raise ValueError(
            "teacher_probabilities: expected False with teacher_ids, whose teacher is "
            "log-probabilities"
        )
    if not isinstance(teacher_ids, Tensor):
        raise TypeError(f"teacher_ids: expected a Tensor or None, got {type(teacher_ids).__name__}")
    check_dense("teacher_ids", teacher_ids)
    if teacher_ids.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(
            f"teacher_ids: expected dtype torch.int64 or torch.int32, got {teacher_ids.dtype}"
        )
    if teacher_ids.device != input.device:
        raise RuntimeError(f"teacher_ids: expected device {input.device}, got {teacher_ids.device}")
    shape = list(teacher_ids.shape)
    if shape[:-1] != positions or len(shape) != len(positions) + 1 or not 1 <= shape[-1] <= classes:
        raise RuntimeError(
            f"teacher_ids: expected shape {[*positions, 'K']} for K from 1 to {classes} classes, "
            f"got {shape}"
        )
    if teacher.shape != teacher_ids.shape:
        raise RuntimeError(
            f"teacher: expected shape {shape}, that of teacher_ids, got {list(teacher.shape)}"
        )


def check_teacher_tensor(name: str, x: Any, input: Tensor) -> None:
    """One that has no gradient."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    check_dense(name, x)
    if x.dtype not in DTYPE_CODES:
        raise RuntimeError(
            f"{name}: expected dtype float32, float64, bfloat16 or float16, got {x.dtype}"
        )
    if x.device != input.device:
        raise RuntimeError(f"{name}: expected device {input.device}, got {x.device}")
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name}: expected a Tensor without gradient, got one that requires grad, which a "
            "teacher has none of; detach() it"
        )


def check_distillation(
    input: Tensor, target: Any, beta: Any, temperature: Any, soft_weight: Any, hard_weight: Any
) -> None:
    """The numbers of the comparison."""
    real = real_dtype(input.dtype)
    check_temperature(temperature, input)
    for name, value in (("beta", beta), ("soft_weight", soft_weight), ("hard_weight", hard_weight)):
        check_number(name, value, input, real)
    if known(beta) and not 0 <= beta <= 1:
        raise ValueError(f"beta: expected 0 to 1, got {shown(beta)}")
    if target is None and not (known(hard_weight) and hard_weight == 0):
        raise ValueError(
            "target: expected class indices for the cross-entropy that hard_weight asks for, got "
            "None"
        )


def check_teacher_of_head(
    input: Tensor, classes: int, teacher: Any, weight: Any, bias: Any, teacher_ids: Any,
    teacher_probabilities: Any, logit_scale: Any, softcap: Any,
) -> None:  # fmt: skip
    """What is compared with a student's hidden states: hidden states and a head, or as without."""
    if weight is None and bias is None:
        check_teacher(input, classes, teacher, teacher_ids, teacher_probabilities)
    else:
        given = (teacher, weight, bias, teacher_ids, teacher_probabilities)
        _check_teacher_head(input, classes, *given)
    _check_teacher_scores(input, logit_scale, softcap)
    plain = softcap is None and not isinstance(logit_scale, Tensor) and logit_scale == 1
    if not plain and (teacher_ids is not None or teacher_probabilities):
        raise ValueError(
            "teacher_logit_scale, teacher_softcap: expected none for a teacher of probabilities"
        )


def _check_teacher_head(
    input: Tensor, classes: int, teacher: Any, weight: Any, bias: Any, teacher_ids: Any,
    teacher_probabilities: Any,
) -> None:  # fmt: skip
    """Hidden states (..., E) of the input's positions, and the head that makes logits of them."""
    check_flags(teacher_probabilities=teacher_probabilities)
    for name, given in (
        ("teacher_ids", teacher_ids is not None),
        ("teacher_probabilities", teacher_probabilities),
    ):
        if given:
            raise ValueError(f"{name}: expected none with teacher_weight, which makes logits")
    if weight is None:
        raise ValueError("teacher_bias: expected none without teacher_weight")
    check_teacher_tensor("teacher", teacher, input)
    for name, x in (("teacher_weight", weight), ("teacher_bias", bias)):
        if x is None:
            continue
        _check_frozen(name, x, input)
        if not multiplied_alike(x, teacher):
            raise RuntimeError(f"{name}: expected dtype {teacher.dtype}, got {x.dtype}")
    positions = list(input.shape[:-1])
    if weight.dim() != 2 or weight.shape[0] != classes:
        raise RuntimeError(
            f"teacher_weight: expected shape [{classes}, E], got {list(weight.shape)}"
        )
    if list(teacher.shape) != [*positions, weight.shape[1]]:
        raise RuntimeError(
            f"teacher: expected shape {[*positions, weight.shape[1]]}, hidden states of the "
            f"input's positions with teacher_weight's features, got {list(teacher.shape)}"
        )
    if bias is not None and list(bias.shape) != [classes]:
        raise RuntimeError(f"teacher_bias: expected shape [{classes}], got {list(bias.shape)}")


def _check_frozen(name: str, x: Any, input: Tensor) -> None:
    """As check_teacher_tensor, but that a parameter may require grad: it gets none."""
    check_teacher_tensor(name, x.detach() if isinstance(x, Tensor) else x, input)


def _check_teacher_scores(input: Tensor, logit_scale: Any, softcap: Any) -> None:
    """The numbers that change a teacher's logits, by their names."""
    real = real_dtype(input.dtype)
    check_number("teacher_logit_scale", logit_scale, input, real)
    if softcap is None:
        return
    check_number("teacher_softcap", softcap, input, torch.float64)
    if known(softcap) and not softcap > 0:
        raise ValueError(
            f"teacher_softcap: expected a finite number above 0 or None, got {shown(softcap)}"
        )
