"""Cross-entropy of logits: torch's function, and that of the positions a mask counts."""

from __future__ import annotations

from typing import Any, Literal, cast, overload

import torch
from torch import Tensor
from torch.nn import _reduction as torch_reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from neglog import route, torch_state
from neglog.checks import (
    check_cross_entropy,
    check_extensions,
    check_flags,
    check_loss_dtype,
    check_masked,
    check_weight,
    class_dim,
    is_probabilities,
    row_shape,
    rows_of_last_axis,
    to_options,
    to_positions,
    to_rows,
)
from neglog.distributed.tensors import any_distributed, on_whole_tensors
from neglog.losses._result import LossStats, change_rows, public
from neglog.losses._rows import (
    RowOptions,
    common_dtype,
    learns_weight,
    loss_of_rows,
    may_overwrite,
    plain_loss_of_rows,
    torch_loss,
    zero_unless,
)
from neglog.losses._token_weight import weighted
from neglog.losses._types import Backend, Reduction
from neglog.ops.memory import check_not_freed

# The ignore_index of positions outside a mask.
MASKED = -(2**63)


@overload
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    ignore_index: int = -100, reduce: bool | None = None, reduction: Reduction = "mean",
    label_smoothing: float = 0.0, *,
    logit_scale: float | Tensor = 1.0, softcap: float | None = None, z_loss: float = 0.0,
    num_items: int | Tensor | None = None, token_weight: Tensor | None = None,
    per_sequence: bool | Tensor = False, inplace_backward: bool = False,
    return_stats: Literal[False] = False, loss_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    ignore_index: int = -100, reduce: bool | None = None, reduction: Reduction = "mean",
    label_smoothing: float = 0.0, *,
    logit_scale: float | Tensor = 1.0, softcap: float | None = None, z_loss: float = 0.0,
    num_items: int | Tensor | None = None, token_weight: Tensor | None = None,
    per_sequence: bool | Tensor = False, inplace_backward: bool = False,
    return_stats: Literal[True], loss_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> LossStats: ...  # fmt: skip
@overload
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    ignore_index: int = -100, reduce: bool | None = None, reduction: Reduction = "mean",
    label_smoothing: float = 0.0, *,
    logit_scale: float | Tensor = 1.0, softcap: float | None = None, z_loss: float = 0.0,
    num_items: int | Tensor | None = None, token_weight: Tensor | None = None,
    per_sequence: bool | Tensor = False, inplace_backward: bool = False,
    return_stats: bool, loss_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> Tensor | LossStats: ...  # fmt: skip
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    ignore_index: int = -100, reduce: bool | None = None, reduction: Reduction = "mean",
    label_smoothing: float = 0.0, *,
    logit_scale: float | Tensor = 1.0, softcap: float | None = None, z_loss: float = 0.0,
    num_items: int | Tensor | None = None, token_weight: Tensor | None = None,
    per_sequence: bool | Tensor = False, inplace_backward: bool = False,
    return_stats: bool = False, loss_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> Tensor | LossStats:  # fmt: skip
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
        logit_scale: multiplies the logits first. A tensor that requires grad gets its gradient;
            the product is then made in memory, as large as the logits.
        softcap: if given, z = softcap * tanh(logit_scale * input / softcap) replaces the logits
            (Gemma 2, arXiv:2408.00118).
        z_loss: from 0, adds z_loss * logsumexp(z)**2 to each row, times its target's class weight
            (PaLM, arXiv:2204.02311).
        num_items: if given, the loss is the sum over this number, for gradient accumulation over
            batches of unequal length. Not with reduction="none". Over 0 it is inf, or NaN where the
            sum is 0.
        token_weight: a weight for each position, of the targets' shape or one that broadcasts to
            it. It multiplies the position's loss, and "mean" divides by the sum of token_weight,
            times the class weight. A position of weight 0 counts nothing, as with ignore_index. One
            that requires grad gets its gradient; then a weight of 0 is a factor like others.
        per_sequence: for "mean". True: the mean over sequences of each one's own mean, where the
            last axis of the targets is that of a sequence. A Tensor (S + 1,), int32 or int64: the
            boundaries of S sequences in the flattened positions, 0 first, as flash attention's
            cu_seqlens. A sequence without counted positions counts nothing. With num_items, the sum
            of the sequences' means over num_items.
        inplace_backward: the gradient of the logits overwrites `input` during the forward, which
            needs no memory beyond O(N). `input` must not be a leaf that requires grad. It must not
            be read afterwards: autograd raises if an operation before this one needs it for its
            backward, but one after it gets wrong numbers. Without a gradient to compute, with a
            target that requires grad, under torch.func and in a graph nothing is overwritten.
        return_stats: return LossStats(loss, logsumexp, correct, entropy) instead of the loss.
        loss_dtype: the dtype of the loss. None: that of the input, or under autocast float32.
            torch.float32: the loss of 16-bit logits as it was computed, not rounded. Also
            torch.float64, to which it is widened, and the input's own.
        backend: "cython", "numba", "cuda" or "torch"; None lets neglog.route choose.

    Raises:
        IndexError: a target is out of range, and its value and row are named; input is a scalar.
        ValueError: batch sizes differ, the reduction or backend is unknown, num_items without a
            sum, softcap not above 0, z_loss or num_items below 0, another loss_dtype.
        RuntimeError: other shapes, dtypes, label_smoothing, the length of weight.
        TypeError: input or target is not a tensor, an option not of its type.
    """
    if any_distributed(input, target, weight, logit_scale, num_items, token_weight, per_sequence):
        return _of_tensors(locals())
    tensors = (input, target, weight, token_weight)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            cross_entropy, tensors, input, target, weight, size_average,
            ignore_index, reduce, reduction, label_smoothing, logit_scale=logit_scale,
            softcap=softcap, z_loss=z_loss, num_items=num_items, token_weight=token_weight,
            per_sequence=per_sequence, inplace_backward=inplace_backward,
            return_stats=return_stats, loss_dtype=loss_dtype, backend=backend,
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = cast(Reduction, torch_reduction.legacy_get_string(size_average, reduce))
    if reduction == "elementwise_mean":
        torch_reduction.get_enum(reduction)  # torch's warning that the name is deprecated
        reduction = "mean"
    ignore_index, label_smoothing = to_options(ignore_index, reduction, label_smoothing)
    probabilities = check_cross_entropy(input, target, weight, ignore_index)
    check_loss_dtype(loss_dtype, input)
    plain = (
        torch_state.eager_on_cpu(input) and input.dim() == 2 and not probabilities
        and weight is None and softcap is None and num_items is None and loss_dtype is None
        and inplace_backward is False and return_stats is False
        and token_weight is None and per_sequence is False
        and type(logit_scale) is float and logit_scale == 1.0
        and type(z_loss) is float and z_loss == 0.0
    )  # fmt: skip
    if plain:
        where = route.choose(input, backend=backend)
        if where.backend != "torch":
            rows = to_indices(target)
            return plain_loss_of_rows(where, input, rows, reduction, ignore_index, label_smoothing)
    options = RowOptions(
        reduction, ignore_index, label_smoothing, logit_scale, softcap, z_loss, num_items,
        inplace_backward, return_stats, loss_dtype,
    )  # fmt: skip
    labels = None if probabilities else to_indices(target)
    options = weighted(options, token_weight, per_sequence, input, row_shape(input), labels, weight)
    extends_torch = options.extends_torch()
    if extends_torch:
        check_flags(inplace_backward=inplace_backward, return_stats=return_stats)
        check_extensions(input, reduction, logit_scale, softcap, z_loss, num_items)
    where = route.choose(input, backend=backend, weight=weight)
    if where.backend == "torch" and not extends_torch:
        return torch_loss(input, target, weight, options)
    arrange = to_rows if where.backend in ("cuda", "torch") else to_positions
    if labels is None:
        common = common_dtype(input, target, weight)
        logits, labels = arrange(input.to(common)), arrange(target.to(common))
    else:
        logits = arrange(input)
    result = loss_of_rows(where, logits, labels, weight, options)
    if reduction != "none" and not return_stats:
        return result.loss
    shape = row_shape(input)
    return public(change_rows(result, lambda x: x.view(shape), reduction), return_stats)


def to_indices(target: Tensor) -> Tensor:
    """Class indices (N,), int64."""
    if target.dim() == 1 and target.dtype is torch.int64:
        return target
    check_not_freed(target, "target")
    return target.flatten().long()


def with_probabilities(
    input: Tensor, target: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Logits and probabilities (N, V) of one dtype."""
    common = common_dtype(input, target, weight)
    return to_rows(input.to(common)), to_rows(target.to(common))


@overload
def masked_cross_entropy(
    input: Tensor, target: Tensor, mask: Tensor, weight: Tensor | None = None,
    reduction: Reduction = "mean", label_smoothing: float = 0.0, *,
    logit_scale: float | Tensor = 1.0, softcap: float | None = None, z_loss: float = 0.0,
    num_items: int | Tensor | None = None, token_weight: Tensor | None = None,
    per_sequence: bool | Tensor = False, inplace_backward: bool = False,
    return_stats: Literal[False] = False, loss_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def masked_cross_entropy(
    input: Tensor, target: Tensor, mask: Tensor, weight: Tensor | None = None,
    reduction: Reduction = "mean", label_smoothing: float = 0.0, *,
    logit_scale: float | Tensor = 1.0, softcap: float | None = None, z_loss: float = 0.0,
    num_items: int | Tensor | None = None, token_weight: Tensor | None = None,
    per_sequence: bool | Tensor = False, inplace_backward: bool = False,
    return_stats: Literal[True], loss_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> LossStats: ...  # fmt: skip
@overload
def masked_cross_entropy(
    input: Tensor, target: Tensor, mask: Tensor, weight: Tensor | None = None,
    reduction: Reduction = "mean", label_smoothing: float = 0.0, *,
    logit_scale: float | Tensor = 1.0, softcap: float | None = None, z_loss: float = 0.0,
    num_items: int | Tensor | None = None, token_weight: Tensor | None = None,
    per_sequence: bool | Tensor = False, inplace_backward: bool = False,
    return_stats: bool, loss_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> Tensor | LossStats: ...  # fmt: skip
def masked_cross_entropy(
    input: Tensor, target: Tensor, mask: Tensor, weight: Tensor | None = None,
    reduction: Reduction = "mean", label_smoothing: float = 0.0, *,
    logit_scale: float | Tensor = 1.0, softcap: float | None = None, z_loss: float = 0.0,
    num_items: int | Tensor | None = None, token_weight: Tensor | None = None,
    per_sequence: bool | Tensor = False, inplace_backward: bool = False,
    return_stats: bool = False, loss_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> Tensor | LossStats:  # fmt: skip
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
    if any_distributed(
        input, target, mask, weight, logit_scale, num_items, token_weight, per_sequence
    ):
        return _masked_of_tensors(locals())
    check_masked(input, target, mask)
    _, label_smoothing = to_options(MASKED, reduction, label_smoothing)
    check_flags(inplace_backward=inplace_backward, return_stats=return_stats)
    check_extensions(input, reduction, logit_scale, softcap, z_loss, num_items)
    check_loss_dtype(loss_dtype, input)
    probabilities = is_probabilities(input, target)
    if weight is not None:
        check_weight(weight, input.shape[-1], input, probabilities)
    options = RowOptions(
        reduction, MASKED, label_smoothing, logit_scale, softcap, z_loss, num_items,
        inplace_backward, return_stats, loss_dtype,
    )  # fmt: skip
    where = route.choose(input, backend=backend, weight=weight)
    positions = input.shape[:-1]
    counted = mask.expand(positions).flatten()
    logits = rows_of_last_axis(input)
    if probabilities:
        labels, token_weight = None, within_mask(mask, token_weight)
    else:
        # A counted target that is MASKED itself moves to the next number, which is no class either.
        index = to_indices(target).clamp(min=MASKED + 1)
        labels = torch.where(counted, index, MASKED)
    options = weighted(options, token_weight, per_sequence, input, positions, labels, weight)
    if labels is None:
        if learns_weight(options):  # which leaves no row out
            logits = zero_unless(counted, logits, -1)
        labels = rows_of_last_axis(target)
        result = _of_probabilities(where, logits, labels, counted, weight, options)
    else:
        result = loss_of_rows(where, logits, labels, weight, options)
    if return_stats:
        result = _zero_stats(result.loss, result, counted)
    return public(change_rows(result, lambda x: x.view(positions), reduction), return_stats)


def _of_probabilities(
    where: route.Route, logits: Tensor, target: Tensor, counted: Tensor, weight: Tensor | None,
    options: RowOptions,
) -> LossStats:  # fmt: skip
    """Rows, of which token_weight leaves out those that are not counted. Where they must be
    converted to the wider dtype, which copies them, those that count are copied alone."""
    common = common_dtype(logits, target, weight)
    alike = logits.dtype == target.dtype == common
    if alike or not torch_state.concrete(counted):
        return loss_of_rows(where, logits.to(common), target.to(common), weight, options)
    if options.inplace_backward:
        may_overwrite(logits, target)  # its errors do not depend on the mask
    rows = counted.nonzero().squeeze(1)
    selected = with_probabilities(logits[rows], target[rows], weight)
    assert options.token_weight is not None
    of_rows = options._replace(token_weight=options.token_weight[rows])
    result = loss_of_rows(where, *selected, weight, of_rows)

    def among_all(x: Tensor) -> Tensor:
        return x.new_zeros(counted.shape[0]).index_put((rows,), x)

    return change_rows(result, among_all, options.reduction)


def within_mask(mask: Tensor, token_weight: Any) -> Tensor:
    """token_weight, 0 where the mask is False: a distribution as target has no ignore_index."""
    return torch.where(mask, token_weight, 0) if isinstance(token_weight, Tensor) else mask


def _zero_stats(loss: Tensor, stats: LossStats, counted: Tensor) -> LossStats:
    """Statistics that are 0 where the mask is False."""
    return LossStats(loss, *(x.masked_fill(~counted, 0) for x in stats[1:]))


# DTensors


def _of_tensors(arguments: dict[str, Any]) -> Any:
    from neglog.losses._sharded import of_shards, sharded_logits
    from neglog.losses.vocab_parallel import vocab_parallel_cross_entropy

    legacy = {name: arguments[name] for name in ("size_average", "reduce")}
    given = of_shards(arguments)
    plain = given is not None and all(x is None for x in legacy.values())
    if given is not None and plain and isinstance(given["input"], Tensor):
        given = {name: x for name, x in given.items() if name not in legacy}
        axis = class_dim(given["input"])
        found = sharded_logits(given, axis, cross_entropy, vocab_parallel_cross_entropy)
        if found is not None:
            return found
    return on_whole_tensors(cross_entropy, arguments)


def _masked_of_tensors(arguments: dict[str, Any]) -> Any:
    from neglog.losses._sharded import of_shards, sharded_logits

    given = of_shards(arguments)
    if given is not None and isinstance(given["input"], Tensor):
        axis = given["input"].dim() - 1
        found = sharded_logits(given, axis, masked_cross_entropy, _masked_of_classes)
        if found is not None:
            return found
    return on_whole_tensors(masked_cross_entropy, arguments)


def _masked_of_classes(
    input: Tensor, *, target: Tensor, mask: Tensor, return_stats: bool, **options: Any
) -> Any:
    """Logits (..., C) of which each process of a group has some classes."""
    from neglog.losses.vocab_parallel import vocab_parallel_cross_entropy

    positions, counted = input.shape[:-1], mask.flatten()
    index = to_indices(target).clamp(min=MASKED + 1)
    result: Any = vocab_parallel_cross_entropy(
        rows_of_last_axis(input), torch.where(counted, index, MASKED), ignore_index=MASKED,
        return_stats=return_stats, **options,
    )  # fmt: skip
    if not return_stats:
        return result.view(positions) if result.dim() else result
    result = _zero_stats(result.loss, result, counted)
    return change_rows(result, lambda x: x.view(positions), options["reduction"])
