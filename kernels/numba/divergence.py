"""The divergence of two distributions, and its gradient: the Numba version of divergence.hpp.

Read it first: its formulas and notes hold here.
"""

from __future__ import annotations

from typing import NamedTuple

from numba import njit

from neglog.kernels.numba.block import (  # isort: skip
    Lse, block_fill, block_sum, log_probability,
)  # fmt: skip
from neglog.kernels.numba.exp import exp_nonpositive, log_nonnegative  # isort: skip
from neglog.kernels.numba.intrinsics import (  # isort: skip
    EXACT, FUSED, INLINE, LANES, Pointer, Real, cast, lanes_buffer,
)  # fmt: skip


FORWARD, REVERSE, BETWEEN = 0, 1, 2


class Divergence(NamedTuple):
    """What a row's gradient needs: the divergence, and D or K of divergence.hpp."""

    value: float
    offset: float


class Scores(NamedTuple):
    """Scores of both, and their log-sum-exps."""

    student: Pointer
    teacher: Pointer
    of_student: Lse
    of_teacher: Lse


@njit(**FUSED, **INLINE)
def over_mean(log_p: Real, log_q: Real, share: Real) -> tuple[Real, Real]:
    """log(p / m) and log(q / m)."""
    one = cast(1, log_p)
    d = log_q - log_p
    teacher_is_larger = d > 0
    of_smaller = one - share if teacher_is_larger else share
    ratio = exp_nonpositive(-d if teacher_is_larger else d)
    of_larger = -log_nonnegative(one + of_smaller * (ratio - one))
    if teacher_is_larger:
        return of_larger - d, of_larger
    return of_larger, of_larger + d


@njit(**FUSED, **INLINE)
def weighed(p: Real, log: Real) -> Real:
    """p times a log, 0 where p is 0."""
    return p * log if p != 0 else cast(0, log)


@njit(**FUSED, **INLINE)
def terms_at(s: Scores, j: int, kind: int, share: Real) -> tuple[Real, Real]:
    """Of column j, what is added to the teacher's part and to the student's."""
    log_p = log_probability(s.student[j], s.of_student)
    log_q = log_probability(s.teacher[j], s.of_teacher)
    nothing = cast(0, log_p)
    if kind == FORWARD:
        return weighed(exp_nonpositive(log_q), log_q - log_p), nothing
    if kind == REVERSE:
        return nothing, weighed(exp_nonpositive(log_p), log_p - log_q)
    of_p, of_q = over_mean(log_p, log_q, share)
    return weighed(exp_nonpositive(log_q), of_q), weighed(exp_nonpositive(log_p), of_p)


@njit(**FUSED)
def block_sums(s: Scores, n: int, kind: int, share: Real) -> tuple[float, float]:
    """The sums over a block, by LANES partial sums that are added in double."""
    of_teacher, of_student = lanes_buffer(share), lanes_buffer(share)
    block_fill(of_teacher, LANES, cast(0, share))
    block_fill(of_student, LANES, cast(0, share))
    whole = n // LANES * LANES
    for j in range(0, whole, LANES):
        for i in range(LANES):
            teacher, student = terms_at(s, j + i, kind, share)
            of_teacher[i] += teacher
            of_student[i] += student
    for i in range(n - whole):
        teacher, student = terms_at(s, whole + i, kind, share)
        of_teacher[i] += teacher
        of_student[i] += student
    return block_sum(of_teacher, LANES), block_sum(of_student, LANES)


@njit(**EXACT)
def block_divergence(s: Scores, n: int, beta: float, zero: Real) -> Divergence:
    # A loop for each kind: LLVM vectorises none that branches by it.
    share = cast(beta, zero)
    if beta == 0:
        return Divergence(block_sums(s, n, FORWARD, share)[0], 0.0)
    if beta == 1:
        value = block_sums(s, n, REVERSE, share)[1]
        return Divergence(value, value)
    teacher, student = block_sums(s, n, BETWEEN, share)
    return Divergence(beta * teacher + (1 - beta) * student, student)


@njit(**FUSED)
def block_divergence_gradient(
    s: Scores, n: int, beta: float, offset: float, scale: Real, out: Pointer
) -> None:
    """out = scale times the gradient of the student's scores. `out` must not be one of them."""
    student, teacher, of_student, of_teacher = s
    share, of_row = cast(beta, scale), cast(offset, scale)
    if beta == 0:
        for j in range(n):
            p = exp_nonpositive(log_probability(student[j], of_student))
            out[j] = scale * (p - exp_nonpositive(log_probability(teacher[j], of_teacher)))
    elif beta == 1:
        for j in range(n):
            log_p = log_probability(student[j], of_student)
            log = log_p - log_probability(teacher[j], of_teacher) - of_row
            out[j] = scale * weighed(exp_nonpositive(log_p), log)
    else:
        scale *= cast(1, scale) - share
        for j in range(n):
            log_p = log_probability(student[j], of_student)
            over = over_mean(log_p, log_probability(teacher[j], of_teacher), share)[0]
            out[j] = scale * weighed(exp_nonpositive(log_p), over - of_row)
