"""What the kernels of kl are asked: the Numba version of kl_problem.hpp."""

from __future__ import annotations

from typing import NamedTuple

from neglog.kernels.numba.intrinsics import Real


class Problem(NamedTuple):
    """As KlProblem, but that `column` (rows, named) is each row's named classes in ascending order,
    vocab for none, and `bins` (rows, named + 1) the teacher's log-probabilities of them and of all
    others."""

    zero: Real  # a number of the type that is computed in
    dtype: int
    teacher_dtype: int
    rows: int
    vocab: int
    logits: int
    logits_stride: int
    teacher: int
    teacher_stride: int
    probabilities: bool
    column: int
    bins: int
    named: int  # how many classes in each row; -1 for a teacher of all
    target: int
    token_weight: int
    ignore_index: int
    beta: float
    temperature: float
    soft_weight: float
    hard_weight: float
    logit_scale: float
    softcap: float
    teacher_scale: float
    teacher_softcap: float


class Output(NamedTuple):
    """Addresses, 0 for none."""

    loss: int
    divergence: int
    cross_entropy: int


class Gradient(NamedTuple):
    """As KlGradient."""

    out: int
    out_stride: int
    bypass_cache: bool
    grad: int
    grad_stride: int
    grad_scale: float
