"""nll: log-softmax and negative log-likelihood of rows of logits, in one op.

neglog::nll            forward; keeps two numbers a row for the backward
neglog::nll_backward   gradient of the logits; itself differentiable, by the composite formula
neglog::nll_           forward, and the gradient for upstream 1 written over the logits

Shapes: logits (N, V), any row stride. target (N,) int64, or (N, V) probabilities of the logits'
dtype. weight (V,) and num_items () in the accumulation dtype, float32 or for float64 logits
float64. Returned: loss () or (N,), lse (N,), lse_low (N,), total_weight (); correct (N,) bool and
entropy (N,), or both (0,) without stats. reduction: 0 none, 1 mean, 2 sum, as in aten.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from neglog import dispatch, kernels
from neglog.kernels.memory import use_huge_pages
from neglog.ops import nll_composite as composite

NONE, MEAN, SUM = 0, 1, 2
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# Numbers a thread must have before another is worth waking: 9 microseconds of work.
GRAIN = 32768

_OPTIONS = (
    "int reduction, int ignore_index, float label_smoothing, float logit_scale, float softcap, "
    "float z_loss"
)
_SCHEMAS = (
    f"nll(Tensor logits, Tensor target, Tensor? weight, Tensor? num_items, {_OPTIONS}, bool stats, "
    "str backend) -> (Tensor loss, Tensor lse, Tensor lse_low, Tensor total_weight, "
    "Tensor correct, Tensor entropy)",
    "nll_backward(Tensor grad_loss, Tensor? grad_lse, Tensor logits, Tensor target, "
    f"Tensor? weight, Tensor lse, Tensor lse_low, Tensor total_weight, {_OPTIONS}, str backend)"
    " -> Tensor",
    f"nll_(Tensor(a!) logits, Tensor target, Tensor? weight, Tensor? num_items, {_OPTIONS}, "
    "bool stats, str backend) -> (Tensor loss, Tensor lse, Tensor total_weight, Tensor correct, "
    "Tensor entropy)",
)

library = torch.library.Library("neglog", "DEF")
for _schema in _SCHEMAS:
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that losses, weights and log-sum-exps of such logits are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# CPU


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _adjacent(rows: Tensor) -> Tensor:
    """Rows whose columns are adjacent in memory, as the kernels want them."""
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _threads(logits: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), logits.numel() // GRAIN))


def _problem(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, options: tuple
) -> tuple:
    """The arguments that every kernel begins with. The tensors must outlive the call."""
    index, probs = (target, None) if target.dim() == 1 else (None, target)
    return (
        DTYPE_CODES[logits.dtype], *logits.shape, logits.data_ptr(), logits.stride(0),
        _pointer(index), _pointer(probs), 0 if probs is None else probs.stride(0),
        _pointer(weight), ignore_index, *options,
    )  # fmt: skip


def _prepare(target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    target = target.contiguous() if target.dim() == 1 else _adjacent(target)
    return target, None if weight is None else weight.contiguous()


def _divisor(kernel: Any, problem: tuple, num_items: Tensor | None) -> float:
    code, rows, vocab, _, _, target, probs, _, weight, ignore_index = problem[:10]
    total = kernel.total_weight(rows, vocab, target, probs, weight, ignore_index, code)
    return total if num_items is None else float(num_items)


def _quotient(numerator: float, divisor: float) -> float:
    """Division as tensors do it: 0 / 0 is NaN (a mean over nothing), x / 0 infinite."""
    return numerator / divisor if divisor else numerator * math.inf


def _empty_rows(logits: Tensor, count: int) -> list[Tensor]:
    real = real_dtype(logits.dtype)
    return [torch.empty(len(logits), dtype=real) for _ in range(count)]


def _empty_stats(logits: Tensor, stats: bool) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0] if stats else 0
    real = real_dtype(logits.dtype)
    return logits.new_empty(rows, dtype=torch.bool), logits.new_empty(rows, dtype=real)


def _reduced(row_loss: Tensor, total: float, divisor: float, reduction: int) -> Tensor:
    if reduction == NONE:
        return row_loss
    value = _quotient(total, divisor) if reduction == MEAN else total
    return torch.scalar_tensor(value, dtype=row_loss.dtype)


def _kernel(op: str, backend: str) -> Any:
    backend = backend or dispatch.kernel_backend() or "numba"
    dispatch.ran(op, backend)
    return kernels.load("nll", backend)


def _nll_cpu(
    logits, target, weight, num_items, reduction, ignore_index, label_smoothing, logit_scale,
    softcap, z_loss, stats, backend,
):  # fmt: skip
    kernel = _kernel("nll", backend)
    logits = _adjacent(logits)
    target, weight = _prepare(target, weight)
    options = (label_smoothing, logit_scale, softcap, z_loss)
    problem = _problem(logits, target, weight, ignore_index, options)
    divisor = _divisor(kernel, problem, num_items)
    row_loss, lse, lse_low = _empty_rows(logits, 3)
    correct, entropy = _empty_stats(logits, stats)
    total = kernel.forward(
        *problem, row_loss.data_ptr(), lse.data_ptr(), lse_low.data_ptr(),
        correct.data_ptr() if stats else 0, entropy.data_ptr() if stats else 0, _threads(logits),
    )  # fmt: skip
    loss = _reduced(row_loss, total, divisor, reduction)
    total_weight = torch.scalar_tensor(divisor, dtype=lse.dtype)
    return loss, lse, lse_low, total_weight, correct, entropy


def _nll_backward_cpu(
    grad_loss, grad_lse, logits, target, weight, lse, lse_low, total_weight, reduction,
    ignore_index, label_smoothing, logit_scale, softcap, z_loss, backend,
):  # fmt: skip
    kernel = _kernel("nll_backward", backend)
    logits = _adjacent(logits)
    target, weight = _prepare(target, weight)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    out = torch.empty(logits.shape, dtype=logits.dtype)
    use_huge_pages(out.data_ptr(), out.nbytes)
    problem = _problem(
        logits, target, weight, ignore_index, (label_smoothing, logit_scale, softcap, z_loss)
    )
    kernel.backward(
        *problem, lse.contiguous().data_ptr(), lse_low.contiguous().data_ptr(),
        grad_loss.data_ptr(), grad_loss.stride(0) if grad_loss.dim() else 0,
        _quotient(1.0, float(total_weight)) if reduction == MEAN else 1.0,
        _pointer(grad_lse), out.data_ptr(), logits.shape[1], _threads(logits),
    )  # fmt: skip
    return out


def _nll_inplace_cpu(
    logits, target, weight, num_items, reduction, ignore_index, label_smoothing, logit_scale,
    softcap, z_loss, stats, backend,
):  # fmt: skip
    kernel = _kernel("nll_", backend)
    rows = _adjacent(logits)
    target, weight = _prepare(target, weight)
    options = (label_smoothing, logit_scale, softcap, z_loss)
    problem = _problem(rows, target, weight, ignore_index, options)
    divisor = _divisor(kernel, problem, num_items)
    row_loss, lse = _empty_rows(rows, 2)
    correct, entropy = _empty_stats(rows, stats)
    total = kernel.fused(
        *problem, row_loss.data_ptr(), lse.data_ptr(),
        correct.data_ptr() if stats else 0, entropy.data_ptr() if stats else 0,
        _quotient(1.0, divisor) if reduction == MEAN and not _scaled_late(logits) else 1.0,
        rows.data_ptr(), rows.stride(0), _threads(rows),
    )  # fmt: skip
    if rows is not logits:
        logits.copy_(rows)
    loss = _reduced(row_loss, total, divisor, reduction)
    return loss, lse, torch.scalar_tensor(divisor, dtype=lse.dtype), correct, entropy


library.impl("nll", _nll_cpu, "CPU")
library.impl("nll_backward", _nll_backward_cpu, "CPU")
library.impl("nll_", _nll_inplace_cpu, "CPU")


# Shapes alone


@torch.library.register_fake("neglog::nll", lib=library)
def _nll_fake(
    logits, target, weight, num_items, reduction, ignore_index, label_smoothing, logit_scale,
    softcap, z_loss, stats, backend,
):  # fmt: skip
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


# Autograd


def _setup_context(ctx, inputs, output):
    logits, target, weight, _, *options = inputs
    loss, lse, lse_low, total_weight, correct, entropy = output
    ctx.mark_non_differentiable(lse_low, total_weight, correct, entropy)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, weight, lse, lse_low, total_weight)
    ctx.options = options[:6]
    ctx.backend = options[-1]


def _nll_autograd(ctx, grad_loss, grad_lse, *undefined):
    logits, target, weight, lse, lse_low, total_weight = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 12
    if grad_loss is None and grad_lse is None:
        return tuple(grads)
    if grad_loss is None:
        grad_loss = lse.new_zeros(())
    if ctx.needs_input_grad[0]:
        grads[0] = nll_backward(
            grad_loss, grad_lse, logits, target, weight, lse, lse_low, total_weight,
            *ctx.options, ctx.backend,
        )  # fmt: skip
    if ctx.needs_input_grad[1]:
        grads[1] = composite.target_gradient(
            grad_loss, logits, target, weight, total_weight, *ctx.options
        )
    return tuple(grads)


def _setup_backward_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], inputs[7])
    ctx.options = inputs[8:14]


def _nll_double_backward(ctx, grad):
    grad_loss, grad_lse, logits, target, weight, total_weight = ctx.saved_tensors
    probs = target if target.dim() == 2 else None
    # lse and lse_low follow from the logits: the composite recomputes them, so the whole of their
    # derivative arrives through the logits and nothing is returned for them.
    inputs = {"grad_loss": grad_loss, "grad_lse": grad_lse, "logits": logits, "target": probs}
    wanted = {name: value for name, value in inputs.items() if value is not None}
    fixed: dict[str, Any] = {"grad_lse": None} if grad_lse is None else {}
    if probs is None:
        fixed["target"] = target

    def gradient(*values: Tensor) -> Tensor:
        named = fixed | dict(zip(wanted, values, strict=True))
        return composite.gradient(
            **named, weight=weight, total_weight=total_weight, options=ctx.options
        )

    _, pullback = torch.func.vjp(gradient, *wanted.values())
    second = dict(zip(wanted, pullback(grad), strict=True))
    return tuple(second.get(name) for name in inputs) + (None,) * 11


torch.library.register_autograd(
    "neglog::nll", _nll_autograd, setup_context=_setup_context, lib=library
)
torch.library.register_autograd(
    "neglog::nll_backward",
    _nll_double_backward,
    setup_context=_setup_backward_context,
    lib=library,
)


# torch.func

# The kernels that register_autograd makes refuse to run under torch.func's transforms, which need
# setup_context and forward apart. The same formulas as a Function have them so.


def _vmap_by_loop(function: type[Function]) -> Any:
    """vmap as the loop it stands for; a call of the kernel already fills the machine."""

    def vmap(info, in_dims, *inputs):
        calls = [
            function.apply(
                *(
                    value if dim is None else value.select(dim, index)
                    for value, dim in zip(inputs, in_dims, strict=True)
                )
            )
            for index in range(info.batch_size)
        ]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        stacked = tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True))
        return stacked, (0,) * len(stacked)

    return vmap


def _as_function(op: Any, setup_context: Any, backward: Any) -> Any:
    members = {
        "forward": staticmethod(lambda *inputs: op(*inputs)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
    }
    function = type(op._schema.name.replace("::", "_"), (Function,), members)
    function.vmap = staticmethod(_vmap_by_loop(function))

    def call(*inputs):
        if torch._C._are_functorch_transforms_active():
            return function.apply(*inputs)
        return op(*inputs)

    return call


nll = _as_function(torch.ops.neglog.nll.default, _setup_context, _nll_autograd)
nll_backward = _as_function(
    torch.ops.neglog.nll_backward.default, _setup_backward_context, _nll_double_backward
)


# In place


def _scaled_late(logits: Tensor) -> bool:
    """Whether the mean's divisor waits for the backward. In float16 a gradient divided by thousands
    of rows is below the smallest number, and a loss scale that comes after cannot bring it back."""
    return logits.dtype == torch.float16


def _count_version(keyset: Any, logits: Tensor, *arguments: Any) -> Any:
    """nll_ writes its argument: every tensor saved before must learn of it."""
    with torch._C._AutoDispatchBelowADInplaceOrView():
        outputs = torch.ops.neglog.nll_.default.redispatch(
            keyset & torch._C._after_ADInplaceOrView_keyset, logits, *arguments
        )
    torch.autograd.graph.increment_version(logits)
    return outputs


library.impl("nll_", _count_version, "ADInplaceOrView", with_keyset=True)


class InplaceNLL(Function):
    """nll with the gradient formed in the forward, in the memory of the logits."""

    @staticmethod
    def forward(ctx, logits, target, weight, num_items, *options):
        ctx.set_materialize_grads(False)
        reduction = options[0]
        loss, lse, total_weight, correct, entropy = torch.ops.neglog.nll_.default(
            logits, target, weight, num_items, *options
        )
        ctx.mark_non_differentiable(lse, total_weight, correct, entropy)
        # Saved after the write, so that any later one, by us or by the user, is caught.
        ctx.save_for_backward(logits, total_weight)
        ctx.divide = reduction == MEAN and _scaled_late(logits)
        return loss, lse, total_weight, correct, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *undefined):
        grad, total_weight = ctx.saved_tensors
        if grad_loss is None:
            return (None,) * 12
        if ctx.divide:
            grad_loss = grad_loss / total_weight
        grad = grad.detach()
        if grad_loss.dim():
            grad.mul_(grad_loss.unsqueeze(1))
        elif float(grad_loss) != 1:
            grad.mul_(grad_loss)
        return grad, *(None,) * 11
