"""The ops of linear_nll.

neglog::linear_nll            loss and statistics, and the gradients for an upstream of 1 where they
                              are wanted
neglog::linear_nll_backward   those gradients times the upstream; formed anew where the upstream is
                              not one number (reduction "none", a gradient of the lse)

Shapes: input (N, D), linear_weight (V, D), linear_bias (V,), target (N,) int64 or (N, V) of
floating point; weight (V,), token_weight (N,) and num_items () in the accumulation dtype.
Returned: loss () or (N,), lse (N,), total_weight (); correct, entropy and argmax (N,), or (0,)
without stats; and gradients of input, linear_weight and linear_bias, or (0,) where not wanted. Rows
that are ignored have lse, entropy, argmax and gradient 0.
workspace: bytes for the logits of one tile, which have the dtype tile_dtype. Both ops have another,
named `..._numbers`, as those of nll have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neglog.ops.define import Op
from neglog.ops.dtypes import divides_late, real_dtype
from neglog.ops.nll.schema import NONE, NUMBERS, OPTIONS

TILES = "int workspace, ScalarType tile_dtype, float filter_eps, str backend"
forward = Op(
    "linear_nll(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, "
    "Tensor? weight, Tensor? token_weight, Tensor? num_items, "
    f"{OPTIONS}, bool stats, int[3] wanted, {TILES}) -> "
    "(Tensor loss, Tensor lse, Tensor total_weight, Tensor correct, Tensor entropy, Tensor argmax, "
    "Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    numbers=NUMBERS,
)
backward = Op(
    "linear_nll_backward(Tensor grad_loss, Tensor? grad_lse, Tensor? grad_entropy, Tensor input, "
    "Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, "
    "Tensor? token_weight, Tensor total_weight, Tensor grad_input, "
    f"Tensor grad_weight, Tensor grad_bias, {OPTIONS}, int[3] wanted, {TILES}) -> "
    "(Tensor input, Tensor linear_weight, Tensor linear_bias)",
    numbers=NUMBERS,
)


def gradient_shapes(a: Any, dtype: Any) -> tuple[Tensor, ...]:
    """Those of the parameters in `dtype`, or (0,) where not wanted."""
    shapes = (a.input.shape, a.linear_weight.shape, a.linear_weight.shape[:1])
    dtypes = (a.input.dtype, dtype, dtype)
    return tuple(
        a.input.new_empty(shape if want else 0, dtype=kept if want else a.input.dtype)
        for shape, want, kept in zip(shapes, a.wanted, dtypes, strict=True)
    )


def forward_shapes(a: Any) -> tuple[Tensor, ...]:
    new, real, rows = a.input.new_empty, real_dtype(a.input.dtype), a.input.shape[0]
    loss = new((rows,) if a.reduction == NONE else (), dtype=real)
    dtypes = (torch.bool, real, torch.int64)
    stats = (new(rows if a.stats else 0, dtype=dtype) for dtype in dtypes)
    kept = real if any(a.wanted) and divides_late(a.input.dtype) else a.input.dtype
    numbers = (loss, new(rows, dtype=real), new((), dtype=real), *stats)
    return *numbers, *gradient_shapes(a, kept)


forward.shapes(forward_shapes)
backward.shapes(lambda a: gradient_shapes(a, a.input.dtype))
