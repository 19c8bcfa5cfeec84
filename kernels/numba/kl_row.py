"""One row of a student's logits against its teacher: the Numba version of kl_row.hpp.

Read it first: its notes hold here. Named classes come sorted, with the teacher's bins, from kl.py.
"""

from __future__ import annotations

from math import expm1, inf, isfinite, isinf
from typing import NamedTuple

import numpy as np
from numba import njit

from neglog.kernels.numba.block import (  # isort: skip
    BFLOAT16, INT16, UINT16, Destination, Lse, LseState, block_copy, block_fill, block_multiply,
    block_scale, block_softcap, block_softcap_and_slope, block_softmax, finish, log_probability,
    store_gradient, update, widen_block,
)  # fmt: skip
from neglog.kernels.numba.divergence import (  # isort: skip
    Divergence, Scores, block_divergence, block_divergence_gradient,
)  # fmt: skip
from neglog.kernels.numba.exp import exp_nonpositive, log_nonnegative  # isort: skip
from neglog.kernels.numba.intrinsics import (  # isort: skip
    BLOCK, EXACT, FUSED, Pointer, Real, address_of, advance, block_buffer, cast, itemsize,
    pointer,
)  # fmt: skip
from neglog.kernels.numba.kl_problem import Gradient, Output, Problem  # isort: skip
from neglog.kernels.numba.row import AHEAD, Span  # isort: skip

FLOAT32, FLOAT64 = 0, 1
INT64, SINGLE, DOUBLE = np.int64(0), np.float32(0), np.float64(0)


class LogSums(NamedTuple):
    """Of the soft scores or the bins, of the others as one, of the teacher, of the plain scores."""

    student: Lse
    others: Lse
    teacher: Lse
    hard: Lse


# Reading a block


@njit(**FUSED)
def block_convert(x: Pointer, n: int, to: Pointer) -> None:
    for j in range(n):
        to[j] = cast(x[j], to)


@njit(**EXACT)
def size_of(dtype: int) -> int:
    return 8 if dtype == FLOAT64 else 4 if dtype == FLOAT32 else 2


@njit(**EXACT)
def as_numbers(source: int, dtype: int, n: int, buffer: Pointer) -> Pointer:
    """n numbers of any type in memory: where they are, or else in `buffer`."""
    if dtype == (FLOAT32 if itemsize(buffer) == 4 else FLOAT64):
        return pointer(source, buffer)
    if dtype == FLOAT32:
        block_convert(pointer(source, SINGLE), n, buffer)
    elif dtype == FLOAT64:
        block_convert(pointer(source, DOUBLE), n, buffer)
    else:
        widen_block(source, dtype, n, buffer)
    return buffer


@njit(**EXACT)
def logits_at(p: Problem, row: int, column: int) -> int:
    """The address of a logit."""
    return p.logits + (row * p.logits_stride + column) * size_of(p.dtype)


@njit(**EXACT)
def teacher_at(p: Problem, row: int, column: int) -> int:
    return p.teacher + (row * p.teacher_stride + column) * size_of(p.teacher_dtype)


@njit(**FUSED)
def block_times(x: Pointer, n: int, scale: Real, to: Pointer) -> None:
    for j in range(n):
        to[j] = x[j] * scale


@njit(**FUSED)
def block_log(x: Pointer, n: int, to: Pointer) -> None:
    for j in range(n):
        to[j] = log_nonnegative(x[j])


@njit(**EXACT)
def scores_of(p: Problem, row: int, span: Span, buffer: Pointer) -> Pointer:
    """The scores without the temperature."""
    z = as_numbers(logits_at(p, row, span.start), p.dtype, span.n, buffer)
    if p.logit_scale == 1 and p.softcap == 0:
        return z
    block_times(z, span.n, cast(p.logit_scale, p.zero), buffer)
    if p.softcap != 0:
        block_softcap(buffer, span.n, cast(p.softcap, p.zero))
    return buffer


@njit(**EXACT)
def slopes_of(p: Problem, row: int, span: Span, buffer: Pointer, slope: Pointer) -> None:
    """The derivative of the cap."""
    z = as_numbers(logits_at(p, row, span.start), p.dtype, span.n, buffer)
    block_times(z, span.n, cast(p.logit_scale, p.zero), buffer)
    block_softcap_and_slope(buffer, span.n, cast(p.softcap, p.zero), slope)


@njit(**EXACT)
def softened(p: Problem, scores: Pointer, n: int, buffer: Pointer) -> Pointer:
    """The scores with the temperature."""
    if p.temperature == 1:
        return scores
    block_times(scores, n, cast(1 / p.temperature, p.zero), buffer)
    return buffer


@njit(**EXACT)
def teacher_of(p: Problem, row: int, span: Span, buffer: Pointer) -> Pointer:
    x = as_numbers(teacher_at(p, row, span.start), p.teacher_dtype, span.n, buffer)
    if p.probabilities:
        block_log(x, span.n, buffer)
        x = buffer
    if p.teacher_scale != 1 or p.teacher_softcap != 0:
        block_times(x, span.n, cast(p.teacher_scale, p.zero), buffer)
        x = buffer
    if p.teacher_softcap != 0:
        block_softcap(buffer, span.n, cast(p.teacher_softcap, p.zero))
    return x


# One row


@njit(**EXACT)
def blocks(p: Problem) -> int:
    return (p.vocab + BLOCK - 1) // BLOCK


@njit(**EXACT)
def block_span(p: Problem, block: int) -> Span:
    return Span(block * BLOCK, min(BLOCK, p.vocab - block * BLOCK))


@njit(**EXACT)
def token_weight(p: Problem, row: int) -> float:
    return 1.0 if p.token_weight == 0 else float(pointer(p.token_weight, p.zero)[row])


@njit(**EXACT)
def target_of(p: Problem, row: int) -> int:
    return pointer(p.target, INT64)[row]


@njit(**EXACT)
def ignored(p: Problem, row: int) -> bool:
    return target_of(p, row) == p.ignore_index or token_weight(p, row) == 0


@njit(**EXACT)
def is_named(p: Problem) -> bool:
    return p.named >= 0


@njit(**EXACT)
def has_hard_sum(p: Problem) -> bool:
    """Whether the cross-entropy needs a log-sum-exp of its own."""
    return p.hard_weight != 0 and (p.temperature != 1 or is_named(p))


@njit(**EXACT)
def columns_of(p: Problem, row: int) -> Pointer:
    return pointer(p.column + row * p.named * 8, INT64)


@njit(**EXACT)
def take_named(
    p: Problem, row: int, span: Span, first: int, scores: Pointer, student: Pointer
) -> int:
    """Keep the scores of a block's named classes, from the first on, and put -inf in their place;
    return the first of the next block."""
    columns = columns_of(p, row)
    while first < p.named and columns[first] < span.start + span.n:
        j = columns[first] - span.start
        student[first] = scores[j]
        scores[j] = cast(-inf, p.zero)
        first += 1
    return first


@njit(**EXACT)
def find_bins(p: Problem, student: Pointer, others: Lse, named: int) -> Lse:
    """The scores of the bins, less the largest; their log-sum-exp."""
    shift = others.high
    for k in range(named):
        shift = max(shift, student[k])
    if not isfinite(shift):
        shift = p.zero
    for k in range(p.named):
        student[k] = student[k] - shift if k < named else cast(-inf, p.zero)
    finite = isfinite(others.high)
    student[p.named] = (others.high - shift) + others.low if finite else others.high
    return finish(update((cast(-inf, p.zero), 0.0), student, p.named + 1, 0))


@njit(**EXACT)
def add_block(state: LseState, z: Pointer, n: int, ahead: int) -> LseState:
    """update, of numbers that may be in a buffer; `ahead` is an address."""
    return update(state, z, n, ahead - address_of(z))


@njit(**EXACT)
def find_log_sums(p: Problem, row: int, student: Pointer) -> LogSums:
    z, soft, t = block_buffer(p.zero), block_buffer(p.zero), block_buffer(p.zero)
    nothing = (cast(-inf, p.zero), 0.0)
    of_soft, of_teacher, of_hard, named = nothing, nothing, nothing, 0
    for block in range(blocks(p)):
        span = block_span(p, block)
        scores, ahead = scores_of(p, row, span, z), logits_at(p, row, span.start) + AHEAD
        if has_hard_sum(p):
            of_hard = add_block(of_hard, scores, span.n, ahead)
        tempered = softened(p, scores, span.n, soft)
        if is_named(p):
            if p.temperature == 1:
                block_copy(scores, span.n, soft)
            named = take_named(p, row, span, named, soft, student)
            of_soft = add_block(of_soft, soft, span.n, ahead)
        else:
            of_soft = add_block(of_soft, tempered, span.n, ahead)
            ahead = teacher_at(p, row, span.start) + AHEAD
            of_teacher = add_block(of_teacher, teacher_of(p, row, span, t), span.n, ahead)
    others = finish(of_soft)
    whole = find_bins(p, student, others, named) if is_named(p) else others
    hard = finish(of_hard) if has_hard_sum(p) else whole
    return LogSums(whole, others, finish(of_teacher), hard)


@njit(**EXACT)
def bins_of(p: Problem, row: int, student: Pointer, of_student: Lse) -> Scores:
    teacher = pointer(p.bins + row * (p.named + 1) * itemsize(p.zero), p.zero)
    return Scores(student, teacher, of_student, Lse(p.zero, p.zero))


@njit(**EXACT)
def find_divergence(p: Problem, row: int, sums: LogSums, student: Pointer) -> Divergence:
    if is_named(p):
        bins = bins_of(p, row, student, sums.student)
        return block_divergence(bins, p.named + 1, p.beta, p.zero)
    z, soft, t = block_buffer(p.zero), block_buffer(p.zero), block_buffer(p.zero)
    value = offset = 0.0
    for block in range(blocks(p)):
        span = block_span(p, block)
        scores = softened(p, scores_of(p, row, span, z), span.n, soft)
        both = Scores(scores, teacher_of(p, row, span, t), sums.student, sums.teacher)
        part = block_divergence(both, span.n, p.beta, p.zero)
        value += part.value
        offset += part.offset
    return Divergence(value, offset)


@njit(**EXACT)
def target_log_p(p: Problem, row: int, sums: LogSums) -> Real:
    score = scores_of(p, row, Span(target_of(p, row), 1), block_buffer(p.zero))[0]
    return log_probability(score, sums.hard)


@njit(**EXACT)
def write(p: Problem, to: int, row: int, value: float) -> None:
    if to != 0:
        pointer(to, p.zero)[row] = cast(value, p.zero)


@njit(**EXACT)
def row_forward(p: Problem, o: Output, row: int, student: Pointer) -> tuple[LogSums, Divergence]:
    """Write the row's loss and parts; return what its gradient is made of."""
    nothing = Lse(p.zero, p.zero)
    sums, of_row = LogSums(nothing, nothing, nothing, nothing), Divergence(0.0, 0.0)
    loss = soft = hard = 0.0
    if not ignored(p, row):
        sums = find_log_sums(p, row, student)
        if p.soft_weight != 0:
            of_row = find_divergence(p, row, sums, student)
            soft = of_row.value
            loss += p.soft_weight * soft
        if p.hard_weight != 0:
            hard = -float(target_log_p(p, row, sums))
            loss += p.hard_weight * hard
        loss *= token_weight(p, row)
    write(p, o.loss, row, loss)
    write(p, o.divergence, row, soft)
    write(p, o.cross_entropy, row, hard)
    return sums, of_row


@njit(**FUSED)
def block_add_softmax(x: Pointer, z: Pointer, n: int, lse: Lse, scale: Real) -> None:
    """x += scale * softmax(z)"""
    for j in range(n):
        x[j] += scale * exp_nonpositive(log_probability(z[j], lse))


@njit(**EXACT)
def gradient_of_bins(
    p: Problem, row: int, span: Span, first: int, z: Pointer, sums: LogSums, of_bins: Pointer,
    gradient: Pointer,
) -> int:  # fmt: skip
    """The others by their softmax, the named classes by their own; as take_named."""
    if isinf(sums.others.high):
        block_fill(gradient, span.n, p.zero)
    else:
        block_softmax(z, span.n, sums.others, of_bins[p.named], gradient)
    columns = columns_of(p, row)
    while first < p.named and columns[first] < span.start + span.n:
        gradient[columns[first] - span.start] = of_bins[first]
        first += 1
    return first


@njit(**EXACT)
def add_cross_entropy(
    p: Problem, row: int, span: Span, scores: Pointer, lse: Lse, scale: Real, gradient: Pointer
) -> None:
    target = target_of(p, row) - span.start
    is_here = 0 <= target < span.n
    before = gradient[target] if is_here else p.zero
    block_add_softmax(gradient, scores, span.n, lse, scale)
    if is_here:
        log_p = float(log_probability(scores[target], lse))
        gradient[target] = cast(before + scale * expm1(log_p), p.zero)


@njit(**EXACT)
def row_backward(
    p: Problem, g: Gradient, row: int, sums: LogSums, of_row: Divergence, student: Pointer
) -> None:
    """One row of the gradient, after its forward."""
    z, soft, t = block_buffer(p.zero), block_buffer(p.zero), block_buffer(p.zero)
    gradient, slope = block_buffer(p.zero), block_buffer(p.zero)
    given = 1.0 if g.grad == 0 else float(pointer(g.grad, p.zero)[row * g.grad_stride])
    upstream = given * g.grad_scale * token_weight(p, row)
    soft_scale = cast(upstream * p.soft_weight / p.temperature, p.zero)
    hard_scale = cast(upstream * p.hard_weight, p.zero)
    of_bins, named = advance(student, p.named + 1), 0
    if is_named(p) and not ignored(p, row):
        bins = bins_of(p, row, student, sums.student)
        block_divergence_gradient(bins, p.named + 1, p.beta, of_row.offset, soft_scale, of_bins)
    for block in range(blocks(p)):
        span = block_span(p, block)
        if ignored(p, row):
            block_fill(gradient, span.n, p.zero)
            store_block(p, g, row, span, gradient)
            continue
        if p.softcap != 0:
            slopes_of(p, row, span, z, slope)
        scores = scores_of(p, row, span, z)
        tempered = softened(p, scores, span.n, soft)
        if soft_scale == 0:
            block_fill(gradient, span.n, p.zero)
        elif is_named(p):
            named = gradient_of_bins(p, row, span, named, tempered, sums, of_bins, gradient)
        else:
            both = Scores(tempered, teacher_of(p, row, span, t), sums.student, sums.teacher)
            block_divergence_gradient(both, span.n, p.beta, of_row.offset, soft_scale, gradient)
        if hard_scale != 0:
            add_cross_entropy(p, row, span, scores, sums.hard, hard_scale, gradient)
        if p.softcap != 0:
            block_multiply(gradient, slope, span.n)
        if p.logit_scale != 1:
            block_scale(gradient, span.n, cast(p.logit_scale, p.zero))
        store_block(p, g, row, span, gradient)


@njit(**EXACT)
def store_halves(
    gradient: Pointer, n: int, out: Pointer, bypass_cache: bool, following: int
) -> None:
    """In 16 bits, which only float32 is rounded to."""
    if itemsize(gradient) == 4:
        single = pointer(address_of(gradient), SINGLE)
        store_gradient(single, n, None, Destination(out, bypass_cache, following))


@njit(**EXACT)
def store_block(p: Problem, g: Gradient, row: int, span: Span, gradient: Pointer) -> None:
    """In the logits' type. Meanwhile the next row's logits are brought into L2."""
    out = g.out + (row * g.out_stride + span.start) * size_of(p.dtype)
    following = logits_at(p, row + 1, span.start) if row + 1 < p.rows else 0
    if size_of(p.dtype) == itemsize(p.zero):
        to = Destination(pointer(out, p.zero), g.bypass_cache, following)
        store_gradient(gradient, span.n, None, to)
    elif p.dtype == BFLOAT16:
        store_halves(gradient, span.n, pointer(out, INT16), g.bypass_cache, following)
    else:
        store_halves(gradient, span.n, pointer(out, UINT16), g.bypass_cache, following)
