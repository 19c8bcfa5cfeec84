"""nll: log-softmax and negative log-likelihood of rows of logits, in one op.

neglog::nll            forward; keeps two numbers a row for the backward
neglog::nll_backward   gradient of the logits; itself differentiable, by the composite formula
neglog::nll_           forward, and the gradient for upstream 1 written over the logits
neglog::nll_scale_     that gradient times the upstream, () or (N,); on CUDA alone

Shapes: logits (N, V), any row stride. target (N,) int64, or (N, V) probabilities of the logits'
dtype. weight (V,) and num_items () in the accumulation dtype, float32 or for float64 logits
float64. Returned: loss () or (N,), lse (N,), lse_low (N,), total_weight (); correct (N,) bool and
entropy (N,), or both (0,) without stats. reduction: 0 none, 1 mean, 2 sum, as in aten.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neglog import dispatch, kernels
from neglog.kernels.memory import large_buffer
from neglog.kernels.threads import allowed
from neglog.tiles import plan

NONE, MEAN, SUM = 0, 1, 2
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# Numbers a thread must have before another is worth waking: 9 microseconds of work.
GRAIN = 32768

OPTIONS = (
    "int reduction, int ignore_index, float label_smoothing, float logit_scale, float softcap, "
    "float z_loss"
)
SCHEMAS = (
    f"nll(Tensor logits, Tensor target, Tensor? weight, Tensor? num_items, {OPTIONS}, bool stats, "
    "str backend) -> (Tensor loss, Tensor lse, Tensor lse_low, Tensor total_weight, "
    "Tensor correct, Tensor entropy)",
    "nll_backward(Tensor grad_loss, Tensor? grad_lse, Tensor logits, Tensor target, "
    f"Tensor? weight, Tensor lse, Tensor lse_low, Tensor total_weight, {OPTIONS}, str backend)"
    " -> Tensor",
    f"nll_(Tensor(a!) logits, Tensor target, Tensor? weight, Tensor? num_items, {OPTIONS}, "
    "bool stats, str backend) -> (Tensor loss, Tensor lse, Tensor total_weight, Tensor correct, "
    "Tensor entropy)",
    "nll_scale_(Tensor(a!) grad, Tensor factor) -> ()",
)

library = torch.library.Library("neglog", "DEF")
for _schema in SCHEMAS:
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that losses, weights and log-sum-exps of such logits are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# CPU


class Options(NamedTuple):
    """What shapes the loss of a row, in the order of the schemas."""

    reduction: int
    ignore_index: int
    label_smoothing: float
    logit_scale: float
    softcap: float
    z_loss: float


class Outputs(NamedTuple):
    """What a forward writes: memory, and the two sums that the mean divides."""

    row_loss: Tensor
    lse: Tensor
    lse_low: Tensor
    correct: Tensor
    entropy: Tensor
    total: float
    divisor: float

    def loss(self, reduction: int) -> Tensor:
        if reduction == NONE:
            return self.row_loss
        value = quotient(self.total, self.divisor) if reduction == MEAN else self.total
        return torch.scalar_tensor(value, dtype=self.row_loss.dtype)

    def total_weight(self) -> Tensor:
        return torch.scalar_tensor(self.divisor, dtype=self.row_loss.dtype)


def quotient(numerator: float, divisor: float) -> float:
    """Division as tensors do it: 0 / 0 is NaN (a mean over nothing), x / 0 infinite."""
    return numerator / divisor if divisor else numerator * math.inf


def _pointer(tensor: Tensor | None) -> int:
    """0 for "not given"; an empty tensor has no address, and is given one that nobody reads."""
    return 0 if tensor is None else tensor.data_ptr() or 1


def _adjacent(rows: Tensor) -> Tensor:
    """Rows whose columns are adjacent in memory, as the kernels want them."""
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _threads(logits: Tensor) -> int:
    return allowed(max(1, min(torch.get_num_threads(), logits.numel() // GRAIN)))


def _kernel(op: str, backend: str) -> Any:
    dispatch.ran(op, backend or dispatch.kernel_backend() or "none")
    return kernels.load("nll", backend or None)


def _problem(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> tuple[tuple, tuple]:
    """The arguments that every kernel begins with, and the tensors that must outlive the call."""
    target = target.contiguous() if target.dim() == 1 else _adjacent(target)
    weight = None if weight is None else weight.contiguous()
    index, probs = (target, None) if target.dim() == 1 else (None, target)
    arguments = (
        DTYPE_CODES[logits.dtype], *logits.shape, logits.data_ptr(), logits.stride(0),
        _pointer(index), _pointer(probs), 0 if probs is None else probs.stride(0),
        _pointer(weight), *options[1:],
    )  # fmt: skip
    return arguments, (target, weight)


def _divisor(kernel: Any, problem: tuple, num_items: Tensor | None) -> float:
    code, rows, vocab, _, _, target, probs, _, weight, ignore_index = problem[:10]
    total = kernel.total_weight(rows, vocab, target, probs, weight, ignore_index, code)
    return total if num_items is None else float(num_items)


def _empty_stats(logits: Tensor, stats: bool) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0] if stats else 0
    real = real_dtype(logits.dtype)
    return logits.new_empty(rows, dtype=torch.bool), logits.new_empty(rows, dtype=real)


def new_memory(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """like.new_empty, on huge pages where it is large and on the CPU (kernels/memory.py)."""
    dtype = dtype or like.dtype
    count = math.prod(shape)
    buffer = large_buffer(count * dtype.itemsize) if like.is_cpu else None
    if buffer is None:
        return like.new_empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)


def new_rows(rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """New memory for (rows, columns), where each row begins at a line of the cache."""
    stride = plan.row_stride(columns, dtype.itemsize)
    return new_memory((rows, stride), like, dtype)[:, :columns]


def run_forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, num_items: Tensor | None,
    options: Options, stats: bool, backend: str,
) -> Outputs:  # fmt: skip
    """Loss and statistics of rows."""
    kernel = _kernel("nll", backend)
    logits = _adjacent(logits)
    problem, _alive = _problem(logits, target, weight, options)
    divisor = _divisor(kernel, problem, num_items)
    real = real_dtype(logits.dtype)
    row_loss, lse, lse_low = (torch.empty(logits.shape[0], dtype=real) for _ in range(3))
    correct, entropy = _empty_stats(logits, stats) if stats else (_NOTHING, _NOTHING)
    total = kernel.forward(
        *problem, row_loss.data_ptr(), lse.data_ptr(), lse_low.data_ptr(),
        correct.data_ptr() if stats else 0, entropy.data_ptr() if stats else 0, _threads(logits),
    )  # fmt: skip
    return Outputs(row_loss, lse, lse_low, correct, entropy, total, divisor)


def run_backward(
    grad_loss: Tensor, grad_lse: Tensor | None, logits: Tensor, target: Tensor,
    weight: Tensor | None, lse: Tensor, lse_low: Tensor, divisor: float, options: Options,
    backend: str,
) -> Tensor:  # fmt: skip
    """The gradient of the logits, in new memory."""
    kernel = _kernel("nll_backward", backend)
    logits = _adjacent(logits)
    problem, _alive = _problem(logits, target, weight, options)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    out = new_memory(logits.shape, logits)
    kernel.backward(
        *problem, lse.data_ptr(), lse_low.data_ptr(),
        grad_loss.data_ptr(), grad_loss.stride(0) if grad_loss.dim() else 0,
        quotient(1.0, divisor) if options.reduction == MEAN else 1.0,
        _pointer(grad_lse), out.data_ptr(), logits.shape[1], _threads(logits),
    )  # fmt: skip
    return out


def run_in_place(
    logits: Tensor, target: Tensor, weight: Tensor | None, num_items: Tensor | None,
    options: Options, stats: bool, backend: str,
) -> Outputs:  # fmt: skip
    """Loss and statistics of rows, and their gradient in place of the logits."""
    kernel = _kernel("nll_", backend)
    rows = _adjacent(logits)
    problem, _alive = _problem(rows, target, weight, options)
    divisor = _divisor(kernel, problem, num_items)
    real = real_dtype(rows.dtype)
    row_loss, lse = (torch.empty(len(rows), dtype=real) for _ in range(2))
    correct, entropy = _empty_stats(rows, stats)
    now = options.reduction == MEAN and not (divides_late(logits) and divisor)
    total = kernel.forward_backward(
        *problem, row_loss.data_ptr(), lse.data_ptr(),
        correct.data_ptr() if stats else 0, entropy.data_ptr() if stats else 0,
        quotient(1.0, divisor) if now else 1.0, rows.data_ptr(), rows.stride(0), _threads(rows),
    )  # fmt: skip
    if rows is not logits:
        logits.copy_(rows)
    return Outputs(row_loss, lse, _NOTHING, correct, entropy, total, divisor)


def divides_late(logits: Tensor) -> bool:
    """Whether the mean's divisor waits for the backward. In float16 a gradient divided by thousands
    of rows is below the smallest number, and a loss scale that comes after cannot bring it back."""
    return logits.dtype == torch.float16


_NOTHING = torch.empty(0)


def _nll_cpu(logits, target, weight, num_items, *rest):
    *options, stats, backend = rest
    out = run_forward(logits, target, weight, num_items, Options(*options), stats, backend)
    correct, entropy = (out.correct, out.entropy) if stats else _empty_stats(logits, False)
    loss = out.loss(options[0])
    return loss, out.lse, out.lse_low, out.total_weight(), correct, entropy


def _nll_backward_cpu(
    grad_loss, grad_lse, logits, target, weight, lse, lse_low, total_weight, *rest
):
    *options, backend = rest
    return run_backward(
        grad_loss, grad_lse, logits, target, weight, lse.contiguous(), lse_low.contiguous(),
        float(total_weight), Options(*options), backend,
    )  # fmt: skip


def _nll_inplace_cpu(logits, target, weight, num_items, *rest):
    *options, stats, backend = rest
    out = run_in_place(logits, target, weight, num_items, Options(*options), stats, backend)
    return out.loss(options[0]), out.lse, out.total_weight(), out.correct, out.entropy


def scale_in_place(grad: Tensor, factor: Tensor) -> None:
    """grad (N, V) times factor (N,) or (), over itself; by 1, as mostly, nothing is written."""
    if grad.is_cuda:  # to ask whether it is 1 would be to wait for the device
        torch.ops.neglog.nll_scale_.default(grad, factor)
        torch.autograd.graph.increment_version(grad)
    elif factor.dim():
        grad.mul_(factor.unsqueeze(1))
    elif float(factor) != 1:
        grad.mul_(factor)


library.impl("nll", _nll_cpu, "CPU")
library.impl("nll_backward", _nll_backward_cpu, "CPU")
library.impl("nll_", _nll_inplace_cpu, "CPU")


# Shapes alone


@torch.library.register_fake("neglog::nll", lib=library)
def _nll_fake(logits, target, weight, num_items, reduction, *rest):
    *_, stats, _ = rest
    real = real_dtype(logits.dtype)
    rows = logits.shape[0]
    loss = logits.new_empty((rows,) if reduction == NONE else (), dtype=real)
    lse, lse_low = (logits.new_empty(rows, dtype=real) for _ in range(2))
    return loss, lse, lse_low, logits.new_empty((), dtype=real), *_empty_stats(logits, stats)


@torch.library.register_fake("neglog::nll_backward", lib=library)
def _nll_backward_fake(grad_loss, grad_lse, logits, *others):
    return logits.new_empty(logits.shape)


@torch.library.register_fake("neglog::nll_", lib=library)
def _nll_inplace_fake(*arguments):
    loss, lse, _, *rest = _nll_fake(*arguments)
    return loss, lse, *rest
