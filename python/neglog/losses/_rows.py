"""Cross-entropy of rows, below the checks: what the losses over classes share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as torch_cross_entropy  # before any patch

from neglog import availability, torch_state
from neglog.checks import REDUCTIONS, check_range, class_dim, is_probabilities, number_on
from neglog.losses._result import LossStats, stats_of, without_stats
from neglog.ops.dtypes import real_dtype
from neglog.ops.nll import formula
from neglog.ops.nll.autograd import Rows, nll_in_place
from neglog.ops.nll.eager import nll, nll_on_cpu
from neglog.ops.nll.schema import Options, as_rows
from neglog.route import ACCEPTED, Route
from neglog.torch_state import under_autocast


class RowOptions(NamedTuple):
    """The arguments of a loss over classes, checked."""

    reduction: str = "mean"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    logit_scale: Any = 1.0
    softcap: Any = None
    z_loss: Any = 0.0
    num_items: Any = None
    inplace_backward: bool = False
    return_stats: bool = False
    loss_dtype: torch.dtype | None = None
    token_weight: Tensor | None = None  # (N,)

    def for_op(self) -> Options:
        # The sum over num_items is a mean whose divisor is given.
        reduction = "mean" if self.num_items is not None else self.reduction
        softcap = 0.0 if self.softcap is None else self.softcap
        numbers = (self.label_smoothing, self.logit_scale, softcap, self.z_loss)
        return Options(REDUCTIONS[reduction], self.ignore_index, *as_numbers(numbers))

    def divisor(self, logits_dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """num_items as an op takes it."""
        if self.num_items is None:
            return None
        return number_on(self.num_items, real_dtype(logits_dtype), device).reshape(())

    def extends_torch(self) -> bool:
        """Whether any of them is none of torch's."""
        return (
            isinstance(self.logit_scale, Tensor) or self.logit_scale != 1.0
            or isinstance(self.z_loss, Tensor) or self.z_loss != 0.0
            or self.softcap is not None or self.num_items is not None
            or self.token_weight is not None
            # Anything but False: what is no bool must reach the checks.
            or self.return_stats is not False or self.inplace_backward is not False
        )  # fmt: skip

    def scale_as_tensor(self) -> Tensor | None:
        """logit_scale () where it is no number for an op: it is traced, or has a gradient."""
        scale = self.logit_scale
        if not isinstance(scale, Tensor) or torch_state.constant(scale):
            return None
        return scale.reshape(())

    def cast(self, loss: Tensor, dtype: torch.dtype) -> Tensor:
        """The loss of logits of `dtype` as the user gets it: in loss_dtype, else in torch's."""
        if self.loss_dtype is not None:
            return loss.to(self.loss_dtype)
        return _as_torch_has_it(loss, dtype)


def _as_torch_has_it(loss: Tensor, dtype: torch.dtype) -> Tensor:
    """The loss of logits of `dtype`, in torch's dtype of it."""
    return loss if loss.dtype == dtype or under_autocast(loss) else loss.to(dtype)


def as_numbers(numbers: tuple) -> tuple[Any, ...]:
    """Floats; each a tensor where one of them is no number that is known to a graph."""
    # The first two are sooner asked than the third.
    may_vary = torch_state.compiling() or any(isinstance(x, Tensor) for x in numbers)
    if may_vary and any(map(torch_state.varies, numbers)):
        return _as_tensors(numbers)
    return tuple(map(float, numbers))


def _as_tensors(numbers: tuple) -> tuple[Tensor, ...]:
    """Each () on the CPU, where an op reads them when it runs."""
    cpu = torch.device("cpu")
    return tuple(number_on(x, torch.float64, cpu).reshape(()) for x in numbers)


def plain_loss_of_rows(
    where: Route, logits: Tensor, target: Tensor, reduction: str, ignore_index: int,
    label_smoothing: float,
) -> Tensor:  # fmt: skip
    """loss_of_rows of logits that are `eager_on_cpu`, without any option but these: 3 microseconds
    less of the 26 that a small call takes."""
    options = Options(REDUCTIONS[reduction], ignore_index, float(label_smoothing), 1.0, 0.0, 0.0)
    loss = nll_on_cpu(logits, target, None, None, None, options, False, where.demanded)
    return _as_torch_has_it(loss, logits.dtype)


def loss_of_rows(
    where: Route, logits: Tensor, target: Tensor, weight: Tensor | None, options: RowOptions
) -> LossStats:
    """logits (N, V), for the kernels of the CPU also (B, V, P) of N = B * P rows; target (N,) int64
    or of the logits' shape and dtype; weight (V,).

    The loss has loss_dtype, or torch's dtype: that of the logits, or under autocast float32 for
    16-bit ones. Without return_stats only it has a meaning.
    """
    if where.backend == "torch" and not options.extends_torch():
        return without_stats(torch_loss(logits, target, weight, options))
    rows = rows_by_op(where, logits, target, weight, options)
    return stats_of(rows._replace(loss=options.cast(rows.loss, logits.dtype)))


def rows_by_op(
    where: Route, logits: Tensor, target: Tensor, weight: Tensor | None, options: RowOptions
) -> Rows:
    """The same as the op neglog::nll has it: a loss in the dtype that is computed in, an entropy
    that is differentiable."""
    real = real_dtype(logits.dtype)
    if learns_weight(options):
        run = partial(rows_by_op, where, logits, target, weight)
        return times_learned_weight(run, target, weight, real, options)
    if isinstance(options.logit_scale, Tensor):
        logits, target, options = _scaled(logits, target, options)
    weight, token_weight = (
        None if x is None else x.to(real) for x in (weight, options.token_weight)
    )
    num_items, for_op = options.divisor(logits.dtype, logits.device), options.for_op()
    given = (logits, target, weight, token_weight, num_items, for_op, options.return_stats)
    if where.backend == "torch":
        return _by_formula(*given)
    if where.backend == "cuda":  # the others' ops say so themselves
        availability.ran("nll", "cuda")
    if options.inplace_backward and for_op.known() and may_overwrite(logits, target):
        return nll_in_place(*given, where.demanded)
    return nll(*given, where.demanded)


def learns_weight(options: RowOptions) -> bool:
    """Whether token_weight has a gradient."""
    return (
        options.token_weight is not None and options.token_weight.requires_grad
        and torch.is_grad_enabled()
    )  # fmt: skip


def counted_by(options: RowOptions, labels: Tensor) -> Tensor | None:
    """Which rows count (N,), None for all. A weight of 0 that has a gradient does."""
    token_weight = None if learns_weight(options) else options.token_weight
    return formula.counted_rows(labels, token_weight, options.ignore_index)


def times_learned_weight(
    run: Callable[[RowOptions], Any], target: Tensor, weight: Tensor | None, real: torch.dtype,
    options: RowOptions,
) -> Any:  # fmt: skip
    """The rows that `run` finds, their losses times a token_weight that has a gradient."""
    assert options.token_weight is not None
    token_weight = options.token_weight.to(real)
    rows = run(options._replace(reduction="none", num_items=None, token_weight=None))
    loss = rows.loss * token_weight
    if options.num_items is not None or options.reduction == "mean":
        divisor = options.divisor(real, loss.device)
        if divisor is None:
            target = target if target.dim() == 1 else as_rows(target)
            counted = counted_by(options, target)
            divisor = formula.total_weight(target, counted, weight, real, token_weight)
        loss = loss.sum() / divisor
    elif options.reduction == "sum":
        loss = loss.sum()
    return rows._replace(loss=loss)


def _scaled(
    logits: Tensor, target: Tensor, options: RowOptions
) -> tuple[Tensor, Tensor, RowOptions]:
    """Rows times a logit_scale that is no number for an op, their target, and 1 in its place."""
    scale = options.scale_as_tensor()
    if scale is None:
        return logits, target, options
    rows, target = as_rows(logits), target if target.dim() == 1 else as_rows(target)
    counted = None
    if target.dim() == 1:
        counted = counted_by(options, target)
        assert counted is not None
        if options.return_stats:  # the log-sum-exp of an ignored row may be used
            counted = counted | rows.detach().isfinite().all(1)
    return times_scale(rows, scale, counted), target, options._replace(logit_scale=1.0)


def times_scale(rows: Tensor, scale: Tensor, counted: Tensor | None) -> Tensor:
    """rows (N, D) times scale (), whose gradient gets nothing from rows that are not counted: that
    of a row of NaN would be 0 * NaN.

    One number a row, rounded to the rows' dtype after: so the gradient of the scale is summed over
    rows in the accumulation dtype. In float16 the sum of some thousand rows is inf.
    """
    scale = scale.to(torch.promote_types(scale.dtype, real_dtype(rows.dtype)))
    if counted is None:
        by_row = scale.expand(rows.shape[0])
    else:
        by_row = torch.where(counted, scale, scale.detach())
    return rows * by_row.to(rows.dtype).unsqueeze(1)


def _by_formula(
    logits: Tensor, target: Tensor, weight: Tensor | None, token_weight: Tensor | None,
    num_items: Tensor | None, options: Options, stats: bool,
) -> Rows:  # fmt: skip
    availability.ran("nll", "torch")
    if target.dim() == 1 and torch_state.readable(target):
        counted = formula.counted_rows(target, token_weight, options.ignore_index)
        check_range(logits, target[counted], options.ignore_index)
    given = (logits, target, weight, token_weight, num_items, options, stats)
    loss, lse, _, *found = formula.nll(*given)
    return Rows(loss, lse, *found) if stats else Rows(loss)


def torch_loss(input: Tensor, target: Tensor, weight: Tensor | None, options: RowOptions) -> Tensor:
    """torch's own function, for what it has all options of.

    In float32 for 16-bit logits: the sum of 10,000 losses of 15 is beyond float16, the mean is not.
    """
    target = _as_kernels_take_it(input, target)
    logits, wide = without_ignored(input, target, options.ignore_index), weight
    if input.dtype in (torch.bfloat16, torch.float16):
        logits, wide = logits.float(), None if weight is None else weight.float()
    try:
        loss = torch_cross_entropy(
            logits, target, wide, ignore_index=options.ignore_index, reduction=options.reduction,
            label_smoothing=options.label_smoothing,
        )  # fmt: skip
    except (IndexError, RuntimeError):
        # Our message names value and row. Where it finds nothing, torch's word stands.
        check_range(input, target, options.ignore_index)
        raise
    availability.ran("nll", "torch")
    dtype = input.dtype
    if is_probabilities(input, target):
        dtype = common_dtype(input, target, weight)
    return options.cast(loss, dtype)


def common_dtype(input: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype:
    """Of logits and probabilities: torch multiplies them and the weights, so the widest."""
    dtype = torch.promote_types(input.dtype, target.dtype)
    return dtype if weight is None else torch.promote_types(dtype, weight.dtype)


def without_ignored(input: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The logits, 0 where the target is ignored: there torch's gradient of NaN would be 0 * NaN."""
    if is_probabilities(input, target) or type(input) not in ACCEPTED:
        return input
    return zero_unless(target != ignore_index, input, class_dim(input))


def zero_unless(counted: Tensor, x: Tensor, axis: int) -> Tensor:
    """x, 0 where a position does not count; `axis` is that of its numbers. What sums over positions
    has 0 * NaN of those that are NaN."""
    if torch_state.readable(counted) and bool(counted.all()):
        return x
    return torch.where(counted.unsqueeze(axis), x, 0)


def _as_kernels_take_it(input: Tensor, target: Tensor) -> Tensor:
    """torch has uint8 indices for some shapes only, its error of a bad one is no UTF-8, and it
    smooths float32 probabilities of float64 logits in float32."""
    if not target.dtype.is_floating_point:
        return target.long()
    return target.to(torch.promote_types(input.dtype, target.dtype))


def may_overwrite(logits: Tensor, target: Tensor) -> bool:
    """Whether a gradient may lie over the logits. Raises RuntimeError where that was asked for and
    would destroy something."""
    if torch_state.recording() or torch_state.transforming():
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
    made_by: Any = base.grad_fn
    if hasattr(made_by, "_raw_saved_result"):  # as that of tanh, exp and softmax
        raise RuntimeError(
            "inplace_backward: expected an input that its own backward does not need, got the "
            f"output of {made_by.name()}"
        )
    if target.is_floating_point() and target.numel() and _storage(target) == _storage(logits):
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
