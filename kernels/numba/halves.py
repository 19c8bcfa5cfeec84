"""bfloat16 and float16: conversion to float32 and back. The Numba version of halves.hpp.

(a) LLVM vectorises these conversions by shifts and integers. It needs no F16C instructions, so both
    types are converted in the same way.
(b) Rounding is to nearest, ties to even. NaN stays NaN, and what is too large becomes inf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types

from neglog.kernels.numba.intrinsics import EXACT, Pointer, constants, intrinsic

BFLOAT16 = 2


def _conversion(source: Any, to: Any) -> Callable[[Callable], Any]:
    """Makes an intrinsic of a function (builder, constant, bits) from bits to bits, 32 of each."""

    def decorate(convert: Callable) -> Any:
        def define(typingctx: Any, value: Any) -> Any:
            def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                integer, constant = constants(32)
                if to == types.uint16:
                    result = convert(builder, constant, builder.bitcast(args[0], integer))
                    return builder.trunc(result, ir.IntType(16))
                result = convert(builder, constant, builder.zext(args[0], integer))
                return builder.bitcast(result, ir.FloatType())

            return to(source), lower

        define.__name__ = convert.__name__
        return intrinsic(define)

    return decorate


@_conversion(types.uint16, types.float32)
def widen_bfloat16(builder: Any, constant: Any, half: Any) -> Any:
    return builder.shl(half, constant(16))


def _round_to_even(builder: Any, constant: Any, bits: Any, dropped: int) -> Any:
    """Add what makes it right to cut off the low `dropped` bits: just under half, and 1 if odd."""
    odd = builder.and_(builder.lshr(bits, constant(dropped)), constant(1))
    return builder.add(builder.add(bits, constant((1 << (dropped - 1)) - 1)), odd)


@_conversion(types.float32, types.uint16)
def narrow_bfloat16(builder: Any, constant: Any, bits: Any) -> Any:
    rounded = builder.lshr(_round_to_even(builder, constant, bits, 16), constant(16))
    magnitude = builder.and_(bits, constant(0x7FFFFFFF))
    # The carry of the rounding could turn a NaN into an inf.
    is_nan = builder.icmp_unsigned(">", magnitude, constant(0x7F800000))
    return builder.select(is_nan, constant(0x7FC0), rounded)


@_conversion(types.uint16, types.float32)
def widen_float16(builder: Any, constant: Any, half: Any) -> Any:
    sign = builder.shl(builder.and_(half, constant(0x8000)), constant(16))
    magnitude = builder.shl(builder.and_(half, constant(0x7FFF)), constant(13))
    # Multiplying by 2^112 moves the bias from 15 to 127 and normalises subnormals on the way.
    number = builder.fmul(
        builder.bitcast(magnitude, ir.FloatType()), ir.Constant(ir.FloatType(), 2.0**112)
    )
    is_special = builder.icmp_unsigned(">=", magnitude, constant(0x7C00 << 13))
    special = builder.select(is_special, constant(0x7F800000), constant(0))
    bits = builder.bitcast(number, ir.IntType(32))
    return builder.or_(builder.or_(bits, special), sign)


@_conversion(types.float32, types.uint16)
def narrow_float16(builder: Any, constant: Any, bits: Any) -> Any:
    sign = builder.and_(builder.lshr(bits, constant(16)), constant(0x8000))
    magnitude = builder.and_(bits, constant(0x7FFFFFFF))
    # Below 2^-14 the sum with 0.5 puts a subnormal's bits, rounded to even, in the low mantissa.
    sum_with_half = builder.fadd(
        builder.bitcast(magnitude, ir.FloatType()), ir.Constant(ir.FloatType(), 0.5)
    )
    subnormal = builder.sub(builder.bitcast(sum_with_half, ir.IntType(32)), constant(0x3F000000))
    rounded = _round_to_even(builder, constant, magnitude, 13)
    normal = builder.lshr(builder.sub(rounded, constant(112 << 23)), constant(13))

    def where(condition: str, limit: int, yes: Any, no: Any) -> Any:
        is_so = builder.icmp_unsigned(condition, magnitude, constant(limit))
        return builder.select(is_so, yes, no)

    half = where("<", 113 << 23, subnormal, normal)
    half = where(">=", 0x477FF000, constant(0x7C00), half)  # 65520 and above round to inf
    half = where(">", 0x7F800000, constant(0x7E00), half)
    return builder.or_(half, sign)


@njit(**EXACT)
def widen_block(source: Pointer, dtype: int, n: int, to: Pointer) -> None:
    if dtype == BFLOAT16:
        for j in range(n):
            to[j] = widen_bfloat16(source[j])
    else:
        for j in range(n):
            to[j] = widen_float16(source[j])


@njit(**EXACT)
def narrow_block(source: Pointer, dtype: int, n: int, to: Pointer) -> None:
    if dtype == BFLOAT16:
        for j in range(n):
            to[j] = narrow_bfloat16(source[j])
    else:
        for j in range(n):
            to[j] = narrow_float16(source[j])
