"""Arithmetic on one block of a row: the Numba version of block.hpp, with the same functions.

Read the two side by side. The notes of block.hpp hold here, those on Numba stand in intrinsics.py.
A block is a pointer `z` and a length `n`. bfloat16 has no functions of its own: a block of it is
converted to float32 first.
"""

from __future__ import annotations

from math import exp, inf, log
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numba import njit, types
from numba.extending import overload

from neglog.kernels.numba.intrinsics import (  # isort: skip
    EXACT, FUSED, SUM, Pointer, Real, block_buffer, cast, from_order_key, order_key, pointer,
    polynomial, power_of_two, same_address,
)  # fmt: skip

LANES = 64  # partial sums
UINT8 = np.uint8(0)


# exp and tanh

# log2(e); ln 2 in two parts; 1.5 * 2^mantissa; -bias * ln 2, where e^x is exactly 0
_REALS: dict[Any, Any] = {
    types.float32: np.array(
        (1.44269504088896341, 0.693359375, -2.12194440e-4, 12582912.0, -88.02969), np.float32),
    types.float64: np.array(
        (1.44269504088896340736, 6.93145751953125e-1, 1.42860682030941723212e-6,
         6755399441055744.0, -709.0895657128241), np.float64),
}  # fmt: skip


# (e^r - 1 - r) / r^2 on |r| <= ln2 / 2; relative error of e^r 1.0e-8 and 1.7e-17
_exp_tail = polynomial(
    "exp_tail",
    {
        types.float32: (0.5, 0.1666657699, 0.04166655462, 0.008363179053, 0.001392618358),
        types.float64: (
            0.5000000000000001022, 0.1666666666666666745, 0.04166666666662412787,
            0.008333333333330061833, 0.00138888889172137169, 0.0001984126986305361688,
            2.480152129595437513e-5, 2.755726845999706477e-6, 2.762008844540974816e-7,
            2.510038549551031908e-8,
        ),
    },
)  # fmt: skip

# (tanh(y) / y - 1) / y^2 in y^2 on |y| <= 0.625; relative error 6.1e-10 and 5.5e-20
_tanh_tail = polynomial(
    "tanh_tail",
    {
        types.float32: (
            -0.3333333317, 0.1333330356, -0.05395925958, 0.02176891865, -0.008343945516,
            0.002292744816,
        ),
        types.float64: (
            -0.3333333333333333332, 0.1333333333333332076, -0.05396825396823590134,
            0.02186948853513322201, -0.008863235499801992569, 0.003592127507599252229,
            -0.001455828399830324586, 0.0005899818158388232071, -0.000238889446367511739,
            9.604109157026265988e-5, -3.708106921544233385e-5, 1.220992179016278166e-5,
            -2.438831631472087804e-6,
        ),
    },
)  # fmt: skip


def exp_nonpositive(x: Real) -> Real:
    """e^x for x <= 0, within about 1 ulp. It holds for x > 0 too, until 2^n overflows."""
    raise NotImplementedError("only compiled functions may call this: they get the overload below")


@overload(exp_nonpositive, jit_options=FUSED)
def _exp_nonpositive(x: Real) -> Real:
    log2e, ln2_hi, ln2_lo, round_magic, exp_lowest = _REALS[x]
    one = type(log2e)(1)

    def implementation(x: Real) -> Real:
        x = exp_lowest if x < exp_lowest else x
        shifted = x * log2e + round_magic
        n = shifted - round_magic
        r = (x - n * ln2_hi) - n * ln2_lo
        return ((_exp_tail(r) * r + one) * r + one) * power_of_two(shifted)

    return implementation


@njit(**FUSED)
def tanh_any(y: Real) -> Real:
    """tanh of any number: by e^(-2 |y|), near 0 by a polynomial, as that cancels there."""
    one = cast(1, y)
    magnitude = abs(y)
    square = y * y
    decay = exp_nonpositive(cast(-2, y) * magnitude)
    large = (one - decay) / (one + decay)
    large = -large if y < 0 else large
    small = y + y * square * _tanh_tail(square)
    return small if magnitude < cast(0.625, y) else large


@njit(**FUSED)
def tanh_slope(y: Real) -> Real:
    """The derivative of tanh, 1 - tanh^2, which written so would have no digit near 1."""
    one = cast(1, y)
    decay = exp_nonpositive(cast(-2, y) * abs(y))
    return cast(4, y) * decay / ((one + decay) * (one + decay))


# The online log-sum-exp: over the numbers seen so far, their maximum and sum of e^(z - maximum)

LseState: TypeAlias = tuple[Real, float]


class Lse(NamedTuple):
    """A log-sum-exp as the unevaluated sum of two numbers.

    One float32 near 1e4 would be off by 5e-4.
    """

    high: float
    low: float


@njit(**EXACT)
def block_maximum(z: Pointer, n: int) -> Real:
    """The block's maximum, without NaN.

    Over integers, because LLVM vectorises a maximum of floats only if it may assume that there is
    no NaN.
    """
    best = order_key(cast(-inf, z))
    for j in range(n):
        key = order_key(z[j])
        best = key if key > best else best
    return from_order_key(best)


@njit(**EXACT)
def block_fill(x: Pointer, n: int, value: Real) -> None:
    for j in range(n):
        x[j] = value


@njit(**SUM)
def block_sum(x: Pointer, n: int) -> float:
    total = 0.0
    for j in range(n):
        total += x[j]
    return total


@njit(**FUSED)
def block_exp_sum(z: Pointer, n: int, shift: Real) -> float:
    """The sum of e^(z - shift), by 64 partial sums that are added in double: see block.hpp."""
    sums = block_buffer(shift)
    block_fill(sums, LANES, cast(0, sums))
    whole = n // LANES * LANES
    for j in range(0, whole, LANES):
        for i in range(LANES):
            sums[i] += exp_nonpositive(z[j + i] - shift)
    for i in range(n - whole):
        sums[i] += exp_nonpositive(z[whole + i] - shift)
    return block_sum(sums, LANES)


@njit(**FUSED)
def update(state: LseState, z: Pointer, n: int) -> LseState:
    """The state with a block added."""
    previous, total = state
    block = block_maximum(z, n)
    maximum = block if block > previous else previous
    # While every logit is -inf, z - maximum would be -inf - -inf = NaN and stay in the sum.
    shift = cast(0, maximum) if maximum == -inf else maximum
    kept = total * exp_nonpositive(previous - shift)
    return maximum, kept + block_exp_sum(z, n, shift)


@njit(**EXACT)
def finish(state: LseState) -> Lse:
    maximum, total = state
    log_sum = log(total)
    both = maximum + log_sum
    back = both - maximum
    lost = (maximum - (both - back)) + (log_sum - back)  # Knuth's two-sum
    high = cast(both, maximum)
    return Lse(high, cast((both - high) + lost, maximum))


@njit(**EXACT)
def log_probability(z: Real, lse: Lse) -> Real:
    return (z - lse.high) - lse.low


# Sums over a row in a second pass, while it is in cache, given its lse


@njit(**FUSED)
def block_log_probability_sum(z: Pointer, n: int, lse: Lse) -> float:
    sums = block_buffer(z)
    block_fill(sums, LANES, cast(0, sums))
    whole = n // LANES * LANES
    for j in range(0, whole, LANES):
        for i in range(LANES):
            sums[i] += log_probability(z[j + i], lse)
    for i in range(n - whole):
        sums[i] += log_probability(z[whole + i], lse)
    return block_sum(sums, LANES)


@njit(**FUSED)
def block_log_probability_dot(z: Pointer, coefficient: Pointer, n: int, lse: Lse) -> float:
    sums = block_buffer(z)
    block_fill(sums, LANES, cast(0, sums))
    whole = n // LANES * LANES
    for j in range(0, whole, LANES):
        for i in range(LANES):
            sums[i] += coefficient[j + i] * log_probability(z[j + i], lse)
    for i in range(n - whole):
        sums[i] += coefficient[whole + i] * log_probability(z[whole + i], lse)
    return block_sum(sums, LANES)


@njit(**FUSED)
def negative_entropy(log_p: Real) -> Real:
    """p log p: 0 where p is 0, not 0 * -inf."""
    p = exp_nonpositive(log_p)
    return p * log_p if p != 0 else cast(0, log_p)


@njit(**FUSED)
def block_negative_entropy(z: Pointer, n: int, lse: Lse) -> float:
    sums = block_buffer(z)
    block_fill(sums, LANES, cast(0, sums))
    whole = n // LANES * LANES
    for j in range(0, whole, LANES):
        for i in range(LANES):
            sums[i] += negative_entropy(log_probability(z[j + i], lse))
    for i in range(n - whole):
        sums[i] += negative_entropy(log_probability(z[whole + i], lse))
    return block_sum(sums, LANES)


@njit(**EXACT)
def block_contains(z: Pointer, n: int, value: Real) -> bool:
    found = 0
    for j in range(n):
        found += z[j] == value
    return found > 0


# Elementwise maps of a block


@njit(**FUSED)
def block_softmax(z: Pointer, n: int, lse: Lse, scale: Real, out: Pointer) -> None:
    """out = scale * softmax(z). `out` may be `z`, but not otherwise overlap it."""
    scale *= cast(exp(-lse.low), scale)  # e^(z - high - low) = e^-low e^(z - high)
    if same_address(z, out):  # LLVM vectorises neither case where it cannot tell them apart
        for j in range(n):
            z[j] = scale * exp_nonpositive(z[j] - lse.high)
    else:
        for j in range(n):
            out[j] = scale * exp_nonpositive(z[j] - lse.high)


@njit(**EXACT)
def block_copy(x: Pointer, n: int, out: Pointer) -> None:
    for j in range(n):
        out[j] = x[j]


@njit(**FUSED)
def block_affine(x: Pointer, n: int, scale: Real, offset: Real) -> None:
    for j in range(n):
        x[j] = x[j] * scale + offset


@njit(**FUSED)
def block_scale(x: Pointer, n: int, scale: Real) -> None:
    for j in range(n):
        x[j] *= scale


@njit(**FUSED)
def block_multiply(x: Pointer, y: Pointer, n: int) -> None:
    for j in range(n):
        x[j] *= y[j]


@njit(**FUSED)
def block_subtract(out: Pointer, x: Pointer, n: int, scale: Real) -> None:
    """out -= scale * x"""
    for j in range(n):
        out[j] -= scale * x[j]


@njit(**FUSED)
def block_softcap(z: Pointer, n: int, softcap: Real) -> None:
    for j in range(n):
        z[j] = softcap * tanh_any(z[j] / softcap)


@njit(**FUSED)
def block_softcap_and_slope(z: Pointer, n: int, softcap: Real, slope: Pointer) -> None:
    """The same, and the derivative of the cap."""
    for j in range(n):
        y = z[j] / softcap
        z[j] = softcap * tanh_any(y)
        slope[j] = tanh_slope(y)


@njit(**EXACT)
def zero_bytes(address: int, n: int) -> None:
    for byte in range(n):
        pointer(address, UINT8)[byte] = 0
