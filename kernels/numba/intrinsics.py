"""What Numba needs to do as lanes.hpp does: pointers, buffers, bits, polynomials, and the caches.

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
(d) These three are for functions that compiled functions call, and leave out the wrappers by which
    Python and C would call them: they were a third of the time to compile nll. SERIAL and PARALLEL
    are for what Python calls. INLINE is added for what a loop calls for each number.
(e) Of `tag` arguments only the type is used: a number, or a pointer to numbers. Numba has no type
    for 16-bit numbers: a pointer to int16 is one to bfloat16, and a pointer to uint16 to float16.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

BLOCK = 2048
# What a loop takes at once: partial sums, or numbers that are written. Whole lines of every type.
LANES = 64
LINE = 64  # bytes of a cache line

_INNER: Any = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
EXACT: Any = {**_INNER, "fastmath": False}
FUSED: Any = {**_INNER, "fastmath": {"contract"}}
SUM: Any = {**_INNER, "fastmath": {"contract", "reassoc"}}
INLINE: Any = {"forceinline": True}

_ENTRY: Any = {"error_model": "numpy", "fastmath": False, "cache": True}
SERIAL: Any = {**_ENTRY, "nogil": True}
PARALLEL: Any = {**_ENTRY, "parallel": True}

# In the signatures of compiled functions, where mypy knows no such types.
Real: TypeAlias = Any  # a float32 or a float64
Pointer: TypeAlias = Any  # to adjacent numbers, indexed like an array

_INT32, _INT64, _BYTES = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()


def intrinsic(define: Any) -> Any:
    """numba.extending.intrinsic as Any: by its own type mypy asks for typingctx in each call."""
    return extending.intrinsic(define)


def _element(tag):
    return tag.dtype if isinstance(tag, types.CPointer) else tag


# Pointers and buffers


@intrinsic
def pointer(typingctx, address, tag):
    """The address as a pointer to numbers of the tag's type."""

    def lower(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(_element(tag))(types.int64, tag), lower


@intrinsic
def address_of(typingctx, block):
    def lower(context, builder, signature, args):
        return builder.ptrtoint(args[0], _INT64)

    return types.int64(block), lower


@intrinsic
def advance(typingctx, block, n):
    """The pointer to the n-th number from this one."""

    def lower(context, builder, signature, args):
        return builder.gep(args[0], [args[1]])

    return block(block, types.int64), lower


@intrinsic
def itemsize(typingctx, tag):
    """The bytes of a number."""

    def lower(context, builder, signature, args):
        return _INT64(_element(tag).bitwidth // 8)

    return types.int64(tag), lower


@intrinsic
def is_real(typingctx, tag):
    """Whether the tag's type is one that is computed in."""

    def lower(context, builder, signature, args):
        return ir.IntType(1)(isinstance(_element(tag), types.Float))

    return types.boolean(tag), lower


@intrinsic
def cast(typingctx, value, tag):
    """The value rounded to the tag's type, or to what the tag points to."""
    to = _element(tag)

    def lower(context, builder, signature, args):
        return context.cast(builder, args[0], signature.args[0], to)

    return to(value, tag), lower


def _buffer(name, numbers):
    """An intrinsic that returns memory for so many numbers, at the start of a cache line."""

    def define(typingctx, tag):
        to = types.CPointer(_element(tag))

        def lower(context, builder, signature, args):
            element = context.get_data_type(to.dtype)
            memory = cgutils.alloca_once(builder, element, size=_INT64(numbers))
            memory.align = LINE
            return memory

        return to(tag), lower

    define.__name__ = name
    return intrinsic(define)


# They lie on the stack of the calling function.
block_buffer = _buffer("block_buffer", BLOCK)
lanes_buffer = _buffer("lanes_buffer", LANES)


@intrinsic
def copy_some(typingctx, source, n, to):
    """Copy n numbers. A loop for as many as are left after LANES at a time would be unrolled."""
    size = to.dtype.bitwidth // 8

    def lower(context, builder, signature, args):
        source, n, to = args
        cgutils.raw_memcpy(builder, to, source, n, size)
        return context.get_dummy_value()

    return types.none(source, types.int64, to), lower


@intrinsic
def fetch_add(typingctx, counter, amount):
    """Add to the counter, atomically; return its value before."""

    def lower(context, builder, signature, args):
        return builder.atomic_rmw("add", args[0], args[1], "monotonic")

    return types.int64(counter, types.int64), lower


# The caches


def _copy_of_lanes(name, bypass_cache):
    """An intrinsic that copies LANES numbers; both places begin at a cache line."""

    def define(typingctx, lanes, to):
        def lower(context, builder, signature, args):
            line = ir.VectorType(_INT32, LINE // 4).as_pointer()
            once = builder.module.add_metadata([_INT32(1)])
            for part in range(0, LANES * to.dtype.bitwidth // 8, LINE):
                source, target = (
                    builder.bitcast(builder.gep(builder.bitcast(a, _BYTES), [_INT64(part)]), line)
                    for a in args
                )
                copy = builder.store(builder.load(source, align=LINE), target, align=LINE)
                if bypass_cache:
                    copy.set_metadata("nontemporal", once)
            return context.get_dummy_value()

        return types.none(lanes, to), lower

    define.__name__ = name
    return intrinsic(define)


store = _copy_of_lanes("store", bypass_cache=False)
# Past the caches: it does not read the lines before it writes them. Others may read what was stored
# so after finish_streams.
stream = _copy_of_lanes("stream", bypass_cache=True)


@intrinsic
def finish_streams(typingctx):
    """A fence of all kinds: LLVM's weaker ones are no instruction on x86-64."""

    def lower(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), lower


@intrinsic
def prefetch_to_l2(typingctx, address):
    def lower(context, builder, signature, args):
        arguments = [_BYTES, _INT32, _INT32, _INT32]
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [_BYTES], ir.FunctionType(ir.VoidType(), arguments)
        )
        read, l2, data = _INT32(0), _INT32(2), _INT32(1)
        builder.call(function, [builder.inttoptr(args[0], _BYTES), read, l2, data])
        return context.get_dummy_value()

    return types.none(types.int64), lower


# Bits and polynomials


@intrinsic
def larger(typingctx, x, other):
    """The larger; `other` where `x` is NaN.

    Of a condition in Python LLVM would make a store by a mask, at a fifth of the speed.
    """

    def lower(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return x(x, x), lower


# The number of bits, and that of the mantissa.
_FORMATS = {types.float32: (32, 23), types.float64: (64, 52)}


def constants(bits):
    """The integer type of so many bits, and what makes a constant of it."""
    integer = ir.IntType(bits)
    return integer, lambda value: ir.Constant(integer, value)


@intrinsic
def power_of_two(typingctx, shifted):
    """2^n, where n + bias was rounded into the low mantissa bits of `shifted`."""
    bits, mantissa = _FORMATS[shifted]

    def lower(context, builder, signature, args):
        integer, constant = constants(bits)
        exponent = builder.shl(builder.bitcast(args[0], integer), constant(mantissa))
        return builder.bitcast(exponent, args[0].type)

    return shifted(shifted), lower


# sqrt(1/2), by which a number x is 2^n m with m from it to sqrt(2).
_SQRT_HALF = {types.float32: 0x3F3504F3, types.float64: 0x3FE6A09E667F3BCD}


def _parts_of(builder, x, value):
    """Bits of x, a normal number above 0, and its n shifted into the exponent's place."""
    bits, mantissa = _FORMATS[x]
    integer, constant = constants(bits)
    of_x = builder.bitcast(value, integer)
    n = builder.ashr(builder.sub(of_x, constant(_SQRT_HALF[x])), constant(mantissa))
    return of_x, n, constant(mantissa)


@intrinsic
def exponent_of(typingctx, x):
    """The n of x = 2^n m, as a number of x's type."""

    def lower(context, builder, signature, args):
        return builder.sitofp(_parts_of(builder, x, args[0])[1], args[0].type)

    return x(x), lower


@intrinsic
def mantissa_of(typingctx, x):
    """The m of x = 2^n m."""

    def lower(context, builder, signature, args):
        of_x, n, mantissa = _parts_of(builder, x, args[0])
        return builder.bitcast(builder.sub(of_x, builder.shl(n, mantissa)), args[0].type)

    return x(x), lower


def _horner(builder, coefficients, x):
    """Coefficients that are LLVM values, the constant first."""
    first, *rest = reversed(coefficients)
    value = first
    for coefficient in rest:
        value = builder.fadd(builder.fmul(value, x), coefficient)
    return value


def polynomial(name, coefficients):
    """An intrinsic of x that evaluates a polynomial; coefficients by type, the constant first."""

    def define(typingctx, x):
        def lower(context, builder, signature, args):
            values = [context.get_constant(x, c) for c in coefficients[x]]
            return _horner(builder, values, args[0])

        return x(x), lower

    define.__name__ = name
    return intrinsic(define)


def scaled_polynomial(name, coefficients):
    """The same of x and a scale, which multiplies the coefficients; they are those of a tag."""

    def define(typingctx, x, scale, tag):
        def lower(context, builder, signature, args):
            values = [
                args[1] if c == 1 else builder.fmul(args[1], context.get_constant(x, c))
                for c in coefficients[_element(tag)]
            ]
            return _horner(builder, values, args[0])

        return x(x, scale, tag), lower

    define.__name__ = name
    return intrinsic(define)
