"""exp, log and tanh of one number: the Numba version of exp.hpp, with the same functions.

(a) LLVM vectorises the loops that call them. It forms 2^n by scalef too, for llvm.ldexp, but that
    asks for n as an integer, and a loop was no faster by it.
(b) NaN passes through. exp is exactly 0 at and below its clamp, so also at -inf.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from neglog.kernels.numba.intrinsics import (  # isort: skip
    FUSED, INLINE, Pointer, Real, cast, exponent_of, mantissa_of, polynomial, power_of_two,
    scaled_polynomial,
)  # fmt: skip

# log2(e); ln 2 in two parts, and in one; 1.5 * 2^mantissa + bias, by which 2^n needs no addition;
# -bias * ln 2, where e^x is exactly 0
_REALS: dict[Any, Any] = {
    types.float32: np.array(
        (1.44269504088896341, 0.693359375, -2.12194440e-4, 0.69314718, 12583039.0, -88.02969),
        np.float32),
    types.float64: np.array(
        (1.44269504088896340736, 6.93145751953125e-1, 1.42860682030941723212e-6, 0.0,
         6755399441056767.0, -709.0895657128241), np.float64),
}  # fmt: skip

# e^r on |r| <= ln2 / 2 by the type in memory; relative error 1.0e-8, 1.7e-17, and for bfloat16
# 3e-6, which its rounding hides: see CoarseExp in exp.hpp.
_EXP = {
    types.float32: (1.0, 1.0, 0.5, 0.1666657699, 0.04166655462, 0.008363179053, 0.001392618358),
    types.float64: (
        1.0, 1.0, 0.5000000000000001022, 0.1666666666666666745, 0.04166666666662412787,
        0.008333333333330061833, 0.00138888889172137169, 0.0001984126986305361688,
        2.480152129595437513e-5, 2.755726845999706477e-6, 2.762008844540974816e-7,
        2.510038549551031908e-8,
    ),
    types.int16: (1.0, 0.9999668, 0.50003022, 0.16787592, 0.041513681),
}  # fmt: skip
_EXP[types.uint16] = _EXP[types.float32]
_scaled_exp_of_remainder = scaled_polynomial("scaled_exp_of_remainder", _EXP)

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


# atanh(s) / s in s^2
_atanh_series = polynomial(
    "atanh_series",
    {
        types.float32: tuple(1 / (2 * k + 1) for k in range(5)),
        types.float64: tuple(1 / (2 * k + 1) for k in range(11)),
    },
)
# The smallest normal number, and what brings one below it up, with its log2.
_SMALLEST: dict[Any, Any] = {
    types.float32: (np.float32(2.0**-126), np.float32(2.0**24), np.float32(24)),
    types.float64: (np.float64(2.0**-1022), np.float64(2.0**53), np.float64(53)),
}


def log_nonnegative(x: Real) -> Real:
    """log x of x from 0, -inf of 0, within 2 ulp: see exp.hpp."""
    raise NotImplementedError("only compiled functions may call this: they get the overload below")


@overload(log_nonnegative, jit_options={**FUSED, **INLINE})
def _log_nonnegative(x: Real) -> Real:
    _, ln2_hi, ln2_lo, _, _, _ = _REALS[x]
    smallest, up, log2_up = _SMALLEST[x]
    real = type(smallest)
    zero, one, two, infinity, nothing = (real(c) for c in (0, 1, 2, np.inf, np.nan))

    def implementation(x: Real) -> Real:
        tiny = x < smallest
        y = x * up if tiny else x
        m = mantissa_of(y)
        s = (m - one) / (m + one)
        n = exponent_of(y) - (log2_up if tiny else zero)
        value = n * ln2_hi + (n * ln2_lo + two * s * _atanh_series(s * s))
        of_others = -infinity if x == zero else nothing
        return (value if x < infinity else x) if x > zero else of_others

    return implementation


def exp_nonpositive(x: Real) -> Real:
    """e^x for x <= 0, within about 1 ulp. It holds for x > 0 too, until 2^n overflows."""
    raise NotImplementedError("only compiled functions may call this: they get the overload below")


@overload(exp_nonpositive, jit_options={**FUSED, **INLINE})
def _exp_nonpositive(x: Real) -> Real:
    log2e, ln2_hi, ln2_lo, _, round_magic, exp_lowest = _REALS[x]
    one = type(log2e)(1)

    def implementation(x: Real) -> Real:
        x = exp_lowest if x < exp_lowest else x
        shifted = x * log2e + round_magic
        n = shifted - round_magic
        r = (x - n * ln2_hi) - n * ln2_lo
        return _scaled_exp_of_remainder(r, one, x) * power_of_two(shifted)

    return implementation


def scaled_exp(x: Real, scale: Real, memory: Pointer) -> Real:
    """scale * e^x for |scale| up to a half of the largest number, and numbers of `memory`'s type.

    The scale is multiplied into the coefficients, before a loop that does not change it. For
    float32 ln 2 is in one part: see remainder_of_ln2 in exp.hpp.
    """
    raise NotImplementedError("only compiled functions may call this: they get the overload below")


@overload(scaled_exp, jit_options={**FUSED, **INLINE})
def _scaled_exp(x: Real, scale: Real, memory: Pointer) -> Real:
    log2e, ln2_hi, ln2_lo, ln2, round_magic, exp_lowest = _REALS[x]
    in_one_part = x == types.float32

    def implementation(x: Real, scale: Real, memory: Pointer) -> Real:
        x = exp_lowest if x < exp_lowest else x
        shifted = x * log2e + round_magic
        n = shifted - round_magic
        r = x - n * ln2 if in_one_part else (x - n * ln2_hi) - n * ln2_lo
        return _scaled_exp_of_remainder(r, scale, memory) * power_of_two(shifted)

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
