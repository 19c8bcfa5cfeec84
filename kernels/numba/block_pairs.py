"""Arithmetic on the scores of pairs: the Numba version of block_pairs.hpp, with the same functions.

Read the two side by side. block_finite_shift is a loop of pairs.pyx, as block_fill of block.py is.
"""

from __future__ import annotations

from math import inf

from numba import njit, types

from neglog.kernels.numba.block import block_fill, block_sum  # isort: skip
from neglog.kernels.numba.exp import exp_nonpositive  # isort: skip
from neglog.kernels.numba.intrinsics import (  # isort: skip
    EXACT, FUSED, LANES, Pointer, Real, cast, lanes_buffer, pointer, polynomial,
)  # fmt: skip


@njit(**FUSED)
def block_pair_scores(similarity: Pointer, n: int, scale: Real, bias: int, z: Pointer) -> None:
    """z = scale * similarity + bias; `bias` is an address, 0 for none.

    `z` must not be `similarity`: LLVM vectorises this only where the two are apart.
    """
    if bias == 0:
        for j in range(n):
            z[j] = similarity[j] * scale
    else:
        offset = pointer(bias, z)
        for j in range(n):
            z[j] = similarity[j] * scale + offset[j]


@njit(**EXACT)
def block_exclude(z: Pointer, n: int, group: int, groups: Pointer) -> None:
    """z = -inf where a column's group is the row's."""
    lowest = cast(-inf, z)
    for j in range(n):
        kept = z[j]
        z[j] = lowest if groups[j] == group else kept


@njit(**EXACT)
def block_maximum_of_columns(z: Pointer, n: int, maximum: Pointer) -> None:
    """Drops NaN, which comes back in the sum, as in block_maximum."""
    for j in range(n):
        score, best = z[j], maximum[j]
        maximum[j] = score if score > best else best


@njit(**EXACT)
def block_finite_shift(maximum: Pointer, n: int) -> None:
    """The shift of a column of -inf alone is 0: -inf - -inf would be NaN."""
    none = cast(0, maximum)
    for j in range(n):
        best = maximum[j]
        maximum[j] = none if best == -inf else best


@njit(**FUSED)
def block_exp_sum_of_row_and_columns(z: Pointer, n: int, column_sum: Pointer) -> float:
    """The row's sum of e^z; each e^z is also added to its column's sum.

    There is no shift, so the scores must be near enough to 0 for e^z to be in range.
    """
    sums = lanes_buffer(z)
    block_fill(sums, LANES, cast(0, z))
    whole = n // LANES * LANES
    for j in range(0, whole, LANES):
        for i in range(LANES):
            e = exp_nonpositive(z[j + i])
            sums[i] += e
            column_sum[j + i] += e
    for i in range(n - whole):
        e = exp_nonpositive(z[whole + i])
        sums[i] += e
        column_sum[whole + i] += e
    return block_sum(sums, LANES)


@njit(**FUSED)
def block_exp_sum_of_columns(z: Pointer, n: int, shift: Pointer, column_sum: Pointer) -> None:
    for j in range(n):
        column_sum[j] += exp_nonpositive(z[j] - shift[j])


@njit(**EXACT)
def block_flush_sums(partial: Pointer, n: int, total: Pointer) -> None:
    """Add the columns' partial sums of a few rows to their totals in double, and clear them."""
    zero = cast(0, partial)
    for j in range(n):
        total[j] += partial[j]
        partial[j] = zero


@njit(**FUSED)
def block_pair_gradient_bounded(
    z: Pointer, n: int, row: Real, column: Pointer, out: Pointer
) -> None:
    """out = (row + column) e^z: block_pair_gradient near 0, with e^-lse in both factors."""
    for j in range(n):
        out[j] = exp_nonpositive(z[j]) * (row + column[j])


@njit(**FUSED)
def block_pair_gradient(
    z: Pointer, n: int, row: Real, row_lse: Real, column: Pointer, column_lse: Pointer,
    out: Pointer,
) -> None:  # fmt: skip
    """out = row e^(z - row_lse) + column e^(z - column_lse)"""
    for j in range(n):
        of_row = row * exp_nonpositive(z[j] - row_lse)
        out[j] = of_row + column[j] * exp_nonpositive(z[j] - column_lse[j])


# atanh(t) / t in t^2 for t <= 1/3; the series is cut at 2e-9 and 2e-18.
_atanh_series = polynomial(
    "atanh_series",
    {
        types.float32: tuple(1 / (2 * k + 1) for k in range(9)),
        types.float64: tuple(1 / (2 * k + 1) for k in range(18)),
    },
)


@njit(**FUSED)
def softplus(z: Real) -> tuple[Real, Real]:
    """softplus(z) = log(1 + e^z), and its derivative."""
    none, one, two = cast(0, z), cast(1, z), cast(2, z)
    e = exp_nonpositive(-abs(z))
    sigmoid = (e if z < 0 else one) / (one + e)
    t = e / (two + e)  # log(1 + e) = 2 atanh(t)
    return (none if z < 0 else z) + two * t * _atanh_series(t * t), sigmoid


@njit(**FUSED)
def block_softplus(z: Pointer, n: int, scale: Real, out: Pointer) -> float:
    """Returns the sum of softplus(z), by 64 partial sums; out = scale * sigmoid(z)."""
    sums = lanes_buffer(z)
    block_fill(sums, LANES, cast(0, z))
    for j in range(0, n, LANES):
        for i in range(min(LANES, n - j)):
            value, sigmoid = softplus(z[j + i])
            sums[i] += value
            out[j + i] = scale * sigmoid
    return block_sum(sums, LANES)
