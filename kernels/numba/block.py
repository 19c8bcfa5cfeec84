"""Arithmetic on one block of a row: the Numba version of block.hpp, with the same functions.

Read the two side by side. The notes of block.hpp hold here, those on Numba stand in intrinsics.py.

(a) A block is a pointer `z` and a length `n`. Where its numbers may be of any type in memory, they
    are widened and narrowed in the loop.
(b) The loops over what memory holds take LANES numbers at a time, in a loop of that constant
    length, of which LLVM makes straight vector code. Such a loop stands in the function that has
    its buffer: each function is optimised before it is inlined, and for two pointers that it is
    given LLVM adds a check whether they overlap, which stays.
"""

from __future__ import annotations

from math import exp, inf, log
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numba import njit, types
from numba.extending import overload

from neglog.kernels.numba.exp import (  # isort: skip
    exp_nonpositive, scaled_exp, tanh_any, tanh_slope,
)  # fmt: skip
from neglog.kernels.numba.halves import narrow, widen  # isort: skip
from neglog.kernels.numba.intrinsics import (  # isort: skip
    EXACT, FUSED, INLINE, LANES, LINE, SUM, Pointer, Real, address_of, advance, cast, copy_some,
    itemsize, lanes_buffer, larger, pointer, prefetch_to_l2, store, stream,
)  # fmt: skip

BFLOAT16 = 2
UINT8, INT16, UINT16 = np.uint8(0), np.int16(0), np.uint16(0)
FIND_PART = 256
# Below it e^x is 0 in double too. The log-probability of a score of -inf, cut off here, makes 0 of
# what would be 0 * inf.
LOG_OF_ZERO = -1000.0


@njit(**EXACT, **INLINE)
def prefetch_lanes(z: Pointer, address: int) -> None:
    """Fetch LANES numbers of the type of `z` into L2."""
    for byte in range(0, LANES * itemsize(z), LINE):
        prefetch_to_l2(address + byte)


# The online log-sum-exp: over the numbers seen so far, their maximum and sum of e^(z - maximum)

LseState: TypeAlias = tuple[Real, float]


class Lse(NamedTuple):
    """A log-sum-exp as the unevaluated sum of two numbers.

    One float32 near 1e4 would be off by 5e-4.
    """

    high: float
    low: float


@njit(**EXACT, **INLINE)
def block_fill(x: Pointer, n: int, value: Real) -> None:
    for j in range(n):
        x[j] = value


@njit(**EXACT, **INLINE)
def block_copy(x: Pointer, n: int, out: Pointer) -> None:
    for j in range(n):
        out[j] = x[j]


@njit(**SUM)
def block_sum(x: Pointer, n: int) -> float:
    total = 0.0
    for j in range(n):
        total += x[j]
    return total


@njit(**EXACT)
def largest_lane(x: Pointer) -> Real:
    quarter = LANES // 4
    for i in range(quarter):
        two = larger(x[i], x[i + quarter])
        x[i] = larger(two, larger(x[i + 2 * quarter], x[i + 3 * quarter]))
    best = x[0]
    for i in range(1, quarter):
        best = larger(x[i], best)
    return best


@njit(**EXACT)
def block_maximum(z: Pointer, n: int, least: Real) -> Real:
    """The maximum of the block and `least`, without NaN.

    By lanes: LLVM makes one maximum of a block a vector only if it may assume that there is no NaN.
    """
    best = lanes_buffer(least)
    block_fill(best, LANES, least)
    whole = n // LANES * LANES
    for j in range(0, whole, LANES):
        for i in range(LANES):
            best[i] = larger(widen(z[j + i]), best[i])
    for i in range(n - whole):
        best[i] = larger(widen(z[whole + i]), best[i])
    return largest_lane(best)


@njit(**FUSED)
def block_exp_sum(z: Pointer, n: int, shift: Real, ahead: int) -> float:
    """The sum of e^(z - shift), by 64 partial sums that are added in double: see block.hpp.

    What lies `ahead` bytes from z is brought into L2 meanwhile, unless that is 0.
    """
    sums, one = lanes_buffer(shift), cast(1, shift)
    block_fill(sums, LANES, cast(0, sums))
    whole = n // LANES * LANES
    for j in range(0, whole, LANES):
        if ahead != 0:
            prefetch_lanes(z, address_of(z) + j * itemsize(z) + ahead)
        for i in range(LANES):
            sums[i] += scaled_exp(widen(z[j + i]) - shift, one, z)
    for i in range(n - whole):
        sums[i] += scaled_exp(widen(z[whole + i]) - shift, one, z)
    return block_sum(sums, LANES)


@njit(**FUSED)
def update(state: LseState, z: Pointer, n: int, ahead: int) -> LseState:
    """The state with a block added; `ahead` as in block_exp_sum."""
    previous, total = state
    maximum = block_maximum(z, n, previous)
    # While every logit is -inf, z - maximum would be -inf - -inf = NaN and stay in the sum.
    shift = cast(0, maximum) if maximum == -inf else maximum
    kept = total * exp_nonpositive(previous - shift)
    return maximum, kept + block_exp_sum(z, n, shift, ahead)


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
    sums = lanes_buffer(z)
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
    sums = lanes_buffer(z)
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
    sums = lanes_buffer(z)
    block_fill(sums, LANES, cast(0, sums))
    whole = n // LANES * LANES
    for j in range(0, whole, LANES):
        for i in range(LANES):
            sums[i] += negative_entropy(log_probability(z[j + i], lse))
    for i in range(n - whole):
        sums[i] += negative_entropy(log_probability(z[whole + i], lse))
    return block_sum(sums, LANES)


@njit(**EXACT)
def block_find(z: Pointer, n: int, value: Real) -> int:
    """The first column with this number, or for NaN with a NaN; n for none. A part at a time, as
    no loop with a `break` is vectorised."""
    for start in range(0, n, FIND_PART):
        end, found = min(start + FIND_PART, n), 0
        for j in range(start, end):
            found += (z[j] == value) | ((z[j] != z[j]) & (value != value))
        if found > 0:
            for j in range(start, end):
                if z[j] == value or (z[j] != z[j] and value != value):
                    return j
    return n


# What is written to memory


class Destination(NamedTuple):
    """Where a gradient goes. Its stores may bypass the caches, and while a line of it is written,
    the same line from the address `next`, if that is not 0, is brought into L2: the logits that
    will be read next.
    """

    out: Pointer
    bypass_cache: bool
    next: int


@njit(**EXACT)
def destination_from(to: Destination, column: int) -> Destination:
    start = to.next + column * itemsize(to.out) if to.next != 0 else 0
    return Destination(advance(to.out, column), to.bypass_cache, start)


class Softmax(NamedTuple):
    """scale * e^(z - shift) - offset, for a scale up to a half of the largest number"""

    shift: Real
    scale: Real
    offset: Real


@njit(**EXACT)
def exp_of_low(lse: Lse) -> Real:
    """A factor of e^(z - high - low) = e^-low e^(z - high)."""
    return cast(exp(-lse.low), lse.low)


def gradient_of(z: Real, softmax: Any, memory: Pointer) -> Real:
    """Of a score z, rounded to the type in memory: its Softmax, or for None z itself."""
    raise NotImplementedError("only compiled functions may call this: they get the overload below")


@overload(gradient_of, jit_options={**FUSED, **INLINE})
def _gradient_of(z: Real, softmax: Any, memory: Pointer) -> Real:
    def form(z: Real, softmax: Any, memory: Pointer) -> Real:
        shift, scale, offset = softmax
        return narrow(scaled_exp(widen(z) - shift, scale, memory) - offset, memory)

    def keep(z: Real, softmax: Any, memory: Pointer) -> Real:
        return narrow(z, memory)

    return keep if softmax == types.none else form


@njit(**EXACT)
def numbers_before_line(out: Pointer) -> int:
    """How many lie before the first line of the cache that begins at or after `out`."""
    return (-address_of(out) & (LINE - 1)) // itemsize(out)


@njit(**EXACT)
def store_some(z: Pointer, n: int, softmax: Any, out: Pointer) -> None:
    """At most LANES numbers."""
    lanes = lanes_buffer(out)
    for i in range(n):
        lanes[i] = gradient_of(z[i], softmax, out)
    copy_some(lanes, n, out)


@njit(**EXACT)
def store_gradient(z: Pointer, n: int, softmax: Any, to: Destination) -> None:
    """Write gradient_of each number of a block, or of a whole row.

    `to.out` may be `z`, but not otherwise overlap it. The whole lines begin where a line begins.
    """
    lanes = lanes_buffer(to.out)
    start = min(n, numbers_before_line(to.out))
    if start > 0:
        store_some(z, start, softmax, to.out)
    end = start + (n - start) // LANES * LANES
    for j in range(start, end, LANES):
        for i in range(LANES):
            lanes[i] = gradient_of(z[j + i], softmax, to.out)
        if to.bypass_cache:
            stream(lanes, advance(to.out, j))
        else:
            store(lanes, advance(to.out, j))
        if to.next != 0:
            prefetch_lanes(to.out, to.next + j * itemsize(to.out))
    if end < n:
        store_some(advance(z, end), n - end, softmax, advance(to.out, end))


@njit(**EXACT)
def block_widen(z: Pointer, n: int, to: Pointer) -> None:
    for j in range(n):
        to[j] = widen(z[j])


@njit(**EXACT)
def block_narrow(x: Pointer, n: int, out: Pointer) -> None:
    for j in range(n):
        out[j] = narrow(x[j], out)


# The same by the dtype, of bfloat16 or float16 at an address


@njit(**EXACT)
def widen_block(source: int, dtype: int, n: int, to: Pointer) -> None:
    if dtype == BFLOAT16:
        block_widen(pointer(source, INT16), n, to)
    else:
        block_widen(pointer(source, UINT16), n, to)


@njit(**EXACT)
def narrow_block(x: Pointer, dtype: int, n: int, target: int) -> None:
    if dtype == BFLOAT16:
        block_narrow(x, n, pointer(target, INT16))
    else:
        block_narrow(x, n, pointer(target, UINT16))


# Elementwise maps of a block in L1


@njit(**FUSED)
def block_softmax(z: Pointer, n: int, lse: Lse, scale: Real, out: Pointer) -> None:
    """out = scale * softmax(z). `out` must not be `z`: LLVM vectorises what is apart."""
    scale *= exp_of_low(lse)
    for j in range(n):
        out[j] = scale * exp_nonpositive(z[j] - lse.high)


@njit(**FUSED)
def block_entropy_gradient(
    z: Pointer, n: int, lse: Lse, scale: Real, slope: Real, entropy: float, out: Pointer
) -> None:
    """out = (scale + slope * (log p + entropy)) * softmax(z). `out` must not be `z`."""
    of_low = exp_of_low(lse)
    scale, slope = scale * of_low, slope * of_low
    offset, log_of_zero = cast(entropy - lse.low, lse.low), cast(LOG_OF_ZERO, lse.low)
    for j in range(n):
        x = z[j] - lse.high
        log_p = (x if x > log_of_zero else log_of_zero) + offset
        out[j] = (scale + slope * log_p) * exp_nonpositive(x)


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
