"""Cross-entropy over the processes of a group, each of which has some of the classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from neglog import availability, route, torch_state
from neglog.checks import (
    check_classes,
    check_cross_entropy,
    check_extensions,
    check_flags,
    check_linear,
    check_loss_dtype,
    check_no_ignore_index,
    check_weight,
    class_dim,
    row_shape,
    rows_of_last_axis,
    to_options,
    to_rows,
)
from neglog.distributed import vocab_linear, vocab_parallel
from neglog.distributed.groups import as_term, check_group, learning, meet
from neglog.distributed.vocab_parallel import shared
from neglog.distributed.vocab_rows import shard_of
from neglog.losses._result import LossStats, change_rows, public, without_stats
from neglog.losses._rows import RowOptions, common_dtype, may_overwrite, times_scale, zero_unless
from neglog.losses._types import Backend, Reduction, TileOptions
from neglog.losses.cross_entropy import cross_entropy, to_indices
from neglog.losses.linear_cross_entropy import labels_of, linear_cross_entropy, tile_options
from neglog.ops.dtypes import divides_late, real_dtype
from neglog.ops.linear_nll.autograd import cast
from neglog.ops.nll.formula import total_weight
from neglog.ops.nll.schema import MEAN, NONE, Options
from neglog.torch_state import autocast_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@overload
def vocab_parallel_cross_entropy(
    input: Tensor, target: Tensor, group: ProcessGroup | None = None, *,
    vocab_size: int | None = None, weight: Tensor | None = None, reduction: Reduction = "mean",
    ignore_index: int = -100, label_smoothing: float = 0.0, logit_scale: float | Tensor = 1.0,
    softcap: float | None = None, z_loss: float = 0.0, num_items: int | Tensor | None = None,
    inplace_backward: bool = False, return_stats: Literal[False] = False,
    loss_dtype: torch.dtype | None = None, backend: Backend | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def vocab_parallel_cross_entropy(
    input: Tensor, target: Tensor, group: ProcessGroup | None = None, *,
    vocab_size: int | None = None, weight: Tensor | None = None, reduction: Reduction = "mean",
    ignore_index: int = -100, label_smoothing: float = 0.0, logit_scale: float | Tensor = 1.0,
    softcap: float | None = None, z_loss: float = 0.0, num_items: int | Tensor | None = None,
    inplace_backward: bool = False, return_stats: Literal[True],
    loss_dtype: torch.dtype | None = None, backend: Backend | None = None,
) -> LossStats: ...  # fmt: skip
@overload
def vocab_parallel_cross_entropy(
    input: Tensor, target: Tensor, group: ProcessGroup | None = None, *,
    vocab_size: int | None = None, weight: Tensor | None = None, reduction: Reduction = "mean",
    ignore_index: int = -100, label_smoothing: float = 0.0, logit_scale: float | Tensor = 1.0,
    softcap: float | None = None, z_loss: float = 0.0, num_items: int | Tensor | None = None,
    inplace_backward: bool = False, return_stats: bool,
    loss_dtype: torch.dtype | None = None, backend: Backend | None = None,
) -> Tensor | LossStats: ...  # fmt: skip
def vocab_parallel_cross_entropy(
    input: Tensor, target: Tensor, group: ProcessGroup | None = None, *,
    vocab_size: int | None = None, weight: Tensor | None = None, reduction: Reduction = "mean",
    ignore_index: int = -100, label_smoothing: float = 0.0, logit_scale: float | Tensor = 1.0,
    softcap: float | None = None, z_loss: float = 0.0, num_items: int | Tensor | None = None,
    inplace_backward: bool = False, return_stats: bool = False,
    loss_dtype: torch.dtype | None = None, backend: Backend | None = None,
) -> Tensor | LossStats:  # fmt: skip
    """`cross_entropy` of logits whose class axis is shared out to the processes of a group.

    Each process has the logits of its own classes, and gets the loss of all and the gradient of its
    own. One collective of a few numbers a row in the forward, none in the backward.

    Args:
        input: this process's logits, of the shapes of `cross_entropy`, with its own classes on the
            class axis. The classes are shared out in the order of the ranks as torch.chunk and
            DTensor do it: ceil(V / world) each, and what is left to the last.
        target: class indices among all V classes, alike in all processes; or the probabilities of
            this process's classes, shaped as input.
        group: a torch.distributed process group. None: the default one, or where there is none this
            process alone.
        vocab_size: V. None: as many classes as input has, times the processes.
        weight: (V), a weight for each class, of all classes.
        reduction, ignore_index, label_smoothing, logit_scale, softcap, z_loss, num_items,
            inplace_backward, return_stats, loss_dtype, backend: as in `cross_entropy`; smoothing is
            over all V classes. A logit_scale that requires grad gets its whole gradient in each
            process.

    Every process returns the same loss. The backward counts it once: divide it by nothing.

    Raises as `cross_entropy`, and RuntimeError where this process should have another number of
    classes, or where the processes differ in shape, dtype, target or an option.

    Source: Megatron-LM (arXiv:1909.08053), its parallel cross-entropy.
    """
    group = _group_of(group)
    options = RowOptions(
        reduction, ignore_index, label_smoothing, logit_scale, softcap, z_loss, num_items,
        inplace_backward, return_stats, loss_dtype,
    )  # fmt: skip
    if group is None:
        return cross_entropy(input, target, weight, backend=backend, **options._asdict())
    ignore_index, label_smoothing = to_options(ignore_index, reduction, label_smoothing)
    options = options._replace(ignore_index=ignore_index, label_smoothing=label_smoothing)
    probabilities = check_cross_entropy(input, target, None, ignore_index)
    _check_options(options, input)
    vocab = _vocab_of("input", input.shape[class_dim(input)], vocab_size, group)
    if weight is not None:
        check_weight(weight, vocab, input, probabilities)
    where = route.choose(input, backend=backend, weight=weight)
    if probabilities:
        common = common_dtype(input, target, weight)
        logits, target_rows = to_rows(input.to(common)), to_rows(target.to(common))
    else:
        logits, target_rows = to_rows(input), to_indices(target)
    _meet(where, group, logits, target_rows, vocab, weight, options, input)
    result = _of_rows(where, group, vocab, logits, target_rows, weight, options)
    shape = row_shape(input)
    return public(change_rows(result, lambda x: x.view(shape), reduction), return_stats)


def _group_of(group: Any) -> Any:
    if group is None:
        ready = distributed.is_available() and distributed.is_initialized()
        return distributed.group.WORLD if ready else None
    check_group(group)
    return group


def _check_options(options: RowOptions, input: Tensor) -> None:
    check_flags(inplace_backward=options.inplace_backward, return_stats=options.return_stats)
    check_extensions(
        input, options.reduction, options.logit_scale, options.softcap, options.z_loss,
        options.num_items,
    )  # fmt: skip
    check_loss_dtype(options.loss_dtype, input)


def _vocab_of(name: str, classes: Any, vocab_size: int | None, group: Any) -> Any:
    """V, of which this process has what it should."""
    world, rank = distributed.get_world_size(group), distributed.get_rank(group)
    if vocab_size is None:
        return classes * world
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size: expected an int or None, got {type(vocab_size).__name__}")
    own = shard_of(vocab_size, rank, world)
    if classes != own.stop - own.start:
        raise RuntimeError(
            f"{name}: expected {own.stop - own.start} classes, those of rank {rank} of {world} "
            f"that share out vocab_size {vocab_size}, got {classes}"
        )
    return vocab_size


def _meet(
    where: route.Route, group: Any, x: Tensor, target: Tensor, vocab: Any, weight: Tensor | None,
    options: RowOptions, *learned: Tensor | None, features: Any = None, workspace: int = 0,
) -> None:  # fmt: skip
    """Raises where the processes do not agree; see groups.meet. On a device the targets are not
    compared: it would be waited for."""
    if torch_state.compiling():
        return
    terms: dict[str, Any] = {
        "rows": x.shape[0], "in_features": features, "vocab_size": vocab, "workspace": workspace,
        "reduction": options.reduction, "ignore_index": options.ignore_index,
        "label_smoothing": as_term(options.label_smoothing), "softcap": as_term(options.softcap),
        "logit_scale": as_term(options.logit_scale), "z_loss": as_term(options.z_loss),
        "num_items": as_term(options.num_items), "weight": weight is not None,
        "return_stats": options.return_stats, "dtype of target": target.dtype,
        "backend": where.sends, "requires_grad": learning(*learned),
    }  # fmt: skip
    if target.is_cpu and target.dim() == 1 and torch_state.readable(target):
        terms["target"] = _checksum(target)
    call = "cross_entropy" if features is None else "linear_cross_entropy"
    meet(f"vocab_parallel_{call}", group, x, 0, **terms)


def _checksum(target: Tensor) -> int:
    """Another for other numbers, or another order of them, but by chance."""
    places = torch.arange(1, len(target) + 1, device=target.device) * 2654435761 % (1 << 31)
    return int((target * places).sum() % (1 << 61))


def _check_range(target: Tensor, vocab: int, ignore_index: int) -> None:
    """As the kernels say it, which see a process's own classes alone."""
    if target.dim() == 1 and torch_state.readable(target):
        check_classes(target, vocab, ignore_index)


def _divisor(
    target: Tensor, weight: Tensor | None, options: RowOptions, dtype: torch.dtype
) -> Tensor:
    """Of the mean: num_items, or the sum of the targets' weights."""
    given = options.divisor(dtype, target.device)
    real = real_dtype(dtype)
    if given is not None:
        return given
    if target.dim() == 2:
        return torch.full((), target.shape[0], dtype=real, device=target.device)
    return total_weight(target, target != options.ignore_index, weight, real)


def _of_rows(
    where: route.Route, group: Any, vocab: Any, logits: Tensor, target: Tensor,
    weight: Tensor | None, options: RowOptions,
) -> LossStats:  # fmt: skip
    """Logits (N, V_C) against targets (N,) or (N, V_C)."""
    _check_range(target, vocab, options.ignore_index)
    name, real = str(group.group_name), real_dtype(logits.dtype)
    scale = options.scale_as_tensor()
    if scale is not None:
        counted = None if target.dim() == 2 else target != options.ignore_index
        if options.return_stats and counted is not None:
            counted = counted | logits.detach().isfinite().all(1)
        logits = times_scale(logits, shared(scale, name), counted)
        options = options._replace(logit_scale=1.0)
    weight = None if weight is None else weight.to(real)
    for_op = options.for_op()
    divisor = _divisor(target, weight, options, logits.dtype)
    given = (
        logits, target, weight, vocab, *for_op[1:], options.return_stats, name, where.demanded,
    )  # fmt: skip
    correct, entropy = logits.new_empty(0, dtype=torch.bool), logits.new_empty(0)
    if where.backend == "torch":
        availability.ran("vocab_nll", "torch")
        a = vocab_parallel.forward.Arguments(*given)
        rows, lse = vocab_parallel.by_formula(a)
        if options.return_stats:
            with torch.no_grad():
                _, _, _, correct, entropy, _ = vocab_parallel.forward(*given)
    elif options.inplace_backward and for_op.known() and may_overwrite(logits, target):
        a = vocab_parallel.forward.Arguments(*given)
        upstream = divisor.new_ones(())
        if for_op.reduction == MEAN and not divides_late(logits.dtype):
            upstream = torch.where(divisor == 0, 1, 1 / divisor)
        rows, lse, correct, entropy = vocab_parallel.InPlace.apply(logits, a, upstream)
    else:
        rows, lse, _, correct, entropy, _ = vocab_parallel.forward(*given)
    loss = options.cast(_reduced(rows, for_op, divisor), logits.dtype)
    if not options.return_stats:
        return without_stats(loss)
    return LossStats(loss, lse, correct, entropy)


def _reduced(rows: Tensor, options: Options, divisor: Tensor) -> Tensor:
    if options.reduction == NONE:
        return rows
    loss = rows.sum(dtype=torch.float64).to(rows.dtype)
    return loss / divisor if options.reduction == MEAN else loss


# Of a head


@overload
def vocab_parallel_linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, group: ProcessGroup | None = None, *,
    reduce_hidden_grad: bool = True, vocab_size: int | None = None,
    linear_bias: Tensor | None = None, weight: Tensor | None = None,
    reduction: Reduction = "mean", ignore_index: int | None = None, label_smoothing: float = 0.0,
    options: TileOptions | None = None, mask: Tensor | None = None, shift: bool = False,
    logit_scale: float | Tensor = 1.0, softcap: float | None = None, z_loss: float = 0.0,
    num_items: int | Tensor | None = None, return_stats: Literal[False] = False,
    loss_dtype: torch.dtype | None = None, backend: Backend | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def vocab_parallel_linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, group: ProcessGroup | None = None, *,
    reduce_hidden_grad: bool = True, vocab_size: int | None = None,
    linear_bias: Tensor | None = None, weight: Tensor | None = None,
    reduction: Reduction = "mean", ignore_index: int | None = None, label_smoothing: float = 0.0,
    options: TileOptions | None = None, mask: Tensor | None = None, shift: bool = False,
    logit_scale: float | Tensor = 1.0, softcap: float | None = None, z_loss: float = 0.0,
    num_items: int | Tensor | None = None, return_stats: Literal[True],
    loss_dtype: torch.dtype | None = None, backend: Backend | None = None,
) -> LossStats: ...  # fmt: skip
@overload
def vocab_parallel_linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, group: ProcessGroup | None = None, *,
    reduce_hidden_grad: bool = True, vocab_size: int | None = None,
    linear_bias: Tensor | None = None, weight: Tensor | None = None,
    reduction: Reduction = "mean", ignore_index: int | None = None, label_smoothing: float = 0.0,
    options: TileOptions | None = None, mask: Tensor | None = None, shift: bool = False,
    logit_scale: float | Tensor = 1.0, softcap: float | None = None, z_loss: float = 0.0,
    num_items: int | Tensor | None = None, return_stats: bool,
    loss_dtype: torch.dtype | None = None, backend: Backend | None = None,
) -> Tensor | LossStats: ...  # fmt: skip
def vocab_parallel_linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, group: ProcessGroup | None = None, *,
    reduce_hidden_grad: bool = True, vocab_size: int | None = None,
    linear_bias: Tensor | None = None, weight: Tensor | None = None,
    reduction: Reduction = "mean", ignore_index: int | None = None, label_smoothing: float = 0.0,
    options: TileOptions | None = None, mask: Tensor | None = None, shift: bool = False,
    logit_scale: float | Tensor = 1.0, softcap: float | None = None, z_loss: float = 0.0,
    num_items: int | Tensor | None = None, return_stats: bool = False,
    loss_dtype: torch.dtype | None = None, backend: Backend | None = None,
) -> Tensor | LossStats:  # fmt: skip
    """`linear_cross_entropy` with a head whose classes are shared out to the processes of a group.

    Each process has the hidden states of all rows and the weights of its own classes. One
    collective of a few numbers a row for each tile of rows, of which there is one where a process's
    logits fit in the workspace; in the backward an all-reduce of the hidden states' gradient.

    Args:
        input: (..., in_features), alike in all processes.
        linear_weight, linear_bias: of this process's classes, (V_C, ..., in_features) and without
            in_features; the classes are shared out as in `vocab_parallel_cross_entropy`.
        target: class indices among all V classes, alike in all processes; or the probabilities of
            this process's classes, with its logits' shape.
        reduce_hidden_grad: input gets its whole gradient. False: the part of this process's
            classes, for who sums the parts himself, as by a reduce-scatter over a sequence.
        group, vocab_size, weight: as in `vocab_parallel_cross_entropy`.
        reduction, ignore_index, label_smoothing, options, mask, shift, logit_scale, softcap,
            z_loss, num_items, return_stats, loss_dtype, backend: as in `linear_cross_entropy`;
            filter_eps must be 0.

    Raises as `linear_cross_entropy`, and as `vocab_parallel_cross_entropy`. A linear_weight that
    fully_shard holds is shared out too, but every process has rows of its own then: their targets
    differ, which on the CPU is the error that it is.

    Source: Megatron-LM (arXiv:1909.08053); arXiv:2411.09009 for the tiles.
    """
    group = _group_of(group)
    check_flags(reduce_hidden_grad=reduce_hidden_grad, return_stats=return_stats)
    if group is None:
        return linear_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, weight=weight,
            reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing,
            options=options, mask=mask, shift=shift, logit_scale=logit_scale, softcap=softcap,
            z_loss=z_loss, num_items=num_items, return_stats=return_stats, loss_dtype=loss_dtype,
            backend=backend,
        )  # fmt: skip
    ignored, label_smoothing = to_options(
        -100 if ignore_index is None else ignore_index, reduction, label_smoothing
    )
    check_linear(input, linear_weight, linear_bias, target, mask, shift)
    row_options = RowOptions(
        reduction, ignored, label_smoothing, logit_scale, softcap, z_loss, num_items, False,
        return_stats, loss_dtype,
    )  # fmt: skip
    _check_options(row_options, input)
    workspace, filter_eps = tile_options(options, input)
    if filter_eps:
        raise ValueError(f"filter_eps: expected 0 over processes, got {filter_eps}")
    vocab = _vocab_of("linear_weight", linear_weight.shape[0], vocab_size, group)
    head = (input, linear_weight, linear_bias)
    if linear_weight.dim() > 2 or target.dim() == input.dim():
        if reduce_hidden_grad:
            head = (shared(input, str(group.group_name)), linear_weight, linear_bias)
        result = _with_logits(
            group, vocab, head, target, ignore_index, mask, shift, weight, row_options, backend
        )
        return public(result, return_stats)
    labels = labels_of(target, mask, shift, ignored)
    tiles = (workspace, reduce_hidden_grad)
    result = _by_tiles(group, vocab, head, labels, weight, row_options, tiles, backend)
    if shift:
        result = change_rows(result, lambda x: x[..., :-1], reduction)
    return public(result, return_stats)


def _by_tiles(
    group: Any, vocab: Any, head: tuple, labels: Tensor, weight: Tensor | None,
    options: RowOptions, tiles: tuple[int, bool], backend: str | None,
) -> LossStats:  # fmt: skip
    given, linear_weight, linear_bias = head
    workspace, reduces = tiles
    name, positions = str(group.group_name), labels.shape
    given, labels = rows_of_last_axis(given), labels.flatten()
    dtype = autocast_dtype(given)
    if weight is not None:
        check_weight(weight, vocab, given.to(dtype))
    where = route.choose(
        given.to(dtype), linear_weight, backend=backend, weight=weight, workspace=workspace
    )
    _meet(
        where, group, given, labels, vocab, weight, options, *head, features=given.shape[1],
        workspace=workspace,
    )  # fmt: skip
    _check_range(labels, vocab, options.ignore_index)
    scale = options.scale_as_tensor()
    if scale is not None:
        # Where the hidden states' gradient is whole, so is what they give to the scale.
        of_rows = scale if reduces else shared(scale, name)
        given = times_scale(given, of_rows, labels != options.ignore_index)
        if linear_bias is not None:
            real, one = real_dtype(linear_bias.dtype), shared(scale, name)
            linear_bias = (linear_bias.to(real) * one.to(real)).to(linear_bias.dtype)
        options = options._replace(logit_scale=1.0)
    if reduces:
        given = shared(given, name)
    rows, *projection = cast((given, linear_weight, linear_bias), dtype)
    if where.backend == "torch":
        counted = labels != options.ignore_index
        logits = F.linear(zero_unless(counted, rows, -1), *projection)
        result = _of_rows(where, group, vocab, logits, labels, weight, options)
        if result.logsumexp is not None:
            zeroed = (torch.where(counted, x, 0) for x in (result.logsumexp, result.entropy))
            lse, entropy = zeroed
            result = LossStats(result.loss, lse, result.correct, entropy)
        return change_rows(result, lambda x: x.view(positions), options.reduction)
    weight = None if weight is None else weight.to(real_dtype(dtype))
    divisor = _divisor(labels, weight, options, dtype)
    early = torch.is_grad_enabled() and options.reduction != "none"
    early = early and not torch_state.jit_tracing()
    learned = (rows, *projection)
    wanted = [early and part is not None and part.requires_grad for part in learned]
    made = vocab_linear.forward(
        *learned, labels, weight, divisor, *options.for_op(), options.return_stats, wanted,
        *where.for_op(), vocab, name,
    )  # fmt: skip
    loss = options.cast(made.loss, dtype)
    result = without_stats(loss)
    if options.return_stats:
        result = LossStats(loss, made.lse, made.correct, made.entropy)
    return change_rows(result, lambda x: x.view(positions), options.reduction)


def _with_logits(
    group: Any, vocab: Any, head: tuple, target: Tensor, ignore_index: int | None,
    mask: Tensor | None, shift: bool, weight: Tensor | None, options: RowOptions,
    backend: str | None,
) -> LossStats:  # fmt: skip
    """Probabilities are as large as the logits, which are made beside them; so are those of a
    weight with further dimensions."""
    input, linear_weight, linear_bias = cast(head, autocast_dtype(head[0]))
    many = linear_weight.dim() > 2
    if many and (mask is not None or shift):
        raise ValueError("mask, shift: expected none with a linear_weight of more dimensions")
    if not many:
        check_no_ignore_index(ignore_index)
        if shift:
            mask = None if mask is None else mask.expand(input.shape[:-1])[..., 1:]
            input, target = input[..., :-1, :], target[..., 1:, :]
    where = route.choose(input, linear_weight, backend=backend, weight=weight)
    flat = linear_weight.reshape(-1, linear_weight.shape[-1])
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    logits = F.linear(input, flat, bias)
    if many:
        logits = logits.view(input.shape[0], *linear_weight.shape[:-1])
        positions, logits = row_shape(logits), to_rows(logits)
        target = to_rows(target) if target.dim() == linear_weight.dim() else to_indices(target)
    else:
        positions = input.shape[:-1]
        logits, target = rows_of_last_axis(logits), rows_of_last_axis(target)
    if target.dim() == 2:
        common = common_dtype(logits, target, weight)
        logits, target = logits.to(common), target.to(common)
    _meet(where, group, logits, target, vocab, weight, options, *head)
    if mask is None:
        result = _of_rows(where, group, vocab, logits, target, weight, options)
    else:
        counted = mask.expand(positions).flatten()
        result = _of_masked(where, group, vocab, logits, target, counted, weight, options)
    return change_rows(result, lambda x: x.view(positions), options.reduction)


def _of_masked(
    where: route.Route, group: Any, vocab: Any, logits: Tensor, target: Tensor, counted: Tensor,
    weight: Tensor | None, options: RowOptions,
) -> LossStats:  # fmt: skip
    """Of the rows that a mask, alike in all processes, counts."""
    rows = counted.nonzero().squeeze(1)
    result = _of_rows(where, group, vocab, logits[rows], target[rows], weight, options)

    def among_all(x: Tensor) -> Tensor:
        return x.new_zeros(counted.shape[0]).index_put((rows,), x)

    return change_rows(result, among_all, options.reduction)
