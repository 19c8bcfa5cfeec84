"""linear_kl_div_loss: a student's hidden states against a teacher, a tile of logits at a time."""

from __future__ import annotations

from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from neglog import route, torch_state
from neglog.checks import (
    REDUCTIONS,
    check_extensions,
    check_flags,
    check_linear,
    check_loss_dtype,
    check_reduction,
    rows_of_last_axis,
    to_ignore_index,
    to_logits_dtype,
)
from neglog.checks_of_teachers import check_distillation, check_teacher_of_head
from neglog.distributed.tensors import any_distributed, on_whole_tensors
from neglog.losses._rows import RowOptions, counted_by, learns_weight, times_learned_weight
from neglog.losses._token_weight import weighted
from neglog.losses._types import Backend, LogitsDtype, Reduction, TileOptions
from neglog.losses.kl_div import (
    Comparison,
    KLDivStats,
    by_position,
    compared_rows,
    labels_of_positions,
    rows_of_teacher,
)
from neglog.losses.linear_cross_entropy import logits_in_memory, scaled_head, tile_options
from neglog.ops.dtypes import real_dtype
from neglog.ops.kl.autograd import Compared
from neglog.ops.linear_kl.autograd import linear_kl
from neglog.torch_state import autocast_dtype


@overload
def linear_kl_div_loss(
    input: Tensor, linear_weight: Tensor, teacher: Tensor, target: Tensor | None = None, *,
    linear_bias: Tensor | None = None, teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None, teacher_ids: Tensor | None = None,
    teacher_probabilities: bool = False, beta: float | Tensor = 0.0,
    temperature: float | Tensor = 1.0, soft_weight: float | Tensor = 1.0,
    hard_weight: float | Tensor = 0.0, mask: Tensor | None = None, shift: bool = False,
    ignore_index: int = -100, reduction: Reduction = "mean", token_weight: Tensor | None = None,
    per_sequence: bool | Tensor = False, num_items: int | Tensor | None = None,
    logit_scale: float | Tensor = 1.0, softcap: float | None = None,
    teacher_logit_scale: float | Tensor = 1.0, teacher_softcap: float | None = None,
    options: TileOptions | None = None, return_stats: Literal[False] = False,
    loss_dtype: torch.dtype | None = None, logits_dtype: LogitsDtype = None,
    backend: Backend | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def linear_kl_div_loss(
    input: Tensor, linear_weight: Tensor, teacher: Tensor, target: Tensor | None = None, *,
    linear_bias: Tensor | None = None, teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None, teacher_ids: Tensor | None = None,
    teacher_probabilities: bool = False, beta: float | Tensor = 0.0,
    temperature: float | Tensor = 1.0, soft_weight: float | Tensor = 1.0,
    hard_weight: float | Tensor = 0.0, mask: Tensor | None = None, shift: bool = False,
    ignore_index: int = -100, reduction: Reduction = "mean", token_weight: Tensor | None = None,
    per_sequence: bool | Tensor = False, num_items: int | Tensor | None = None,
    logit_scale: float | Tensor = 1.0, softcap: float | None = None,
    teacher_logit_scale: float | Tensor = 1.0, teacher_softcap: float | None = None,
    options: TileOptions | None = None, return_stats: Literal[True],
    loss_dtype: torch.dtype | None = None, logits_dtype: LogitsDtype = None,
    backend: Backend | None = None,
) -> KLDivStats: ...  # fmt: skip
@overload
def linear_kl_div_loss(
    input: Tensor, linear_weight: Tensor, teacher: Tensor, target: Tensor | None = None, *,
    linear_bias: Tensor | None = None, teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None, teacher_ids: Tensor | None = None,
    teacher_probabilities: bool = False, beta: float | Tensor = 0.0,
    temperature: float | Tensor = 1.0, soft_weight: float | Tensor = 1.0,
    hard_weight: float | Tensor = 0.0, mask: Tensor | None = None, shift: bool = False,
    ignore_index: int = -100, reduction: Reduction = "mean", token_weight: Tensor | None = None,
    per_sequence: bool | Tensor = False, num_items: int | Tensor | None = None,
    logit_scale: float | Tensor = 1.0, softcap: float | None = None,
    teacher_logit_scale: float | Tensor = 1.0, teacher_softcap: float | None = None,
    options: TileOptions | None = None, return_stats: bool,
    loss_dtype: torch.dtype | None = None, logits_dtype: LogitsDtype = None,
    backend: Backend | None = None,
) -> Tensor | KLDivStats: ...  # fmt: skip
def linear_kl_div_loss(
    input: Tensor, linear_weight: Tensor, teacher: Tensor, target: Tensor | None = None, *,
    linear_bias: Tensor | None = None, teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None, teacher_ids: Tensor | None = None,
    teacher_probabilities: bool = False, beta: float | Tensor = 0.0,
    temperature: float | Tensor = 1.0, soft_weight: float | Tensor = 1.0,
    hard_weight: float | Tensor = 0.0, mask: Tensor | None = None, shift: bool = False,
    ignore_index: int = -100, reduction: Reduction = "mean", token_weight: Tensor | None = None,
    per_sequence: bool | Tensor = False, num_items: int | Tensor | None = None,
    logit_scale: float | Tensor = 1.0, softcap: float | None = None,
    teacher_logit_scale: float | Tensor = 1.0, teacher_softcap: float | None = None,
    options: TileOptions | None = None, return_stats: bool = False,
    loss_dtype: torch.dtype | None = None, logits_dtype: LogitsDtype = None,
    backend: Backend | None = None,
) -> Tensor | KLDivStats:  # fmt: skip
    """kl_div_loss of linear(input, linear_weight, linear_bias), without its logits.

    Logits are made a tile at a time in a workspace of fixed size, those of a teacher's hidden
    states beside them; positions that do not count are left out before the first matmul. With
    "mean" and "sum" the gradients are formed in the forward. Hidden states on both sides take 4
    matmuls then: two of scores, and the student's two gradients; with "none" 6.

    Args:
        input: the student's hidden states (..., in_features).
        linear_weight: (C, in_features). linear_bias: (C,).
        teacher: as in `kl_div_loss`: logits (..., C), probabilities, or log-probabilities (..., K)
            of teacher_ids. With teacher_weight it is hidden states (..., E). Without gradient.
        teacher_weight: (C, E), of the teacher's head; teacher_bias: (C,). Their dtype is that of
            the teacher.
        teacher_logit_scale, teacher_softcap: as logit_scale and softcap, of the teacher's logits;
            not with teacher_ids or teacher_probabilities.
        target, teacher_ids, teacher_probabilities, beta, temperature, soft_weight, hard_weight,
            mask, shift, ignore_index, return_stats: as in `kl_div_loss`.
        reduction, token_weight, per_sequence, num_items, logit_scale, softcap, options, loss_dtype,
            logits_dtype, backend: as in `linear_cross_entropy`. The workspace holds a tile of both
            sides' logits, and logits_dtype is that of both.

    Raises:
        As `kl_div_loss`, and RuntimeError for features or biases that do not fit.
    """
    if any_distributed(
        input, linear_weight, teacher, target, linear_bias, teacher_weight, teacher_bias,
        teacher_ids, mask, token_weight, num_items, logit_scale, per_sequence,
    ):  # fmt: skip
        return on_whole_tensors(linear_kl_div_loss, locals())
    tensors = (
        input, linear_weight, teacher, target, linear_bias, teacher_weight, teacher_bias,
        teacher_ids, mask, token_weight,
    )  # fmt: skip
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            linear_kl_div_loss, tensors, input, linear_weight, teacher, target,
            linear_bias=linear_bias, teacher_weight=teacher_weight, teacher_bias=teacher_bias,
            teacher_ids=teacher_ids, teacher_probabilities=teacher_probabilities, beta=beta,
            temperature=temperature, soft_weight=soft_weight, hard_weight=hard_weight, mask=mask,
            shift=shift, ignore_index=ignore_index, reduction=reduction, token_weight=token_weight,
            per_sequence=per_sequence, num_items=num_items, logit_scale=logit_scale,
            softcap=softcap, teacher_logit_scale=teacher_logit_scale,
            teacher_softcap=teacher_softcap, options=options, return_stats=return_stats,
            loss_dtype=loss_dtype, logits_dtype=logits_dtype, backend=backend,
        )  # fmt: skip
    ignored = to_ignore_index(ignore_index)
    check_reduction(reduction)
    held = target
    if target is None and isinstance(input, Tensor):  # the mask is checked beside a target
        held = torch.empty(input.shape[:-1], dtype=torch.int64, device=input.device)
    check_linear(input, linear_weight, linear_bias, held, mask, shift, indices=True)
    check_teacher_of_head(
        input, linear_weight.shape[0], teacher, teacher_weight, teacher_bias, teacher_ids,
        teacher_probabilities, teacher_logit_scale, teacher_softcap,
    )  # fmt: skip
    check_distillation(input, target, beta, temperature, soft_weight, hard_weight)
    check_flags(return_stats=return_stats)
    check_extensions(input, reduction, logit_scale, softcap, 0.0, num_items)
    check_loss_dtype(loss_dtype, input)
    workspace, filter_eps = tile_options(options, input)
    wide = to_logits_dtype(logits_dtype, input)
    labels = labels_of_positions(input, target, mask, shift, ignored)
    row_options = RowOptions(
        reduction, ignored, logit_scale=logit_scale, softcap=softcap, num_items=num_items,
        loss_dtype=loss_dtype,
    )  # fmt: skip
    row_options = weighted(
        row_options, token_weight, per_sequence, input, labels.shape, labels.flatten(), None, shift
    )
    how = Comparison(
        beta, temperature, soft_weight, hard_weight, teacher_logit_scale, teacher_softcap
    )
    student = (rows_of_last_axis(input), linear_weight, linear_bias)
    given, ids = rows_of_teacher(teacher, teacher_ids)
    head = (None if x is None else x.detach() for x in (teacher_weight, teacher_bias))
    flat = labels.flatten()
    student, row_options = scaled_head(student, counted_by(row_options, flat), row_options)
    dtype = autocast_dtype(input)
    where = route.choose(
        student[0].to(dtype), linear_weight, backend=backend, workspace=workspace, logits_dtype=wide
    )  # fmt: skip
    run = partial(_by_tiles, filter_eps=filter_eps)
    if where.backend == "torch":
        run = partial(_by_logits, logits_dtype=wide)
    taught = ((given, *head, ids), flat, teacher_probabilities, how)
    rows = run(where, student, dtype, *taught, row_options)
    return by_position(rows, labels.shape, shift, dtype, row_options, return_stats)


def _by_tiles(
    where: route.Route, head: tuple, dtype: torch.dtype, taught: tuple, labels: Tensor,
    probabilities: bool, how: Comparison, options: RowOptions, filter_eps: float = 0.0,
) -> Compared:  # fmt: skip
    """Rows of a head (input (N, D), weight, bias), rounded to `dtype`, against a teacher (numbers,
    weight, bias, ids) and labels (N,)."""
    real = real_dtype(dtype)
    if learns_weight(options):
        run = partial(_by_tiles, where, head, dtype, taught, labels, probabilities, how,
                      filter_eps=filter_eps)  # fmt: skip
        found: Compared = times_learned_weight(run, labels, None, real, options)
        return found
    of_rows = None if options.token_weight is None else options.token_weight.to(real)
    reduction = "mean" if options.num_items is not None else options.reduction
    # The upstream of "none" is not known yet, so its gradients wait for the backward.
    early = torch.is_grad_enabled() and options.reduction != "none"
    early = early and not torch_state.jit_tracing()
    wanted = [early and part is not None and part.requires_grad for part in head]
    return linear_kl(
        head, dtype, *_alike(taught), labels, of_rows, options.divisor(dtype, head[0].device),
        REDUCTIONS[reduction], *how.for_op(options, probabilities), wanted, where.workspace,
        where.tile_dtype, filter_eps, where.demanded,
    )  # fmt: skip


def _alike(taught: tuple) -> tuple[Tensor | None, ...]:
    """A teacher's hidden states and head in one dtype, as autocast has them."""
    teacher, weight, bias, ids = taught
    if weight is None:
        return taught
    dtype = autocast_dtype(teacher)
    return teacher.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), ids


def _by_logits(
    where: route.Route, head: tuple, dtype: torch.dtype, taught: tuple, labels: Tensor,
    probabilities: bool, how: Comparison, options: RowOptions,
    logits_dtype: torch.dtype | None = None,
) -> Compared:  # fmt: skip
    logits = logits_in_memory(head, dtype, counted_by(options, labels), logits_dtype)
    teacher, weight, bias, ids = _alike(taught)
    assert teacher is not None
    if weight is not None:
        teacher = logits_in_memory((teacher, weight, bias), teacher.dtype, None, logits_dtype)
    return compared_rows(where, logits, teacher, ids, labels, probabilities, how, options)
