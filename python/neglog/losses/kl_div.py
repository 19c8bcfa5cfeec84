"""kl_div_loss: a student's distributions against a teacher's."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from neglog import availability, route, torch_state
from neglog.checks import (
    REDUCTIONS,
    check_classes,
    check_extensions,
    check_flags,
    check_loss_dtype,
    check_reduction,
    rows_of_last_axis,
    to_ignore_index,
)
from neglog.checks_of_teachers import check_distillation, check_student, check_teacher
from neglog.distributed.tensors import any_distributed, on_whole_tensors
from neglog.losses._rows import (
    RowOptions,
    as_numbers,
    counted_by,
    learns_weight,
    times_learned_weight,
    times_scale,
)
from neglog.losses._token_weight import weighted
from neglog.losses._types import Backend, Reduction
from neglog.losses.linear_cross_entropy import labels_of
from neglog.ops.dtypes import real_dtype
from neglog.ops.kl import formula
from neglog.ops.kl.autograd import Compared, kl
from neglog.ops.kl.schema import Options


class KLDivStats(NamedTuple):
    """A loss and its parts by position, detached; 0 where a position does not count.

    divergence: of the student from the teacher.
    cross_entropy: of the student with the target. Each is 0 where its weight is 0.
    """

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor


class Comparison(NamedTuple):
    """The numbers of a comparison, checked."""

    beta: Any = 0.0
    temperature: Any = 1.0
    soft_weight: Any = 1.0
    hard_weight: Any = 0.0
    teacher_scale: Any = 1.0
    teacher_softcap: Any = None

    def for_op(self, rows: RowOptions, probabilities: bool) -> Options:
        """With the temperature in what changes the teacher's scores."""
        softcaps = (rows.softcap, self.teacher_softcap)
        softcap, of_teacher = (0.0 if x is None else x for x in softcaps)
        numbers = (
            *self[:4], rows.logit_scale, softcap, self.teacher_scale / self.temperature,
            of_teacher / self.temperature,
        )  # fmt: skip
        return Options(rows.ignore_index, probabilities, *as_numbers(numbers))


@overload
def kl_div_loss(
    input: Tensor, teacher: Tensor, target: Tensor | None = None, *,
    teacher_ids: Tensor | None = None, teacher_probabilities: bool = False,
    beta: float | Tensor = 0.0, temperature: float | Tensor = 1.0,
    soft_weight: float | Tensor = 1.0, hard_weight: float | Tensor = 0.0,
    mask: Tensor | None = None, shift: bool = False, ignore_index: int = -100,
    reduction: Reduction = "mean", token_weight: Tensor | None = None,
    per_sequence: bool | Tensor = False, num_items: int | Tensor | None = None,
    logit_scale: float | Tensor = 1.0, softcap: float | None = None,
    return_stats: Literal[False] = False, loss_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def kl_div_loss(
    input: Tensor, teacher: Tensor, target: Tensor | None = None, *,
    teacher_ids: Tensor | None = None, teacher_probabilities: bool = False,
    beta: float | Tensor = 0.0, temperature: float | Tensor = 1.0,
    soft_weight: float | Tensor = 1.0, hard_weight: float | Tensor = 0.0,
    mask: Tensor | None = None, shift: bool = False, ignore_index: int = -100,
    reduction: Reduction = "mean", token_weight: Tensor | None = None,
    per_sequence: bool | Tensor = False, num_items: int | Tensor | None = None,
    logit_scale: float | Tensor = 1.0, softcap: float | None = None,
    return_stats: Literal[True], loss_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> KLDivStats: ...  # fmt: skip
@overload
def kl_div_loss(
    input: Tensor, teacher: Tensor, target: Tensor | None = None, *,
    teacher_ids: Tensor | None = None, teacher_probabilities: bool = False,
    beta: float | Tensor = 0.0, temperature: float | Tensor = 1.0,
    soft_weight: float | Tensor = 1.0, hard_weight: float | Tensor = 0.0,
    mask: Tensor | None = None, shift: bool = False, ignore_index: int = -100,
    reduction: Reduction = "mean", token_weight: Tensor | None = None,
    per_sequence: bool | Tensor = False, num_items: int | Tensor | None = None,
    logit_scale: float | Tensor = 1.0, softcap: float | None = None,
    return_stats: bool, loss_dtype: torch.dtype | None = None, backend: Backend | None = None,
) -> Tensor | KLDivStats: ...  # fmt: skip
def kl_div_loss(
    input: Tensor, teacher: Tensor, target: Tensor | None = None, *,
    teacher_ids: Tensor | None = None, teacher_probabilities: bool = False,
    beta: float | Tensor = 0.0, temperature: float | Tensor = 1.0,
    soft_weight: float | Tensor = 1.0, hard_weight: float | Tensor = 0.0,
    mask: Tensor | None = None, shift: bool = False, ignore_index: int = -100,
    reduction: Reduction = "mean", token_weight: Tensor | None = None,
    per_sequence: bool | Tensor = False, num_items: int | Tensor | None = None,
    logit_scale: float | Tensor = 1.0, softcap: float | None = None,
    return_stats: bool = False, loss_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> Tensor | KLDivStats:  # fmt: skip
    """Divergence of a student's distributions p from a teacher's q, and a cross-entropy beside it.

    With p = softmax(z / temperature) of z = softcap * tanh(logit_scale * input / softcap), a
    position's loss is

        soft_weight * D(p, q) + hard_weight * cross_entropy(z, target)

    where D is, for m = beta q + (1 - beta) p,

        beta 0        KL(q | p), the forward one
        beta 1        KL(p | q), the reverse one
        between them  beta KL(q | m) + (1 - beta) KL(p | m), generalised Jensen-Shannon

    (arXiv:2306.13649). The gradient is that of the student alone. It is not multiplied by
    temperature**2; for that multiply soft_weight.

    Args:
        input: the student's logits (..., C), float32, float64, bfloat16 or float16; computed with
            in float32, float64 ones in float64.
        teacher: logits (..., C), of any of these dtypes, without gradient. q = softmax(teacher /
            temperature).
        target: class indices (...), int64 or uint8; needed for hard_weight.
        teacher_ids: (..., K), int64 or int32: the teacher names K classes of each position, and
            `teacher` (..., K) is their log-probabilities at the temperature. What these leave to
            probability 1 is that of all other classes as one. One of -inf is not named.
        teacher_probabilities: `teacher` is probabilities at temperature 1, each position's in
            proportion to its sum; not with teacher_ids.
        beta: from 0 to 1.
        temperature: above 0; divides the scores of both in D.
        soft_weight, hard_weight: numbers. What has weight 0 is not computed.
        mask: bool, broadcast to (...): True where a position counts.
        shift: position t of the target, mask and weights' last axis is held against t + 1 of the
            input and teacher; the last position does not count, and "none" is one shorter.
        ignore_index: positions with this target do not count, for both parts. Their gradient is
            exactly zero, even where their logits are NaN.
        reduction, token_weight, per_sequence, num_items, logit_scale, softcap, loss_dtype, backend:
            as in `cross_entropy`, with the class axis last.
        return_stats: return KLDivStats(loss, divergence, cross_entropy) instead of the loss.

    Raises:
        IndexError: a target or a class of teacher_ids is out of range.
        ValueError: beta, temperature or another number out of range, hard_weight without target, a
            class that teacher_ids name twice, log-probabilities that sum to more than 1.
        RuntimeError: other shapes, dtypes or devices; a teacher that requires grad.
        TypeError: an argument not of its type.
    """
    if any_distributed(
        input, teacher, target, teacher_ids, mask, token_weight, num_items, logit_scale,
        per_sequence,
    ):  # fmt: skip
        return on_whole_tensors(kl_div_loss, locals())
    tensors = (input, teacher, target, teacher_ids, mask, token_weight)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            kl_div_loss, tensors, input, teacher, target, teacher_ids=teacher_ids,
            teacher_probabilities=teacher_probabilities, beta=beta, temperature=temperature,
            soft_weight=soft_weight, hard_weight=hard_weight, mask=mask, shift=shift,
            ignore_index=ignore_index, reduction=reduction, token_weight=token_weight,
            per_sequence=per_sequence, num_items=num_items, logit_scale=logit_scale,
            softcap=softcap, return_stats=return_stats, loss_dtype=loss_dtype, backend=backend,
        )  # fmt: skip
    ignored = to_ignore_index(ignore_index)
    check_reduction(reduction)
    check_student(input, target, mask, shift)
    check_teacher(input, input.shape[-1], teacher, teacher_ids, teacher_probabilities)
    check_distillation(input, target, beta, temperature, soft_weight, hard_weight)
    check_flags(return_stats=return_stats)
    check_extensions(input, reduction, logit_scale, softcap, 0.0, num_items)
    check_loss_dtype(loss_dtype, input)
    labels = labels_of_positions(input, target, mask, shift, ignored)
    options = RowOptions(
        reduction, ignored, logit_scale=logit_scale, softcap=softcap, num_items=num_items,
        loss_dtype=loss_dtype,
    )  # fmt: skip
    options = weighted(
        options, token_weight, per_sequence, input, labels.shape, labels.flatten(), None, shift
    )
    where = route.choose(input, backend=backend)
    how = Comparison(beta, temperature, soft_weight, hard_weight)
    given = rows_of_last_axis(input), *rows_of_teacher(teacher, teacher_ids)
    rows = compared_rows(where, *given, labels.flatten(), teacher_probabilities, how, options)
    return by_position(rows, labels.shape, shift, input.dtype, options, return_stats)


def labels_of_positions(
    input: Tensor, target: Tensor | None, mask: Tensor | None, shift: bool, ignored: int
) -> Tensor:
    """The class that each position is held against, `ignored` where it does not count. Without a
    target any class will do."""
    if target is None:
        any_class = 0 if ignored != 0 else 1
        target = torch.full(input.shape[:-1], any_class, dtype=torch.int64, device=input.device)
    return labels_of(target, mask, shift, ignored)


def rows_of_teacher(teacher: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
    rows = rows_of_last_axis(teacher.detach())
    return rows, None if ids is None else rows_of_last_axis(ids).long()


def compared_rows(
    where: route.Route, logits: Tensor, teacher: Tensor, ids: Tensor | None, labels: Tensor,
    probabilities: bool, how: Comparison, options: RowOptions,
) -> Compared:  # fmt: skip
    """Rows of logits (N, V), teachers (N, V) or (N, K), ids (N, K) and labels (N,)."""
    real = real_dtype(logits.dtype)
    if learns_weight(options):
        run = partial(compared_rows, where, logits, teacher, ids, labels, probabilities, how)
        return times_learned_weight(run, labels, None, real, options)
    scale = options.scale_as_tensor()
    if scale is not None:
        logits = times_scale(logits, scale, counted_by(options, labels))
        options = options._replace(logit_scale=1.0)
    of_rows = options.token_weight
    of_rows = None if of_rows is None else of_rows.to(real)
    reduction = "mean" if options.num_items is not None else options.reduction
    given = (
        logits, teacher, ids, labels, of_rows, options.divisor(logits.dtype, logits.device),
        REDUCTIONS[reduction], how.for_op(options, probabilities),
    )  # fmt: skip
    if where.backend != "torch":
        return kl(*given, where.demanded)
    availability.ran("kl", "torch")
    if torch_state.readable(labels):
        counted = labels if of_rows is None else labels[of_rows != 0]
        check_classes(counted, logits.shape[1], options.ignore_index)
    loss, _, *parts = formula.kl(*given)
    return Compared(loss, *parts)


def by_position(
    rows: Any, positions: torch.Size, shift: bool, dtype: torch.dtype, options: RowOptions,
    return_stats: bool,
) -> Tensor | KLDivStats:  # fmt: skip
    """What the user asked for, of what was found of the rows."""

    def change(x: Tensor) -> Tensor:
        x = x.view(positions)
        return x[..., :-1] if shift else x

    loss = change(rows.loss) if options.reduction == "none" else rows.loss
    loss = options.cast(loss, dtype)
    if not return_stats:
        return loss
    return KLDivStats(loss, change(rows.divergence), change(rows.cross_entropy))
