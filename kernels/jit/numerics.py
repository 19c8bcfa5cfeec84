"""Arithmetic on one block of a row, as numerics.hpp has it; the two are to be read side by side.

(a) Pointers, not arrays: a block is a typed pointer and a length. LLVM vectorises every loop here.
(b) Numba passes a caller's fastmath and error model down to what it calls, so each function names
    its own. FUSED allows a multiply and an add to become one instruction, as GCC does unasked. SUM
    lets one accumulator become several, and stands only on functions whose sole chain of flagged
    additions is that accumulator: the flags lie on instructions, so the exp and the differences
    that are called keep the order they are written in. No flag ever assumes NaN or inf away.
(c) Bits are moved by LLVM instructions: Numba would widen every integer to 64 bits, which halves
    the lanes.
"""

# mypy: ignore-errors

from math import log
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

BFLOAT16 = 2
BLOCK = 2048
INFINITY = np.inf
UINT16 = np.uint16(0)

EXACT = {"error_model": "numpy", "fastmath": False}
FUSED = {"error_model": "numpy", "fastmath": {"contract"}}
SUM = {"error_model": "numpy", "fastmath": {"contract", "reassoc"}}


# Pointers and bits


def _element(tag):
    return tag.dtype if isinstance(tag, types.CPointer) else tag


@intrinsic
def pointer(typingctx, address, tag):
    """The address as a pointer to numbers of the tag's type."""

    def lower(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(_element(tag))(types.int64, tag), lower


@intrinsic
def real(typingctx, value, tag):
    """The value rounded to the tag's type, or to what the tag points to."""
    to = _element(tag)

    def lower(context, builder, signature, args):
        return context.cast(builder, args[0], signature.args[0], to)

    return to(value, tag), lower


@intrinsic
def block_buffer(typingctx, tag):
    """Room for one block on the stack of the calling function."""
    to = types.CPointer(_element(tag))

    def lower(context, builder, signature, args):
        element = context.get_data_type(to.dtype)
        return cgutils.alloca_once(builder, element, size=ir.Constant(ir.IntType(64), BLOCK))

    return to(tag), lower


@intrinsic
def address_of(typingctx, block):
    def lower(context, builder, signature, args):
        return builder.ptrtoint(args[0], ir.IntType(64))

    return types.int64(block), lower


@intrinsic
def take(typingctx, counter, amount):
    """Add to the counter at once for all threads; its value before."""

    def lower(context, builder, signature, args):
        return builder.atomic_rmw("add", args[0], args[1], "monotonic")

    return types.int64(counter, types.int64), lower


class _Format(NamedTuple):
    """The layout of a binary float."""

    bits: int
    mantissa: int
    bias: int


_FORMATS = {types.float32: _Format(32, 23, 127), types.float64: _Format(64, 52, 1023)}


def _integer(bits):
    integer = ir.IntType(bits)
    return integer, lambda value: ir.Constant(integer, value)


@intrinsic
def power_of_two(typingctx, shifted):
    """2^n, where n was rounded into the low mantissa bits of `shifted`."""
    form = _FORMATS[shifted]

    def lower(context, builder, signature, args):
        integer, constant = _integer(form.bits)
        n = builder.bitcast(args[0], integer)
        exponent = builder.shl(builder.add(n, constant(form.bias)), constant(form.mantissa))
        return builder.bitcast(exponent, args[0].type)

    return shifted(shifted), lower


@intrinsic
def order_key(typingctx, x):
    """An integer that orders as x does; of NaN, that of -inf."""
    form = _FORMATS[x]
    key = types.int32 if form.bits == 32 else types.int64

    def lower(context, builder, signature, args):
        integer, constant = _integer(form.bits)
        # Before the bits are moved: a select after them would merge with the maximum's own, into
        # a form that LLVM does not vectorise.
        is_number = builder.fcmp_ordered("ord", args[0], args[0])
        number = builder.select(is_number, args[0], context.get_constant(x, -INFINITY))
        bits = builder.bitcast(number, integer)
        negative = builder.ashr(bits, constant(form.bits - 1))
        flips = builder.and_(negative, constant((1 << (form.bits - 1)) - 1))
        return builder.xor(bits, flips)

    return key(x), lower


@intrinsic
def from_order_key(typingctx, key):
    """The number whose order_key this is."""
    to = types.float32 if key == types.int32 else types.float64
    form = _FORMATS[to]

    def lower(context, builder, signature, args):
        _, constant = _integer(form.bits)
        negative = builder.ashr(args[0], constant(form.bits - 1))
        flips = builder.and_(negative, constant((1 << (form.bits - 1)) - 1))
        return builder.bitcast(builder.xor(args[0], flips), context.get_value_type(to))

    return to(key), lower


# exp and tanh


class _Real(NamedTuple):
    log2e: float
    ln2_hi: float
    ln2_lo: float
    round_magic: float  # 1.5 * 2^mantissa
    exp_lowest: float  # -bias * ln 2: the result is exactly 0


_REALS = {
    types.float32: _Real(
        *map(
            np.float32,
            (1.44269504088896341, 0.693359375, -2.12194440e-4, 12582912.0, -88.02969),
        )
    ),
    types.float64: _Real(
        *map(
            np.float64,
            (
                1.44269504088896340736,
                6.93145751953125e-1,
                1.42860682030941723212e-6,
                6755399441055744.0,
                -709.0895657128241,
            ),
        )
    ),
}


def _polynomial(name, coefficients):
    """An intrinsic of x: the polynomial, constant first, whose coefficients are x's type's."""

    def define(typingctx, x):
        def lower(context, builder, signature, args):
            first, *rest = (context.get_constant(x, c) for c in reversed(coefficients[x]))
            value = first
            for coefficient in rest:
                value = builder.fadd(builder.fmul(value, args[0]), coefficient)
            return value

        return x(x), lower

    define.__name__ = name
    return intrinsic(define)


# (e^r - 1 - r) / r^2 on |r| <= ln2 / 2; relative error of e^r 1.0e-8 and 1.7e-17
_exp_tail = _polynomial(
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
_tanh_tail = _polynomial(
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


def exp_nonpositive(x):
    """e^x for x <= 0, within about 1 ulp; x above 0 is right up to the overflow of 2^n."""
    raise NotImplementedError("for compiled callers; below is what they get")


@overload(exp_nonpositive, jit_options=FUSED)
def _exp_nonpositive(x):
    log2e, ln2_hi, ln2_lo, round_magic, exp_lowest = _REALS[x]
    one = type(log2e)(1)

    def implementation(x):
        x = exp_lowest if x < exp_lowest else x
        shifted = x * log2e + round_magic
        n = shifted - round_magic
        r = (x - n * ln2_hi) - n * ln2_lo
        return ((_exp_tail(r) * r + one) * r + one) * power_of_two(shifted)

    return implementation


def exp_lowest(x):
    """Where e^x begins to be exactly 0, in x's type."""
    raise NotImplementedError("for compiled callers; below is what they get")


@overload(exp_lowest, jit_options=EXACT)
def _exp_lowest(x):
    lowest = _REALS[x].exp_lowest
    return lambda x: lowest


@njit(**FUSED)
def tanh_any(y):
    one = real(1, y)
    magnitude = abs(y)
    square = y * y
    decay = exp_nonpositive(real(-2, y) * magnitude)
    large = (one - decay) / (one + decay)
    large = -large if y < 0 else large
    small = y + y * square * _tanh_tail(square)
    return small if magnitude < real(0.625, y) else large


# The online (maximum, sum) state of a log-sum-exp


class LogSumExp(NamedTuple):
    maximum: float
    sum: float


class Lse(NamedTuple):
    """An unevaluated sum: rounded to one number, lse at 1e4 would be off by 5e-4 in float32."""

    high: float
    low: float


@njit(**EXACT)
def block_maximum(z, n):
    """The block's maximum but for NaN, over integers: a float max that LLVM may vectorise must
    assume NaN away."""
    best = order_key(real(-INFINITY, z))
    for j in range(n):
        key = order_key(z[j])
        best = key if key > best else best
    return from_order_key(best)


@njit(**EXACT)
def difference(z, shift):
    return z - shift


@njit(**SUM)
def block_exp_sum(z, n, shift):
    total = real(0, shift)
    for j in range(n):
        total += exp_nonpositive(difference(z[j], shift))
    return total


@njit(**FUSED)
def absorb(state, z, n):
    block = block_maximum(z, n)
    maximum = block if block > state.maximum else state.maximum
    # With every logit at -inf so far, -inf - -inf would poison a finite logit further on.
    shift = real(0, maximum) if maximum == -INFINITY else maximum
    kept = state.sum * exp_nonpositive(state.maximum - shift)
    return LogSumExp(maximum, kept + block_exp_sum(z, n, shift))


@njit(**EXACT)
def finish(state):
    log_sum = real(log(state.sum), state.sum)
    high = state.maximum + log_sum
    back = high - state.maximum
    return Lse(high, (state.maximum - (high - back)) + (log_sum - back))  # Knuth's two-sum


@njit(**EXACT)
def log_probability(z, lse):
    return (z - lse.high) - lse.low


# Second-pass sums over a row that is still in cache, given its finished lse


@njit(**SUM)
def block_log_probability_sum(z, n, lse):
    total = real(0, z)
    for j in range(n):
        total += log_probability(z[j], lse)
    return total


@njit(**SUM)
def block_log_probability_dot(z, coefficient, n, lse):
    total = real(0, z)
    for j in range(n):
        total += coefficient[j] * log_probability(z[j], lse)
    return total


@njit(**SUM)
def block_sum(x, n):
    total = real(0, x)
    for j in range(n):
        total += x[j]
    return total


@njit(**SUM)
def block_negative_entropy(z, n, lse):
    """The sum of p log p; a term whose p is 0 counts 0, not 0 * -inf."""
    total = real(0, z)
    lowest = exp_lowest(lse.high)
    for j in range(n):
        log_p = log_probability(z[j], lse)
        log_p = lowest if log_p < lowest else log_p
        total += exp_nonpositive(log_p) * log_p
    return total


@njit(**EXACT)
def block_contains(z, n, value):
    found = 0
    for j in range(n):
        found += z[j] == value
    return found > 0


# Elementwise maps of a block


@njit(**FUSED)
def block_softmax(z, n, lse, scale, out):
    for j in range(n):
        out[j] = scale * exp_nonpositive(log_probability(z[j], lse))


@njit(**FUSED)
def block_affine(x, n, scale, offset, out):
    for j in range(n):
        out[j] = x[j] * scale + offset


@njit(**FUSED)
def block_scale(x, n, scale, out):
    for j in range(n):
        out[j] = x[j] * scale


@njit(**FUSED)
def block_multiply(x, y, n):
    for j in range(n):
        x[j] *= y[j]


@njit(**FUSED)
def block_subtract(out, x, n, scale):
    for j in range(n):
        out[j] -= scale * x[j]


@njit(**FUSED)
def block_softcap(z, n, softcap):
    for j in range(n):
        z[j] = softcap * tanh_any(z[j] / softcap)


@njit(**FUSED)
def block_softcap_backward(grad, z, n, softcap):
    """The derivative of the cap is 1 - tanh^2, and tanh is z / softcap."""
    one = real(1, softcap)
    for j in range(n):
        ratio = z[j] / softcap
        grad[j] *= (one - ratio) * (one + ratio)


# 16-bit floats


def _conversion(name, source, to, lower32):
    """An intrinsic from one 16- or 32-bit float to the other, made of 32-bit instructions.

    `lower32(builder, constant, bits)` gives the result's bits, in 32.
    """

    def define(typingctx, value):
        def lower(context, builder, signature, args):
            integer, constant = _integer(32)
            if source == types.uint16:
                return builder.bitcast(
                    lower32(builder, constant, builder.zext(args[0], integer)), ir.FloatType()
                )
            bits = builder.bitcast(args[0], integer)
            return builder.trunc(lower32(builder, constant, bits), ir.IntType(16))

        return to(source), lower

    define.__name__ = name
    return intrinsic(define)


def _widen_bfloat16(builder, constant, half):
    return builder.shl(half, constant(16))


def _round_to_even(builder, constant, bits, dropped):
    """The bits with half a unit of what stays added, less a little where what stays is even."""
    odd = builder.and_(builder.lshr(bits, constant(dropped)), constant(1))
    return builder.add(builder.add(bits, constant((1 << (dropped - 1)) - 1)), odd)


def _narrow_bfloat16(builder, constant, bits):
    rounded = builder.lshr(_round_to_even(builder, constant, bits, 16), constant(16))
    magnitude = builder.and_(bits, constant(0x7FFFFFFF))
    # The carry could turn a NaN into an inf.
    is_nan = builder.icmp_unsigned(">", magnitude, constant(0x7F800000))
    return builder.select(is_nan, constant(0x7FC0), rounded)


def _widen_float16(builder, constant, half):
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


def _narrow_float16(builder, constant, bits):
    sign = builder.and_(builder.lshr(bits, constant(16)), constant(0x8000))
    magnitude = builder.and_(bits, constant(0x7FFFFFFF))
    # Below 2^-14 the sum with 0.5 puts a subnormal's bits, rounded to even, in the low mantissa.
    sum_with_half = builder.fadd(
        builder.bitcast(magnitude, ir.FloatType()), ir.Constant(ir.FloatType(), 0.5)
    )
    subnormal = builder.sub(builder.bitcast(sum_with_half, ir.IntType(32)), constant(0x3F000000))
    rounded = _round_to_even(builder, constant, magnitude, 13)
    normal = builder.lshr(builder.sub(rounded, constant(112 << 23)), constant(13))

    def where(condition, limit, yes, no):
        return builder.select(
            builder.icmp_unsigned(condition, magnitude, constant(limit)), yes, no
        )

    half = where("<", 113 << 23, subnormal, normal)
    half = where(">=", 0x477FF000, constant(0x7C00), half)  # 65520 and above round to inf
    half = where(">", 0x7F800000, constant(0x7E00), half)
    return builder.or_(half, sign)


widen_bfloat16 = _conversion("widen_bfloat16", types.uint16, types.float32, _widen_bfloat16)
widen_float16 = _conversion("widen_float16", types.uint16, types.float32, _widen_float16)
narrow_bfloat16 = _conversion("narrow_bfloat16", types.float32, types.uint16, _narrow_bfloat16)
narrow_float16 = _conversion("narrow_float16", types.float32, types.uint16, _narrow_float16)


@njit(**EXACT)
def widen(source, dtype, n, to):
    if dtype == BFLOAT16:
        for j in range(n):
            to[j] = widen_bfloat16(source[j])
    else:
        for j in range(n):
            to[j] = widen_float16(source[j])


@njit(**EXACT)
def narrow(source, dtype, n, to):
    if dtype == BFLOAT16:
        for j in range(n):
            to[j] = narrow_bfloat16(source[j])
    else:
        for j in range(n):
            to[j] = narrow_float16(source[j])


# Moving a finished block to memory

LINE = 64


@intrinsic
def copy_bytes(typingctx, source, n, to):
    def lower(context, builder, signature, args):
        pointers = [builder.inttoptr(args[k], cgutils.voidptr_t) for k in (2, 0)]
        cgutils.raw_memcpy(builder, *pointers, args[1], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), lower


@intrinsic
def zero_bytes(typingctx, to, n):
    def lower(context, builder, signature, args):
        cgutils.memset(builder, builder.inttoptr(args[0], cgutils.voidptr_t), args[1], 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), lower


@intrinsic
def stream_line(typingctx, source, to):
    """Store one line, aligned at `to`, without first reading it into the cache."""

    def lower(context, builder, signature, args):
        line = ir.VectorType(ir.IntType(64), LINE // 8).as_pointer()
        value = builder.load(builder.inttoptr(args[0], line), align=1)
        store = builder.store(value, builder.inttoptr(args[1], line), align=LINE)
        mark = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        store.set_metadata("nontemporal", mark)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), lower


@intrinsic
def finish_streaming(typingctx):
    """Streamed lines are weakly ordered: the thread that made them fences before others read."""

    def lower(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), lower


@njit(**EXACT)
def store_bytes(source, n, to, stream):
    """Whole lines written past the caches save a third of the traffic of a gradient too large for
    them. A gradient that fits is wanted there by the next matmul."""
    if stream:
        head = min(n, -to & (LINE - 1))
        copy_bytes(source, head, to)
        source, to, n = source + head, to + head, n - head
        while n >= LINE:
            stream_line(source, to)
            source, to, n = source + LINE, to + LINE, n - LINE
    copy_bytes(source, n, to)
