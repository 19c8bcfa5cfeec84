"""Scores of pairs, a block of one row against adjacent columns: that part of block.hpp.

Each column has a state of its own. The notes of block.py hold here.
"""

# mypy: ignore-errors

from math import inf

from numba import njit, types

from neglog.kernels.numba.block import (  # isort: skip
    EXACT, FUSED, LANES, block_buffer, block_sum, exp_nonpositive, pointer, polynomial, real,
)  # fmt: skip


@njit(**FUSED)
def block_pair_scores(similarity, n, scale, bias, z):
    """`bias` is an address, 0 for none. `z` may not be `similarity`: LLVM vectorises this only
    where the two are apart."""
    if bias == 0:
        for j in range(n):
            z[j] = similarity[j] * scale
    else:
        offset = pointer(bias, z)
        for j in range(n):
            z[j] = similarity[j] * scale + offset[j]


@njit(**EXACT)
def block_fill(x, n, value):
    for j in range(n):
        x[j] = value


@njit(**EXACT)
def block_exclude(z, n, group, groups):
    lowest = real(-inf, z)
    for j in range(n):
        kept = z[j]
        z[j] = lowest if groups[j] == group else kept


@njit(**EXACT)
def block_maximum_of_columns(z, n, maximum):
    """NaN is dropped here and comes back in the sum, as in block_maximum."""
    for j in range(n):
        score, best = z[j], maximum[j]
        maximum[j] = score if score > best else best


@njit(**EXACT)
def block_finite_shift(maximum, n):
    """-inf - -inf would be NaN: a column with nothing but -inf is shifted by 0."""
    none = real(0, maximum)
    for j in range(n):
        best = maximum[j]
        maximum[j] = none if best == -inf else best


@njit(**FUSED)
def block_exp_sum_both(z, n, column_sum):
    """One exp for both sums: right where no score is so far from 0 that e^z leaves the range.

    The row's in 64 partial sums for the sake of its 1 - p, as in block_exp_sum.
    """
    sums = block_buffer(z)
    block_fill(sums, LANES, real(0, z))
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
def block_exp_sum_of_columns(z, n, shift, column_sum):
    for j in range(n):
        column_sum[j] += exp_nonpositive(z[j] - shift[j])


@njit(**EXACT)
def block_pour(source, n, to):
    """Into sums in double, those of a few rows."""
    none = real(0, source)
    for j in range(n):
        to[j] += source[j]
        source[j] = none


@njit(**FUSED)
def block_pair_gradient_bounded(z, n, row, column, out):
    """row e^(z - row_lse) + column e^(z - column_lse), where the factors hold e^-lse already."""
    for j in range(n):
        out[j] = exp_nonpositive(z[j]) * (row + column[j])


@njit(**FUSED)
def block_pair_gradient(z, n, row, row_lse, column, column_lse, out):
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
def softplus(z):
    """softplus(z), and its derivative."""
    none, one, two = real(0, z), real(1, z), real(2, z)
    e = exp_nonpositive(-abs(z))
    sigmoid = (e if z < 0 else one) / (one + e)
    t = e / (two + e)  # log(1 + e) = 2 atanh(t)
    return (none if z < 0 else z) + two * t * _atanh_series(t * t), sigmoid


@njit(**FUSED)
def block_softplus(z, n, scale, out):
    """The sum of softplus(z), in partial sums as block_exp_sum; out = scale sigmoid(z)."""
    sums = block_buffer(z)
    block_fill(sums, LANES, real(0, z))
    for j in range(0, n, LANES):
        for i in range(min(LANES, n - j)):
            value, sigmoid = softplus(z[j + i])
            sums[i] += value
            out[j + i] = scale * sigmoid
    return block_sum(sums, LANES)
