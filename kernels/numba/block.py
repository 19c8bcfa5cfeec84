"""Arithmetic on one block of a row, as block.hpp has it; the two are to be read side by side.

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

from math import exp, inf, log
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

BFLOAT16 = 2
BLOCK = 2048
LANES = 64  # partial sums
LINE = 64  # bytes
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
    """Room for one block on the stack of the calling function, at the start of a cache line."""
    to = types.CPointer(_element(tag))

    def lower(context, builder, signature, args):
        element = context.get_data_type(to.dtype)
        block = cgutils.alloca_once(builder, element, size=ir.Constant(ir.IntType(64), BLOCK))
        block.align = LINE
        return block

    return to(tag), lower


@intrinsic
def same_place(typingctx, block, other):
    def lower(context, builder, signature, args):
        return builder.icmp_unsigned("==", *(builder.ptrtoint(a, ir.IntType(64)) for a in args))

    return types.boolean(block, other), lower


@intrinsic
def take(typingctx, counter, amount):
    """Add to the counter at once for all threads; its value before."""

    def lower(context, builder, signature, args):
        return builder.atomic_rmw("add", args[0], args[1], "monotonic")

    return types.int64(counter, types.int64), lower


# Bits, those of the mantissa, and the exponent's bias.
_FORMATS = {types.float32: (32, 23, 127), types.float64: (64, 52, 1023)}


def _integer(bits):
    integer = ir.IntType(bits)
    return integer, lambda value: ir.Constant(integer, value)


@intrinsic
def power_of_two(typingctx, shifted):
    """2^n, where n was rounded into the low mantissa bits of `shifted`."""
    bits, mantissa, bias = _FORMATS[shifted]

    def lower(context, builder, signature, args):
        integer, constant = _integer(bits)
        n = builder.bitcast(args[0], integer)
        exponent = builder.shl(builder.add(n, constant(bias)), constant(mantissa))
        return builder.bitcast(exponent, args[0].type)

    return shifted(shifted), lower


def _flip_negative(builder, value):
    """Between the bits of a float and an integer of the same order; its own inverse."""
    sign_bit = value.type.width - 1
    _, constant = _integer(value.type.width)
    negative = builder.ashr(value, constant(sign_bit))
    return builder.xor(value, builder.and_(negative, constant((1 << sign_bit) - 1)))


@intrinsic
def order_key(typingctx, x):
    """An integer that orders as x does; of NaN, that of -inf."""
    key = types.int32 if x == types.float32 else types.int64

    def lower(context, builder, signature, args):
        # Before the bits are moved: a select after them would merge with the maximum's own, into
        # a form that LLVM does not vectorise.
        is_number = builder.fcmp_ordered("ord", args[0], args[0])
        number = builder.select(is_number, args[0], context.get_constant(x, -inf))
        return _flip_negative(builder, builder.bitcast(number, context.get_value_type(key)))

    return key(x), lower


@intrinsic
def from_order_key(typingctx, key):
    """The number whose order_key this is."""
    to = types.float32 if key == types.int32 else types.float64

    def lower(context, builder, signature, args):
        bits = _flip_negative(builder, args[0])
        return builder.bitcast(bits, context.get_value_type(to))

    return to(key), lower


# exp and tanh


# log2(e); ln 2 in two parts; 1.5 * 2^mantissa; -bias * ln 2, where e^x comes out as exactly 0
_REALS = {
    types.float32: np.float32(
        (1.44269504088896341, 0.693359375, -2.12194440e-4, 12582912.0, -88.02969)),
    types.float64: np.float64(
        (1.44269504088896340736, 6.93145751953125e-1, 1.42860682030941723212e-6,
         6755399441055744.0, -709.0895657128241)),
}  # fmt: skip


def polynomial(name, coefficients):
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


# The online state of a log-sum-exp is (maximum, sum)


class Lse(NamedTuple):
    """An unevaluated sum: rounded to one number, lse at 1e4 would be off by 5e-4 in float32."""

    high: float
    low: float


@njit(**EXACT)
def block_maximum(z, n):
    """The block's maximum but for NaN, over integers: a float max that LLVM may vectorise must
    assume NaN away."""
    best = order_key(real(-inf, z))
    for j in range(n):
        key = order_key(z[j])
        best = key if key > best else best
    return from_order_key(best)


@njit(**FUSED)
def block_exp_sum(z, n, shift):
    """In 64 partial sums that meet in double: a float sum beside the maximum's own 1 costs a sure
    target's 1 - p its digits."""
    sums = block_buffer(shift)
    for i in range(LANES):
        sums[i] = real(0, shift)
    whole = n // LANES * LANES
    for j in range(0, whole, LANES):
        for i in range(LANES):
            sums[i] += exp_nonpositive(z[j + i] - shift)
    for i in range(n - whole):
        sums[i] += exp_nonpositive(z[whole + i] - shift)
    return block_sum(sums, LANES)


@njit(**FUSED)
def absorb(state, z, n):
    previous, total = state
    block = block_maximum(z, n)
    maximum = block if block > previous else previous
    # With every logit at -inf so far, -inf - -inf would poison a finite logit further on.
    shift = real(0, maximum) if maximum == -inf else maximum
    kept = total * exp_nonpositive(previous - shift)
    return maximum, kept + block_exp_sum(z, n, shift)


@njit(**EXACT)
def finish(state):
    maximum, total = state
    log_sum = log(total)
    both = maximum + log_sum
    back = both - maximum
    lost = (maximum - (both - back)) + (log_sum - back)  # Knuth's two-sum
    high = real(both, maximum)
    return Lse(high, real((both - high) + lost, maximum))


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
    total = 0.0
    for j in range(n):
        total += x[j]
    return total


@njit(**SUM)
def block_negative_entropy(z, n, lse):
    """The sum of p log p; a term whose p is 0 counts 0, not 0 * -inf."""
    total = real(0, z)
    for j in range(n):
        log_p = log_probability(z[j], lse)
        probability = exp_nonpositive(log_p)
        total += probability * log_p if probability != 0 else real(0, z)
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
    """`out` may be `z`, but not otherwise overlap it."""
    scale *= real(exp(-lse.low), scale)  # e^(z - high - low), with low taken out of the loop
    if same_place(z, out):  # unsure which it is, LLVM would leave this case unvectorised
        for j in range(n):
            z[j] = scale * exp_nonpositive(z[j] - lse.high)
    else:
        for j in range(n):
            out[j] = scale * exp_nonpositive(z[j] - lse.high)


@njit(**EXACT)
def block_copy(x, n, out):
    for j in range(n):
        out[j] = x[j]


@njit(**FUSED)
def block_affine(x, n, scale, offset):
    for j in range(n):
        x[j] = x[j] * scale + offset


@njit(**FUSED)
def block_scale(x, n, scale):
    for j in range(n):
        x[j] *= scale


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


def _conversion(source, to):
    """Makes an intrinsic of a function (builder, constant, bits) from bits to bits, 32 of each."""

    def decorate(convert):
        def define(typingctx, value):
            def lower(context, builder, signature, args):
                integer, constant = _integer(32)
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
def widen_bfloat16(builder, constant, half):
    return builder.shl(half, constant(16))


def _round_to_even(builder, constant, bits, dropped):
    """The bits with half a unit of what stays added, less a little where what stays is even."""
    odd = builder.and_(builder.lshr(bits, constant(dropped)), constant(1))
    return builder.add(builder.add(bits, constant((1 << (dropped - 1)) - 1)), odd)


@_conversion(types.float32, types.uint16)
def narrow_bfloat16(builder, constant, bits):
    rounded = builder.lshr(_round_to_even(builder, constant, bits, 16), constant(16))
    magnitude = builder.and_(bits, constant(0x7FFFFFFF))
    # The carry could turn a NaN into an inf.
    is_nan = builder.icmp_unsigned(">", magnitude, constant(0x7F800000))
    return builder.select(is_nan, constant(0x7FC0), rounded)


@_conversion(types.uint16, types.float32)
def widen_float16(builder, constant, half):
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
def narrow_float16(builder, constant, bits):
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
        is_so = builder.icmp_unsigned(condition, magnitude, constant(limit))
        return builder.select(is_so, yes, no)

    half = where("<", 113 << 23, subnormal, normal)
    half = where(">=", 0x477FF000, constant(0x7C00), half)  # 65520 and above round to inf
    half = where(">", 0x7F800000, constant(0x7E00), half)
    return builder.or_(half, sign)


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
