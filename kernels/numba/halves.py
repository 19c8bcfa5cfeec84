"""bfloat16 and float16: conversion to float32 and back. The Numba version of halves.hpp.

(a) LLVM vectorises these conversions. bfloat16 goes by shifts; so does float16 where the processor
    has no F16C: LLVM would call a function there that Numba does not link.
(b) Rounding is to nearest, ties to even. NaN stays NaN, and what is too large becomes inf.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from neglog.kernels.numba.intrinsics import constants, intrinsic

BFLOAT16, FLOAT16 = types.int16, types.uint16


@intrinsic
def widen(typingctx: Any, value: Any) -> Any:
    """The number that is computed with, of one in memory."""
    if isinstance(value, types.Float):
        return value(value), lambda context, builder, signature, args: args[0]

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if value == FLOAT16 and _has_f16c(context):
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())
        convert = _widen_bfloat16 if value == BFLOAT16 else _widen_float16
        integer, constant = constants(32)
        bits = convert(builder, constant, builder.zext(args[0], integer))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(value), lower


@intrinsic
def narrow(typingctx: Any, value: Any, memory: Any) -> Any:
    """The number rounded to what the pointer points to."""
    to = memory.dtype
    if to == value:
        return value(value, memory), lambda context, builder, signature, args: args[0]

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if to == FLOAT16 and _has_f16c(context):
            return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))
        convert = _narrow_bfloat16 if to == BFLOAT16 else _narrow_float16
        integer, constant = constants(32)
        half = convert(builder, constant, builder.bitcast(args[0], integer))
        return builder.trunc(half, ir.IntType(16))

    return to(types.float32, memory), lower


def _has_f16c(context: Any) -> bool:
    _, _, features = context.codegen().magic_tuple()
    return "+f16c" in features.split(",")


# From bits to bits, 32 of each


def _widen_bfloat16(builder: Any, constant: Any, half: Any) -> Any:
    return builder.shl(half, constant(16))


def _round_to_even(builder: Any, constant: Any, bits: Any, dropped: int) -> Any:
    """Add what makes it right to cut off the low `dropped` bits: just under half, and 1 if odd."""
    odd = builder.and_(builder.lshr(bits, constant(dropped)), constant(1))
    return builder.add(builder.add(bits, constant((1 << (dropped - 1)) - 1)), odd)


def _narrow_bfloat16(builder: Any, constant: Any, bits: Any) -> Any:
    rounded = builder.lshr(_round_to_even(builder, constant, bits, 16), constant(16))
    number = builder.bitcast(bits, ir.FloatType())
    # The carry of the rounding could turn a NaN into an inf.
    is_nan = builder.fcmp_unordered("uno", number, number)
    return builder.select(is_nan, constant(0x7FC0), rounded)


def _widen_float16(builder: Any, constant: Any, half: Any) -> Any:
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


def _narrow_float16(builder: Any, constant: Any, bits: Any) -> Any:
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
