"""linear_cross_entropy: cross-entropy of hidden states, whose logits are made a tile at a time."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_variadic

from neglog import route, torch_state
from neglog.checks import (
    check_cross_entropy,
    check_extensions,
    check_flags,
    check_linear,
    check_loss_dtype,
    check_no_ignore_index,
    check_weight,
    rows_of_last_axis,
    to_logits_dtype,
    to_options,
    to_rows,
)
from neglog.distributed.tensors import any_distributed, on_whole_tensors
from neglog.losses._result import LossStats, change_rows, public, stats_of
from neglog.losses._rows import (
    RowOptions,
    common_dtype,
    counted_by,
    learns_weight,
    loss_of_rows,
    times_learned_weight,
    times_scale,
    zero_unless,
)
from neglog.losses._token_weight import shifted, weighted
from neglog.losses._types import Backend, LogitsDtype, Reduction, TileOptions
from neglog.losses.cross_entropy import to_indices, with_probabilities, within_mask
from neglog.ops.dtypes import real_dtype
from neglog.ops.linear_nll.autograd import cast, linear_nll
from neglog.ops.nll.autograd import Rows
from neglog.tiles import plan
from neglog.torch_state import autocast_dtype, under_autocast

if TYPE_CHECKING:
    from torch.nn import LinearCrossEntropyOptions

# Bytes of the workspace, filter_eps, logits_dtype.
Tiles: TypeAlias = tuple[int, float, torch.dtype | None]
TORCH_OPTIONS: Any = getattr(torch.nn, "LinearCrossEntropyOptions", ())  # new in torch 2.13


@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, reduction: Reduction = "mean", ignore_index: int | None = None,
    label_smoothing: float = 0.0, options: TileOptions | LinearCrossEntropyOptions | None = None,
    mask: Tensor | None = None, shift: bool = False, logit_scale: float | Tensor = 1.0,
    softcap: float | None = None, z_loss: float = 0.0, num_items: int | Tensor | None = None,
    token_weight: Tensor | None = None, per_sequence: bool | Tensor = False,
    return_stats: Literal[False] = False, loss_dtype: torch.dtype | None = None,
    logits_dtype: LogitsDtype = None, backend: Backend | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, reduction: Reduction = "mean", ignore_index: int | None = None,
    label_smoothing: float = 0.0, options: TileOptions | LinearCrossEntropyOptions | None = None,
    mask: Tensor | None = None, shift: bool = False, logit_scale: float | Tensor = 1.0,
    softcap: float | None = None, z_loss: float = 0.0, num_items: int | Tensor | None = None,
    token_weight: Tensor | None = None, per_sequence: bool | Tensor = False,
    return_stats: Literal[True], loss_dtype: torch.dtype | None = None,
    logits_dtype: LogitsDtype = None, backend: Backend | None = None,
) -> LossStats: ...  # fmt: skip
@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, reduction: Reduction = "mean", ignore_index: int | None = None,
    label_smoothing: float = 0.0, options: TileOptions | LinearCrossEntropyOptions | None = None,
    mask: Tensor | None = None, shift: bool = False, logit_scale: float | Tensor = 1.0,
    softcap: float | None = None, z_loss: float = 0.0, num_items: int | Tensor | None = None,
    token_weight: Tensor | None = None, per_sequence: bool | Tensor = False,
    return_stats: bool, loss_dtype: torch.dtype | None = None,
    logits_dtype: LogitsDtype = None, backend: Backend | None = None,
) -> Tensor | LossStats: ...  # fmt: skip
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, reduction: Reduction = "mean", ignore_index: int | None = None,
    label_smoothing: float = 0.0, options: TileOptions | LinearCrossEntropyOptions | None = None,
    mask: Tensor | None = None, shift: bool = False, logit_scale: float | Tensor = 1.0,
    softcap: float | None = None, z_loss: float = 0.0, num_items: int | Tensor | None = None,
    token_weight: Tensor | None = None, per_sequence: bool | Tensor = False,
    return_stats: bool = False, loss_dtype: torch.dtype | None = None,
    logits_dtype: LogitsDtype = None, backend: Backend | None = None,
) -> Tensor | LossStats:  # fmt: skip
    """cross_entropy(linear(input, linear_weight, linear_bias), target), without its logits.

    Rows of logits are made, turned into their gradient and used up a tile at a time, in a workspace
    of fixed size; rows that do not count are left out before the first gemm. With "mean" and
    "sum" the gradients are formed in the forward: 3 matmuls in all; with "none", 4.

    Args:
        input: (..., in_features).
        linear_weight: (C, in_features), or (C, d1, ..., dK, in_features) for an input
            (N, in_features), whose logits are (N, C, d1, ..., dK).
        target: class indices (...), or (N, d1, ..., dK); or probabilities of the logits' shape.
        linear_bias: linear_weight's shape without in_features.
        weight, reduction, label_smoothing: as in `cross_entropy`.
        ignore_index: None means -100; not with probabilities.
        options: None, a dict of the options below, or a torch.nn.LinearCrossEntropyOptions, which
            changes nothing here.
        mask: bool, broadcast to the targets' shape (...): True where a position counts.
        shift: position t of the next to last axis is held against target t + 1, as causal language
            models are trained; the last position does not count, and "none" is one shorter.
        logit_scale, softcap, z_loss, num_items, token_weight, per_sequence, loss_dtype, backend: as
            in `cross_entropy`. With `shift` the weights and boundaries are those of the targets
            before they are shifted, as the mask is. A logit_scale that requires grad multiplies the
            input and linear_bias instead.
        return_stats: LossStats(loss, logsumexp, correct, entropy); all 0 where a row is ignored.
        logits_dtype: None, or torch.float32 or "float32" for a head in 16 bits: its logits, and the
            gradient that is made of them, are then not rounded to 16 bits. The product is of the
            16-bit numbers, added up in float32.

    Options:
        workspace_mb: megabytes for the logits of one tile; otherwise NEGLOG_WORKSPACE_MB, else 64,
            on CUDA 1024. In bfloat16 a single tile for all rows may have besides it the memory of
            the float32 sum of linear_weight's gradient, which it makes needless.
        filter_eps: number, or "auto" for a 32nd of the dtype's eps (2**-12 in bfloat16). Default 0:
            nothing is left out. A class is left out of the matmuls of a tile where each of the
            tile's gradients of its logits is below e = filter_eps * g. Here g is the largest
            upstream gradient of a row's loss: 1 for "sum", 1 / divisor for "mean". The gradient of
            an input row is then wrong by less than e times the sum of the norms of the rows of
            linear_weight that were left out; that of a row of linear_weight by less than e times
            the sum of the norms of the inputs. The loss and linear_bias have no error. It saves
            time for a trained model only.

    With a K-dimensional linear_weight, probabilities or a token_weight of them that require grad,
    and on devices without kernels the logits are made in memory. Where gradients are formed in the
    forward the first backward has their memory; a second through the same graph (retain_graph) runs
    the forward anew.

    Raises:
        As `cross_entropy`, and RuntimeError for in_features, linear_bias or mask that do not fit.

    Source: torch.nn.functional.linear_cross_entropy; arXiv:2411.09009 for the idea.
    """
    if any_distributed(
        input, linear_weight, target, linear_bias, weight, mask, logit_scale, num_items,
        token_weight, per_sequence,
    ):  # fmt: skip
        return _of_tensors(locals())
    tensors = (input, linear_weight, target, linear_bias, weight, token_weight)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            linear_cross_entropy, tensors, input, linear_weight, target, linear_bias=linear_bias,
            weight=weight, reduction=reduction, ignore_index=ignore_index,
            label_smoothing=label_smoothing, options=options, mask=mask, shift=shift,
            logit_scale=logit_scale, softcap=softcap, z_loss=z_loss, num_items=num_items,
            token_weight=token_weight, per_sequence=per_sequence, return_stats=return_stats,
            loss_dtype=loss_dtype, logits_dtype=logits_dtype, backend=backend,
        )  # fmt: skip
    ignored, label_smoothing = to_options(
        -100 if ignore_index is None else ignore_index, reduction, label_smoothing
    )
    check_linear(input, linear_weight, linear_bias, target, mask, shift)
    check_flags(return_stats=return_stats)
    check_extensions(input, reduction, logit_scale, softcap, z_loss, num_items)
    check_loss_dtype(loss_dtype, input)
    tiles = (*tile_options(options, input), to_logits_dtype(logits_dtype, input))
    row_options = RowOptions(
        reduction, ignored, label_smoothing, logit_scale, softcap, z_loss, num_items, False,
        return_stats, loss_dtype,
    )  # fmt: skip
    head, weights = (input, linear_weight, linear_bias), (token_weight, per_sequence)
    if linear_weight.dim() > 2:
        result = _of_many_dimensions(
            head, target, ignore_index, weight, row_options, weights, tiles[2], backend
        )
    elif target.dim() == input.dim():  # one more than the positions
        check_no_ignore_index(ignore_index)
        result = _of_probabilities(
            head, target, mask, shift, weight, row_options, weights, tiles, backend
        )
    else:
        labels = labels_of(target, mask, shift, ignored)
        row_options = weighted(
            row_options, *weights, input, labels.shape, labels.flatten(), weight, shift
        )
        result = _of_labels(head, labels, weight, row_options, tiles, backend)
        if shift:
            result = change_rows(result, lambda x: x[..., :-1], reduction)
    return public(result, return_stats)


def tile_options(options: Any, input: Tensor) -> tuple[int, float]:
    """Bytes of the workspace, and filter_eps."""
    if options is None or isinstance(options, TORCH_OPTIONS):
        options = {}
    if not isinstance(options, dict) or not set(options) <= {"workspace_mb", "filter_eps"}:
        raise TypeError(
            "options: expected None, a dict of 'workspace_mb' and 'filter_eps', or a "
            f"torch.nn.LinearCrossEntropyOptions, got {options!r}"
        )
    filter_eps = options.get("filter_eps", 0.0)
    if filter_eps != "auto" and not (isinstance(filter_eps, (int, float)) and 0 <= filter_eps < 1):
        raise ValueError(f"filter_eps: expected 'auto' or 0 <= number < 1, got {filter_eps!r}")
    if filter_eps == "auto":
        filter_eps = torch.finfo(autocast_dtype(input)).eps / 32
    default = plan.CUDA_WORKSPACE_MB if input.is_cuda else plan.DEFAULT_WORKSPACE_MB
    return plan.workspace_bytes(options.get("workspace_mb"), default), float(filter_eps)


def labels_of(target: Tensor, mask: Tensor | None, shift: bool, ignored: int) -> Tensor:
    """The class that each position is held against; `ignored` where there is none."""
    target = target.long()  # a byte cannot hold `ignored`
    if mask is not None:
        target = torch.where(mask, target, ignored)
    if shift:  # the input stays as it lies: only its labels move
        target = F.pad(target, (0, 1), value=ignored)[..., 1:]
    return target


def _of_labels(
    head: tuple, labels: Tensor, weight: Tensor | None, options: RowOptions,
    tiles: Tiles, backend: str | None,
) -> LossStats:  # fmt: skip
    """Positions against their labels, by tiles if a kernel can."""
    positions, linear_weight = labels.shape, head[1]
    labels = labels.flatten()
    head = (rows_of_last_axis(head[0]), *head[1:])
    head, options = scaled_head(head, counted_by(options, labels), options)
    rows = head[0].to(autocast_dtype(head[0]))
    if weight is not None:
        check_weight(weight, linear_weight.shape[0], rows)
    workspace, filter_eps, logits_dtype = tiles
    where = route.choose(
        rows, linear_weight, backend=backend, weight=weight, workspace=workspace,
        logits_dtype=logits_dtype,
    )  # fmt: skip
    if where.backend == "torch":
        given = (where, head, rows.dtype, labels, weight, options)
        result = _with_logits_in_memory(*given, logits_dtype)
    else:
        result = loss_by_tiles(where, head, rows.dtype, labels, weight, options, filter_eps)
    return change_rows(result, lambda x: x.view(positions), options.reduction)


def scaled_head(
    head: tuple, counted: Tensor | None, options: RowOptions
) -> tuple[tuple, RowOptions]:
    """Rows (N, D) and bias times a logit_scale that is no number for an op, and 1 in its place."""
    given, linear_weight, linear_bias = head
    scale = options.scale_as_tensor()
    if scale is None:
        return head, options
    given = times_scale(given, scale, counted)
    if linear_bias is not None:  # its gradient is a sum over rows: in 16 bits, theirs overflows
        real = real_dtype(linear_bias.dtype)
        linear_bias = (linear_bias.to(real) * scale.to(real)).to(linear_bias.dtype)
    return (given, linear_weight, linear_bias), options._replace(logit_scale=1.0)


def loss_by_tiles(
    where: route.Route, head: tuple, dtype: torch.dtype, labels: Tensor, weight: Tensor | None,
    options: RowOptions, filter_eps: float = 0.0,
) -> LossStats:  # fmt: skip
    """Rows of a head (input (N, D), weight, bias), rounded to `dtype`, against labels (N,)."""
    rows = rows_by_tiles(where, head, dtype, labels, weight, options, filter_eps)
    return stats_of(rows._replace(loss=options.cast(rows.loss, dtype)))


def rows_by_tiles(
    where: route.Route, head: tuple, dtype: torch.dtype, labels: Tensor, weight: Tensor | None,
    options: RowOptions, filter_eps: float = 0.0,
) -> Rows:  # fmt: skip
    """The same as the op neglog::linear_nll has it; see `rows_by_op`."""
    rows, real = head[0], real_dtype(dtype)
    if learns_weight(options):
        run = partial(rows_by_tiles, where, head, dtype, labels, weight, filter_eps=filter_eps)
        return times_learned_weight(run, labels, weight, real, options)
    weight, token_weight = (
        None if x is None else x.to(real) for x in (weight, options.token_weight)
    )
    num_items = options.divisor(dtype, rows.device)
    # The upstream of "none" is not known yet, so its gradients wait for the backward.
    early = torch.is_grad_enabled() and options.reduction != "none"
    early = early and not torch_state.jit_tracing()
    wanted = [early and part is not None and part.requires_grad for part in head]
    return linear_nll(
        head, dtype, labels, weight, token_weight, num_items, *options.for_op(),
        options.return_stats, wanted, where.workspace, where.tile_dtype, filter_eps, where.demanded,
    )  # fmt: skip


def _with_logits_in_memory(
    where: route.Route, head: tuple, dtype: torch.dtype, labels: Tensor, weight: Tensor | None,
    options: RowOptions, logits_dtype: torch.dtype | None,
) -> LossStats:  # fmt: skip
    counted = counted_by(options, labels)
    assert counted is not None
    logits = logits_in_memory(head, dtype, counted, logits_dtype)
    options = options._replace(loss_dtype=options.loss_dtype or _loss_dtype(logits, dtype))
    return _stats_of(counted, loss_of_rows(where, logits, labels, weight, options))


def _loss_dtype(logits: Tensor, dtype: torch.dtype) -> torch.dtype | None:
    """Of wider logits than a head has: its own, or under autocast theirs."""
    return None if logits.dtype == dtype or under_autocast(logits) else dtype


def logits_in_memory(
    head: tuple, dtype: torch.dtype, counted: Tensor | None,
    logits_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Of rows that count; the gradient of the weight sums over all rows."""
    rows, linear_weight, linear_bias = cast(head, dtype)
    rows = rows if counted is None else zero_unless(counted, rows, -1)
    if logits_dtype in (None, dtype):
        return F.linear(rows, linear_weight, linear_bias)
    with torch.autocast(rows.device.type, enabled=False):
        return F.linear(*cast((rows, linear_weight, linear_bias), logits_dtype))


def _stats_of(counted: Tensor, result: LossStats) -> LossStats:
    """As the tiles have them, which make no logits of ignored rows."""
    if result.logsumexp is None:
        return result
    lse, entropy = (torch.where(counted, x, 0) for x in (result.logsumexp, result.entropy))
    return LossStats(result.loss, lse, result.correct, entropy)


def _of_probabilities(
    head: tuple, target: Tensor, mask: Tensor | None, shift: bool, weight: Tensor | None,
    options: RowOptions, weights: tuple[Any, Any], tiles: Tiles, backend: str | None,
) -> LossStats:  # fmt: skip
    """A distribution (..., C) for each position. weights: token_weight, per_sequence."""
    token_weight, per_sequence = weights
    positions = head[0].shape[:-1]
    if mask is not None:
        token_weight = within_mask(mask, token_weight)
    elif shift and token_weight is None:  # the last position has nothing to be held against
        token_weight = target.new_ones(positions, dtype=torch.bool)
    given = (head[0], positions, None, weight, shift)
    options = weighted(options, token_weight, per_sequence, *given)
    rows, target = rows_of_last_axis(head[0]), rows_of_last_axis(target)
    if mask is not None and learns_weight(options):  # which leaves no row out
        mask = shifted(mask.expand(positions)) if shift else mask.expand(positions)
        rows = zero_unless(mask.flatten(), rows, -1)
    if shift:  # row t and target t + 1, where they lie
        rows, target = rows[:-1], target[1:]
        options = options._replace(token_weight=_without_last(options.token_weight))
    result = _rows_of_probabilities((rows, *head[1:]), target, weight, options, tiles, backend)

    def by_position(x: Tensor) -> Tensor:
        count = positions.numel()
        x = F.pad(x, (0, count - x.shape[0])).view(positions)
        return x[..., :-1] if shift else x

    return change_rows(result, by_position, options.reduction)


def _without_last(x: Tensor | None) -> Tensor | None:
    return None if x is None else x[:-1]


def _rows_of_probabilities(
    head: tuple, target: Tensor, weight: Tensor | None, options: RowOptions,
    tiles: Tiles, backend: str | None,
) -> LossStats:  # fmt: skip
    """Rows (N, D) against distributions (N, C). By tiles, unless the target or token_weight has a
    gradient."""
    dtype = autocast_dtype(head[0])
    if weight is not None:
        check_weight(weight, head[1].shape[0], head[0].to(dtype), converts=True)
    counted = counted_by(options, target)
    head, options = scaled_head(head, counted, options)
    workspace, filter_eps, logits_dtype = tiles
    rows = head[0].to(dtype)
    where = route.choose(
        rows, head[1], backend=backend, weight=weight, workspace=workspace,
        logits_dtype=logits_dtype,
    )  # fmt: skip
    common = common_dtype(rows, target, weight)
    learns = learns_weight(options) or (target.requires_grad and torch.is_grad_enabled())
    if where.backend != "torch" and not learns:
        wide = torch.promote_types(where.tile_dtype, common)
        given = (where._replace(tile_dtype=wide), head, real_or(dtype, common), target, weight)
        found = rows_by_tiles(*given, options, filter_eps)
        return stats_of(found._replace(loss=options.cast(found.loss, common)))
    logits = logits_in_memory(head, dtype, counted, logits_dtype)
    result = loss_of_rows(where, *with_probabilities(logits, target, weight), weight, options)
    return result if counted is None else _stats_of(counted, result)


def real_or(dtype: torch.dtype, common: torch.dtype) -> torch.dtype:
    """What a head is rounded to: its own dtype, but for float64 of others float64."""
    return common if common == torch.float64 else dtype


def _of_many_dimensions(
    head: tuple, target: Tensor, ignore_index: int | None, weight: Tensor | None,
    options: RowOptions, weights: tuple[Any, Any], logits_dtype: torch.dtype | None,
    backend: str | None,
) -> LossStats:  # fmt: skip
    """Logits (N, C, d1, ..., dK), in memory."""
    input, linear_weight, linear_bias = cast(head, autocast_dtype(head[0]))
    flat = linear_weight.reshape(-1, linear_weight.shape[-1])
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    where = route.choose(input, linear_weight, backend=backend, weight=weight)
    positions = (input.shape[0], *linear_weight.shape[1:-1])
    if target.shape == positions:
        counted = target.long() != options.ignore_index
        input = zero_unless(counted.flatten(1).any(1), input, -1)
    made = logits_in_memory((input, flat, bias), input.dtype, None, logits_dtype)
    options = options._replace(loss_dtype=options.loss_dtype or _loss_dtype(made, input.dtype))
    logits = made.view(input.shape[0], *linear_weight.shape[:-1])
    if target.shape == logits.shape:
        check_no_ignore_index(ignore_index)
    probabilities = check_cross_entropy(logits, target, weight, options.ignore_index)
    labels = None if probabilities else to_indices(target)
    options = weighted(options, *weights, input, positions, labels, weight)
    if labels is None:
        result = loss_of_rows(where, *with_probabilities(logits, target, weight), weight, options)
    else:
        result = loss_of_rows(where, to_rows(logits), labels, weight, options)
        result = _stats_of(labels != options.ignore_index, result)
    return change_rows(result, lambda x: x.view(positions), options.reduction)


def _of_tensors(arguments: dict[str, Any]) -> Any:
    """Of DTensors."""
    from neglog.losses._sharded import of_shards, sharded_head
    from neglog.losses.vocab_parallel import vocab_parallel_linear_cross_entropy as parallel

    given, found = of_shards(arguments), None
    if given is not None:
        found = sharded_head(given, labels_of, linear_cross_entropy, parallel)
    return on_whole_tensors(linear_cross_entropy, arguments) if found is None else found
