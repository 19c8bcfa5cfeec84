"""The ops of nll.

neglog::nll            loss and statistics of rows; keeps two numbers a row for the backward
neglog::nll_backward   gradient of the logits; itself differentiable, by formula.py
neglog::nll_           as nll, and the gradient for an upstream of 1 is written over the logits
neglog::nll_scale_     that gradient times the upstream, () or (N,); on CUDA alone

On CUDA alone, for eager calls of one loss () without statistics:

neglog::nll_with_gradient   the loss, and with `form` the gradient in new memory, for the upstream
                            that `remembered` expects, 1 where that is None
neglog::nll_gradient_for_   the same gradient for `grad_loss`. Where it is `formed` for that already
                            the kernel returns at once. `remembered` learns of grad_loss

remembered (2,) lies on the device: the last upstream that was finite and not 0, and how many came
since that were none of the one before them. From 2 on no upstream is expected and no gradient
formed, though it has memory. kept (3 N + 2) is for the backward: lse, lse_low, the rows' losses,
total_weight, and the upstream of the gradient, NaN for none. The gradient is (0, 0) without `form`.
On the CPU the host reads the upstream itself, and needs neither op.

Shapes: logits (N, V), any row stride; on the CPU also (B, V, P), any strides, for N = B * P rows,
whose gradient is laid out as they are. target (N,) int64, or probabilities of the logits' shape and
dtype. weight (V,), token_weight (N,) and num_items () in the accumulation dtype, float32 or for
float64 logits float64. A row's loss is multiplied by its token_weight, and so is its share of
total_weight; where that is 0 the row is ignored, as where its target is ignore_index.
Returned: loss () or (N,), lse (N,), lse_low (N,), total_weight (); correct (N,) bool, entropy (N,)
and argmax (N,) int64, or (0,) without stats. lse + lse_low is the log-sum-exp to twice the digits.
grad_entropy (N,) is given with the entropy that the forward returned.
reduction: 0 none, 1 mean, 2 sum, as in aten. backend: "cython" or "numba"; "" is the best that can
run, so that a graph exported on one machine runs on another.

neglog::nll_numbers and nll_backward_numbers have label_smoothing, logit_scale, softcap and z_loss
in one tensor (4,) on the CPU (ops/define.py).
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neglog.ops.define import Op
from neglog.ops.dtypes import real_dtype

NONE, MEAN, SUM = 0, 1, 2
NUMBERS = "float label_smoothing, float logit_scale, float softcap, float z_loss"
OPTIONS = f"int reduction, SymInt ignore_index, {NUMBERS}"
forward = Op(
    "nll(Tensor logits, Tensor target, Tensor? weight, Tensor? token_weight, Tensor? num_items, "
    f"{OPTIONS}, bool stats, str backend) -> (Tensor loss, Tensor lse, Tensor lse_low, "
    "Tensor total_weight, Tensor correct, Tensor entropy, Tensor argmax)",
    numbers=NUMBERS,
)
backward = Op(
    "nll_backward(Tensor grad_loss, Tensor? grad_lse, Tensor? grad_entropy, Tensor logits, "
    "Tensor target, Tensor? weight, Tensor? token_weight, Tensor lse, Tensor lse_low, "
    f"Tensor? entropy, Tensor total_weight, {OPTIONS}, str backend) -> Tensor",
    numbers=NUMBERS,
)
in_place = Op(
    "nll_(Tensor(a!) logits, Tensor target, Tensor? weight, Tensor? token_weight, "
    f"Tensor? num_items, {OPTIONS}, bool stats, str backend) -> (Tensor loss, Tensor lse, "
    "Tensor total_weight, Tensor correct, Tensor entropy, Tensor argmax)"
)
scale_in_place = Op("nll_scale_(Tensor(a!) grad, Tensor factor) -> ()")
with_gradient = Op(
    "nll_with_gradient(Tensor logits, Tensor target, Tensor? weight, Tensor? token_weight, "
    f"Tensor? num_items, Tensor? remembered, {OPTIONS}, bool form) -> "
    "(Tensor loss, Tensor kept, Tensor gradient)",
    compiled=False,
)
gradient_for = Op(
    "nll_gradient_for_(Tensor(a!) gradient, Tensor grad_loss, Tensor kept, Tensor(b!)? remembered, "
    "Tensor logits, Tensor target, Tensor? weight, Tensor? token_weight, "
    f"{OPTIONS}, bool formed) -> ()",
    compiled=False,
)

# What csrc/nll/nll.cu implements.
ON_CUDA = (forward, backward, in_place, scale_in_place, with_gradient, gradient_for)


class Options(NamedTuple):
    """What shapes the loss of a row, in the order of the schemas. The numbers are floats, or each a
    tensor ()."""

    reduction: int
    ignore_index: int
    label_smoothing: Any
    logit_scale: Any
    softcap: Any
    z_loss: Any

    def known(self) -> bool:
        """Whether the numbers are floats."""
        return not isinstance(self.z_loss, Tensor)

    @classmethod
    def of(cls, arguments: Any) -> Options:
        return cls(*attrgetter(*cls._fields)(arguments))


def count_rows(logits: Tensor) -> int:
    """N of logits (N, V), or B * P of (B, V, P)."""
    shape = logits.shape
    return shape[0] if len(shape) == 2 else shape[0] * shape[2]


def as_rows(x: Tensor) -> Tensor:
    """(B, V, P) as rows (B * P, V); rows as they are."""
    return x if x.dim() == 2 else x.transpose(1, 2).flatten(0, 1)


def empty_stats(logits: Tensor, stats: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for correct, entropy and argmax."""
    rows = count_rows(logits) if stats else 0
    dtypes = (torch.bool, real_dtype(logits.dtype), torch.int64)
    correct, entropy, argmax = (logits.new_empty(rows, dtype=dtype) for dtype in dtypes)
    return correct, entropy, argmax


def _forward_shapes(a: Any) -> tuple[Tensor, ...]:
    real, rows = real_dtype(a.logits.dtype), count_rows(a.logits)
    loss = a.logits.new_empty((rows,) if a.reduction == NONE else (), dtype=real)
    lse, lse_low = (a.logits.new_empty(rows, dtype=real) for _ in range(2))
    total_weight = a.logits.new_empty((), dtype=real)
    return loss, lse, lse_low, total_weight, *empty_stats(a.logits, a.stats)


def new_gradient_like(logits: Tensor) -> Tensor:
    """Contiguous rows; (B, V, P) with the logits' strides, or in their order if there are gaps."""
    return logits.new_empty(logits.shape) if logits.dim() == 2 else torch.empty_like(logits)


def _in_place_shapes(a: Any) -> tuple[Tensor, ...]:
    loss, lse, _, *others = _forward_shapes(a)
    return loss, lse, *others


forward.shapes(_forward_shapes)
in_place.shapes(_in_place_shapes)
backward.shapes(lambda a: new_gradient_like(a.logits))
