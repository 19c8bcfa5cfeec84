"""The losses as functions: validation and composition, no arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import _reduction as torch_reduction
from torch.nn.functional import cross_entropy as torch_cross_entropy
from torch.overrides import handle_torch_function, has_torch_function_variadic

from neglog import dispatch
from neglog.checks import (
    check_cross_entropy,
    check_extensions,
    check_masked,
    check_options,
    check_range,
    is_probabilities,
    number_on,
    row_shape,
    rows_of_last_axis,
    to_rows,
    under_autocast,
)
from neglog.ops import nll_composite
from neglog.ops.nll import real_dtype
from neglog.ops.nll_autograd import InplaceNLL, nll

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
# The ignore_index of positions outside a mask: no data can hold it by accident.
MASKED = -(2**63)


class LossStats(NamedTuple):
    """A loss and what its rows said. All but `loss` have the shape of an index target.

    logsumexp: of the transformed logits; differentiable, unless the backward is in place.
    correct: whether the target is the argmax; False where ignored or given as probabilities.
    entropy: of softmax(logits), in nats; detached.
    A position outside a mask, or whose logits are never made, has 0 in all of them.
    """

    loss: Tensor
    logsumexp: Tensor
    correct: Tensor
    entropy: Tensor


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    num_items: int | Tensor | None = None,
    inplace_backward: bool = False,
    return_stats: bool = False,
    backend: str | None = None,
) -> Any:
    """Cross-entropy between logits and targets: torch.nn.functional.cross_entropy, fused.

    The first eight arguments mean what they mean in torch, and the result has torch's shape and
    dtype.

    Args:
        input: logits, (C), (N, C) or (N, C, d1, ..., dK); float32, float64, bfloat16 or float16.
        target: class indices (int64 or uint8), shaped as input without C; or probabilities shaped
            as input.
        weight: (C), the input's dtype; a weight for each class.
        size_average, reduce: torch's deprecated names for `reduction`.
        ignore_index: positions with this target count nothing. Their gradient is exactly zero, even
            where their logits are NaN.
        reduction: "none", "mean" (over the weights of the counted targets) or "sum".
        label_smoothing: in [0, 1], the share of the target spread evenly over the classes.
        logit_scale: multiplies the logits first.
        softcap: if given, z = softcap * tanh(logit_scale * input / softcap) replaces the logits
            (Gemma 2, arXiv:2408.00118).
        z_loss: adds z_loss * logsumexp(z)**2 to each row, times its target's class weight
            (PaLM, arXiv:2204.02311).
        num_items: if given, the loss is the sum over this number, for gradient accumulation over
            batches of unequal length. Not with reduction="none".
        inplace_backward: the gradient of the logits overwrites `input` during the forward, which
            needs no memory beyond O(N). `input` must not be a leaf that requires grad. It must not
            be read afterwards: autograd raises if an operation before this one needs it for its
            backward, but one after it gets wrong numbers. Without a gradient to compute, with a
            target that requires grad, under torch.compile and torch.func, nothing is overwritten.
        return_stats: return LossStats(loss, logsumexp, correct, entropy) instead of the loss.
        backend: "cython", "numba" or "torch"; None lets neglog.dispatch choose.

    Raises:
        IndexError: a target is out of range, and its value and row are named; input is a scalar.
        ValueError: batch sizes differ, the reduction or backend is unknown, num_items without a
            sum, softcap not above 0.
        RuntimeError: other shapes, dtypes, label_smoothing, the length of weight.
        TypeError: input or target is not a tensor.
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            cross_entropy, (input, target, weight), input, target, weight, size_average,
            ignore_index, reduce, reduction, label_smoothing, logit_scale=logit_scale,
            softcap=softcap, z_loss=z_loss, num_items=num_items, inplace_backward=inplace_backward,
            return_stats=return_stats, backend=backend,
        )  # fmt: skip
    extended = (
        isinstance(logit_scale, Tensor) or logit_scale != 1.0 or softcap is not None
        or z_loss != 0.0 or num_items is not None or return_stats or inplace_backward
    )  # fmt: skip
    chosen = dispatch.forced(backend)
    if not extended and (chosen == "torch" or (chosen is None and dispatch.prefers_torch(input))):
        return _torch_loss(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    if size_average is not None or reduce is not None:
        reduction = torch_reduction.legacy_get_string(size_average, reduce)
    if reduction == "elementwise_mean":
        torch_reduction.get_enum(reduction)  # torch's warning that the name is deprecated
        reduction = "mean"
    check_cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
    check_extensions(reduction, logit_scale, softcap, z_loss, num_items)
    if torch.compiler.is_compiling() and isinstance(logit_scale, Tensor):  # no number for an op
        input, logit_scale = input * logit_scale.to(input.dtype), 1.0
    problem = _rows_problem(input, target, weight, num_items)
    # The sum over num_items is a mean whose divisor is given.
    reduced = "mean" if num_items is not None else reduction
    options = (
        REDUCTIONS[reduced], ignore_index, float(label_smoothing), float(logit_scale),
        float(softcap or 0.0), float(z_loss), return_stats,
    )  # fmt: skip
    loss, lse, correct, entropy = _nll(problem, options, inplace_backward, chosen)
    shape = row_shape(input)
    loss = loss.to(_loss_dtype(input, problem[0]))
    if reduction == "none":
        loss = loss.view(shape)
    if not return_stats:
        return loss
    return LossStats(loss, lse.view(shape), correct.view(shape), entropy.view(shape))


def masked_cross_entropy(
    input: Tensor,
    target: Tensor,
    mask: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    num_items: int | Tensor | None = None,
    inplace_backward: bool = False,
    return_stats: bool = False,
    backend: str | None = None,
) -> Any:
    """Cross-entropy of the positions that a mask counts: the loss of masked language models.

    Only their logits are read; the gradient of all others is exactly zero. Their targets may be
    anything.

    Args:
        input: logits (..., C), the class axis last.
        target: class indices (...), int64 or uint8, or probabilities (..., C).
        mask: bool, True where a position counts; of shape (...) or one that broadcasts to it.
        weight, reduction, label_smoothing and the rest: as in `cross_entropy`. "mean" divides by
            what is counted: NaN for an empty mask, while "sum" and "none" give 0. "none" has the
            shape (...), 0 where the mask is False.

    Raises:
        As `cross_entropy`, and RuntimeError for a mask of another dtype, device or shape.
    """
    check_masked(input, target, mask)
    options: dict[str, Any] = {
        "reduction": reduction, "label_smoothing": label_smoothing, "logit_scale": logit_scale,
        "softcap": softcap, "z_loss": z_loss, "num_items": num_items,
        "inplace_backward": inplace_backward, "return_stats": return_stats, "backend": backend,
    }  # fmt: skip
    shape, logits = input.shape[:-1], rows_of_last_axis(input)
    counted = mask.expand(shape).reshape(-1)
    if is_probabilities(input, target):
        target = rows_of_last_axis(target)
        traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        way = _masked_zeroed if traced else _masked_taken_out
        result = way(logits, target, counted, weight, options)
        return by_row(result, lambda x: x.view(shape), reduction)
    labels = torch.where(counted, target.reshape(-1).long(), MASKED)
    chosen = dispatch.forced(backend)
    by_torch = chosen == "torch" or (chosen is None and dispatch.prefers_torch(logits))
    if by_torch and not inplace_backward:  # it reads what does not count, and that may be NaN
        logits = torch.where(counted[:, None], logits, 0)
    result = cross_entropy(logits, labels, weight, ignore_index=MASKED, **options)
    if return_stats:
        result = _counted_stats(result.loss, result, counted)
    return by_row(result, lambda x: x.view(shape), reduction)


def _masked_taken_out(
    logits: Tensor, target: Tensor, counted: Tensor, weight: Any, options: dict
) -> Any:
    """Rows with a distribution as target have no ignore_index: those that count are taken out."""
    rows = counted.nonzero().squeeze(1)
    result = cross_entropy(logits[rows], target[rows], weight, **options)

    def put_back(x: Tensor) -> Tensor:
        return x.new_zeros(counted.shape[0]).index_put((rows,), x)

    return by_row(result, put_back, options["reduction"])


def _masked_zeroed(
    logits: Tensor, target: Tensor, counted: Tensor, weight: Any, options: dict
) -> Any:
    """The same with all rows, where no size may depend on data: torch.compile and torch.func."""
    real, dtype = real_dtype(logits.dtype), _loss_dtype(logits, logits)
    kept, num_items, reduction = counted[:, None], options["num_items"], options["reduction"]
    alone = options | {"reduction": "none", "num_items": None}
    x, q = (torch.where(kept, part, 0).to(real) for part in (logits, target))
    result = cross_entropy(x, q, weight, **alone)
    loss = torch.where(counted, result.loss if options["return_stats"] else result, 0)
    if num_items is not None or reduction == "mean":
        loss = loss.sum() / (counted.sum() if num_items is None else num_items)
    elif reduction == "sum":
        loss = loss.sum()
    loss = loss.to(dtype)
    return _counted_stats(loss, result, counted) if options["return_stats"] else loss


def _counted_stats(loss: Tensor, stats: LossStats, counted: Tensor) -> LossStats:
    """Statistics that are 0 where the mask is False."""
    return LossStats(loss, *(x.masked_fill(~counted, 0) for x in stats[1:]))


def by_row(result: Any, change: Callable[[Tensor], Tensor], reduction: str) -> Any:
    """A loss, or LossStats, in which all that has a number for each row was changed."""
    if not isinstance(result, LossStats):
        return change(result) if reduction == "none" else result
    loss = change(result.loss) if reduction == "none" else result.loss
    return LossStats(loss, *(change(x) for x in result[1:]))


def _torch_loss(input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
    _, ignore_index, _, reduction, label_smoothing = options
    try:
        if not 0.0 <= label_smoothing <= 1.0:  # torch lets NaN and negative ones pass
            check_options(ignore_index, reduction, label_smoothing)
        loss = torch_cross_entropy(input, target, weight, *options)
    except (IndexError, RuntimeError, TypeError, ValueError):
        # Our check names argument, expected and got. Where it finds nothing, torch's word stands.
        check_cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
        check_range(input, target, ignore_index)
        raise
    dispatch.ran("nll", "torch")
    return loss


def _rows_problem(
    input: Tensor, target: Tensor, weight: Tensor | None, num_items: int | Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Logits (N, V), target (N,) or (N, V), weight and num_items as the op wants them."""
    if is_probabilities(input, target):
        # torch multiplies them, so that the widest dtype is the result's.
        common = torch.promote_types(input.dtype, target.dtype)
        if weight is not None:
            common = torch.promote_types(common, weight.dtype)
        input, target = input.to(common), to_rows(target.to(common))
    else:
        target = target.reshape(-1).long()
    real = real_dtype(input.dtype)
    if weight is not None:
        weight = weight.to(real)
    if num_items is not None:
        num_items = number_on(num_items, real, input.device).reshape(())
    return to_rows(input), target, weight, num_items


def _nll(
    problem: tuple, options: tuple, inplace_backward: bool, backend: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, lse, correct and entropy of rows, by the kernels or by torch's differentiable ops."""
    logits, target, weight, _ = problem
    refusal = dispatch.kernels_refuse(logits, weight, backend)
    if backend not in (None, "torch") and refusal:
        raise RuntimeError(f"backend={backend!r} cannot take this call: {refusal}")
    if backend == "torch" or refusal or (backend is None and not dispatch.kernel_backend(logits)):
        dispatch.ran("nll", "torch")
        if target.dim() == 1 and not torch.compiler.is_compiling():
            check_range(logits, target, options[1])
        loss, lse, _, correct, entropy = nll_composite.nll(*problem, *options)
        return loss, lse, correct, entropy
    if logits.is_cuda:  # the others' ops say so themselves
        dispatch.ran("nll", "cuda")
    if inplace_backward and _may_overwrite(logits, target):
        loss, lse, correct, entropy = InplaceNLL.apply(*problem, *options, backend or "")
    else:
        loss, lse, correct, entropy = nll(*problem, *options, backend or "")
    return loss, lse, correct, entropy


def _may_overwrite(logits: Tensor, target: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return False
    if target.requires_grad:  # its gradient is made of the logits
        return False
    base = logits if logits._base is None else logits._base
    if base.is_leaf and base.requires_grad:
        raise RuntimeError(
            "inplace_backward: input is a leaf that requires grad or a view of one, and "
            "overwriting it would lose the values being trained: expected the output of an "
            "operation"
        )
    if target.dim() == 2 and target.numel() and _storage(target) == _storage(logits):
        raise RuntimeError(
            "inplace_backward: expected a target in memory of its own, got the input's"
        )
    if _rows_overlap(logits):
        raise RuntimeError(
            "inplace_backward: expected an input whose rows lie apart in memory, got strides "
            f"{logits.stride()} for shape {list(logits.shape)}; clone() it first"
        )
    return True


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _rows_overlap(rows: Tensor) -> bool:
    """Whether two of the numbers are one in memory, as after expand."""
    reach = 0  # of the dimensions so far, from the first number to the last
    for stride, size in sorted(zip(rows.stride(), rows.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _loss_dtype(input: Tensor, logits: Tensor) -> torch.dtype:
    """torch's: that of the logits, or under autocast float32 for the 16-bit ones."""
    if under_autocast(input):
        return real_dtype(logits.dtype)
    return logits.dtype
