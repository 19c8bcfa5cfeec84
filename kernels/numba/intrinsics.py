"""What Numba needs to do as block.hpp does: pointers, buffers, bits, and polynomials.

(a) A block is a typed pointer and a length, not an array: LLVM vectorises every loop over them.
(b) Bits are moved by LLVM instructions. Numba would widen every integer to 64 bits, which halves
    the number of lanes of a vector.
(c) Numba passes the fastmath flags and the error model of a caller to the functions it calls, so
    each function names its own:
    EXACT  IEEE arithmetic, in the order it is written.
    FUSED  lets a multiplication and an addition become one instruction, as GCC does by default.
    SUM    lets one accumulator become several. It stands only on functions whose sole chain of
           flagged additions is that accumulator. The flags lie on instructions, so the exp and the
           differences that are called keep their order.
    No flag ever lets LLVM assume that NaN or inf do not occur.
(d) Of `tag` arguments only the type is used: a number, or a pointer to numbers, of float32, float64
    or another type.
"""

from __future__ import annotations

from math import inf
from typing import Any, TypeAlias

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

BLOCK = 2048
LINE = 64  # bytes of a cache line

EXACT: Any = {"error_model": "numpy", "fastmath": False}
FUSED: Any = {"error_model": "numpy", "fastmath": {"contract"}}
SUM: Any = {"error_model": "numpy", "fastmath": {"contract", "reassoc"}}

# In the signatures of compiled functions, where mypy knows no such types.
Real: TypeAlias = Any  # a float32 or a float64
Pointer: TypeAlias = Any  # to adjacent numbers, indexed like an array


def intrinsic(define: Any) -> Any:
    """numba.extending.intrinsic as Any: by its own type mypy asks for typingctx in each call."""
    return extending.intrinsic(define)


def _element(tag):
    return tag.dtype if isinstance(tag, types.CPointer) else tag


@intrinsic
def pointer(typingctx, address, tag):
    """The address as a pointer to numbers of the tag's type."""

    def lower(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(_element(tag))(types.int64, tag), lower


@intrinsic
def cast(typingctx, value, tag):
    """The value rounded to the tag's type, or to what the tag points to."""
    to = _element(tag)

    def lower(context, builder, signature, args):
        return context.cast(builder, args[0], signature.args[0], to)

    return to(value, tag), lower


@intrinsic
def block_buffer(typingctx, tag):
    """Memory for one block on the stack of the calling function, at the start of a cache line."""
    to = types.CPointer(_element(tag))

    def lower(context, builder, signature, args):
        element = context.get_data_type(to.dtype)
        block = cgutils.alloca_once(builder, element, size=ir.Constant(ir.IntType(64), BLOCK))
        block.align = LINE
        return block

    return to(tag), lower


@intrinsic
def same_address(typingctx, block, other):
    """Whether two pointers are equal."""

    def lower(context, builder, signature, args):
        return builder.icmp_unsigned("==", *(builder.ptrtoint(a, ir.IntType(64)) for a in args))

    return types.boolean(block, other), lower


@intrinsic
def fetch_add(typingctx, counter, amount):
    """Add to the counter, atomically; return its value before."""

    def lower(context, builder, signature, args):
        return builder.atomic_rmw("add", args[0], args[1], "monotonic")

    return types.int64(counter, types.int64), lower


# The number of bits, that of the mantissa, and the bias of the exponent.
_FORMATS = {types.float32: (32, 23, 127), types.float64: (64, 52, 1023)}


def constants(bits):
    """The integer type of so many bits, and what makes a constant of it."""
    integer = ir.IntType(bits)
    return integer, lambda value: ir.Constant(integer, value)


@intrinsic
def power_of_two(typingctx, shifted):
    """2^n, where n was rounded into the low mantissa bits of `shifted`."""
    bits, mantissa, bias = _FORMATS[shifted]

    def lower(context, builder, signature, args):
        integer, constant = constants(bits)
        n = builder.bitcast(args[0], integer)
        exponent = builder.shl(builder.add(n, constant(bias)), constant(mantissa))
        return builder.bitcast(exponent, args[0].type)

    return shifted(shifted), lower


def _flip_negative(builder, value):
    """From the bits of a float to an integer of the same order, and back."""
    sign_bit = value.type.width - 1
    _, constant = constants(value.type.width)
    negative = builder.ashr(value, constant(sign_bit))
    return builder.xor(value, builder.and_(negative, constant((1 << sign_bit) - 1)))


@intrinsic
def order_key(typingctx, x):
    """An integer of the same order as x; that of NaN is that of -inf."""
    key = types.int32 if x == types.float32 else types.int64

    def lower(context, builder, signature, args):
        # NaN is replaced before the bits are moved. A select after them would be merged with that
        # of the maximum, into a form that LLVM does not vectorise.
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


def polynomial(name, coefficients):
    """An intrinsic of x that evaluates a polynomial; coefficients by type, the constant first."""

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
