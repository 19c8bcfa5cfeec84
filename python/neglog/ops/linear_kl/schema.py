"""The ops of linear_kl.

neglog::linear_kl            loss and its parts, and the gradients for an upstream of 1 where they
                             are wanted
neglog::linear_kl_backward   those gradients times the upstream; formed anew where the upstream is
                             not one number (reduction "none")

Shapes: input (N, D), linear_weight (V, D), linear_bias (V,). teacher: as in kl, or with
teacher_weight (V, E), and perhaps teacher_bias (V,), hidden states (N, E), whose logits are made a
tile at a time too. ids, target, token_weight, num_items and what is returned as in kl; gradients of
input, linear_weight and linear_bias, or (0,) where not wanted.
workspace: bytes for the logits of one tile, the teacher's with it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from neglog.ops.define import Op
from neglog.ops.dtypes import divides_late, real_dtype
from neglog.ops.kl.schema import COMPARED, NUMBERS, PARTS
from neglog.ops.linear_nll.schema import TILES, gradient_shapes
from neglog.ops.nll.schema import NONE

TENSORS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor teacher, "
    "Tensor? teacher_weight, Tensor? teacher_bias, Tensor? ids, Tensor target, "
    "Tensor? token_weight"
)
GRADIENTS = "Tensor grad_input, Tensor grad_weight, Tensor grad_bias"
forward = Op(
    f"linear_kl({TENSORS}, Tensor? num_items, int reduction, {COMPARED}, int[3] wanted, {TILES}) "
    f"-> (Tensor loss, Tensor total_weight, {PARTS}, {GRADIENTS})",
    numbers=NUMBERS,
)
backward = Op(
    f"linear_kl_backward(Tensor grad_loss, {TENSORS}, Tensor total_weight, {GRADIENTS}, "
    f"int reduction, {COMPARED}, int[3] wanted, {TILES}) -> "
    "(Tensor input, Tensor linear_weight, Tensor linear_bias)",
    numbers=NUMBERS,
)


def _forward_shapes(a: Any) -> tuple[Tensor, ...]:
    new, real, rows = a.input.new_empty, real_dtype(a.input.dtype), a.input.shape[0]
    loss = new((rows,) if a.reduction == NONE else (), dtype=real)
    kept = real if any(a.wanted) and divides_late(a.input.dtype) else a.input.dtype
    parts = (new(rows, dtype=real) for _ in range(2))
    return loss, new((), dtype=real), *parts, *gradient_shapes(a, kept)


forward.shapes(_forward_shapes)
backward.shapes(lambda a: gradient_shapes(a, a.input.dtype))
