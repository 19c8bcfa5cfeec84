// Arithmetic on one block of a row: the online log-sum-exp, sums and elementwise maps.
//
// (a) Why C++ under the Cython: under IEEE rules GCC leaves `max` and float sums scalar, and Cython
//     cannot write the pragma that frees exactly those loops. -ffast-math over the file would
//     free them too, and break NaN and inf.
// (b) The loops over what memory holds, logits and their gradient, are written in the lanes of
//     lanes.hpp. The others, over numbers in L1, are plain `for`s that the compiler vectorises.
// (c) NaN passes through. The maximum drops it, and exp(NaN - max) brings it back in the sum.
// (d) T is the type computed with, float or double. M is the type in memory: T, bfloat16, float16.
// (e) The order of a sum goes by columns. Stores follow the lines of the cache, so they begin at
//     another column where a row begins at another address, but each number's bits are the same.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "exp.hpp"

namespace neglog {

// The online log-sum-exp: over the numbers seen so far, their maximum and sum of e^(z - maximum)

template <class T>
struct LseState {
    T maximum = -std::numeric_limits<T>::infinity();
    double sum = 0;

    // While every logit is -inf, z - maximum would be -inf - -inf = NaN and stay in the sum. With a
    // shift of 0 it is -inf, whose exp is 0.
    static T shift_for(T maximum) {
        return maximum == -std::numeric_limits<T>::infinity() ? T(0) : maximum;
    }
};

// The largest of `count` numbers, a power of two.
template <int count, class T>
inline T largest(const T* x) {
    T upper[count / 2];
    for (int i = 0; i < count / 2; ++i) upper[i] = larger(x[i], x[i + count / 2]);
    if constexpr (count == 2)
        return upper[0];
    else
        return largest<count / 2>(upper);
}

// -inf as M, for what no column fills.
template <class M>
inline M lowest_of() {
    M lowest;
    narrow(-std::numeric_limits<RealOf<M>>::infinity(), lowest);
    return lowest;
}

// A block of which each register's numbers are at an address of their own.
template <class M>
struct Scattered {
    const M* const* registers;
};

// Where the numbers of a register begin, from column j on, of adjacent ones and of scattered ones.
template <class M>
inline const M* address_in(const M* z, ptrdiff_t j) {
    return z + j;
}
template <class M>
inline const M* address_in(Scattered<M> z, ptrdiff_t j) {
    return z.registers[j / kPacked<M>];
}
template <class Block>
using MemoryOf =
    typename std::remove_const<typename std::remove_pointer<decltype(address_in(
        std::declval<Block>(), ptrdiff_t()))>::type>::type;

template <class Block>
inline auto block_maximum(Block z, ptrdiff_t n) -> RealOf<MemoryOf<Block>> {
    using M = MemoryOf<Block>;
    using T = RealOf<M>;
    constexpr int step = 4 / kRegistersOf<M> * kPacked<M>;
    const M lowest = lowest_of<M>();
    Lanes<T> best[4];
    for (auto& lanes : best) lanes = Lanes<T>{} - std::numeric_limits<T>::infinity();
    ptrdiff_t j = 0;
    for (; j + step <= n; j += step)
        for (int r = 0; r < 4; r += kRegistersOf<M>) {
            const Wide<M> wide = Memory<M>::widen(load(address_in(z, j + r * kWidth<T>)));
            for (int k = 0; k < kRegistersOf<M>; ++k) best[r + k] = larger(wide.x[k], best[r + k]);
        }
    for (; j < n; j += kPacked<M>) {
        const Wide<M> wide = Memory<M>::widen(load_some(address_in(z, j), n - j, lowest));
        for (int k = 0; k < kRegistersOf<M>; ++k) best[k] = larger(wide.x[k], best[k]);
    }
    best[0] = larger(larger(best[0], best[1]), larger(best[2], best[3]));
    return largest<kWidth<T>>(reinterpret_cast<const T*>(best));
}

// The number of partial sums of a block. It is written here: what a compiler makes of one sum
// depends on its flags, and one float for a whole block was off by 1.6e-6 where it was not
// vectorised. The maximum's own exp is 1, and small terms added to it lose their digits: with one
// float sum a block, 1 - p of a confident target was off by 1e-6. With 64, added in double at the
// end, only one of them holds that 1.
constexpr int kLanes = 64;

// The sum of term(j) for j < n, whose partial sums are of type T.
template <class T, class Term>
inline double block_sum_of(ptrdiff_t n, Term term) {
    T sums[kLanes] = {};
    ptrdiff_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
#pragma omp simd
        for (int i = 0; i < kLanes; ++i) sums[i] += term(j + i);
    }
    const int rest = int(n - j);
#pragma omp simd
    for (int i = 0; i < rest; ++i) sums[i] += term(j + i);
    double total = 0;
#pragma omp simd reduction(+ : total)
    for (int i = 0; i < kLanes; ++i) total += sums[i];
    return total;
}

template <class T>
inline double block_sum(const T* x, ptrdiff_t n) {
    return block_sum_of<double>(n, [=](ptrdiff_t j) { return x[j]; });
}

// How far ahead of a loop over memory its numbers are brought into L2.
constexpr ptrdiff_t kAheadBytes = 16 << 10;

template <class M>
inline const M* ahead_of(const M* z) {
    return z + kAheadBytes / ptrdiff_t(sizeof(M));
}

// The sum of e^(z - shift). Meanwhile the blocks after the next are brought into L2: a maximum
// reads its block faster than memory gives it. A forward took 0.68 copies without, 0.51 with.
// Not inlined, because beside another loop GCC for x86-64-v3 kept the sums in memory: 35% slower.
template <class Block, class M = MemoryOf<Block>>
__attribute__((noinline)) double block_exp_sum(Block z, ptrdiff_t n, RealOf<M> shift,
                                               const M* ahead) {
    using T = RealOf<M>;
    constexpr int registers = kLanes / kWidth<T>, line = kCacheLine / int(sizeof(M));
    const M lowest = lowest_of<M>();
    const Lanes<T> one = Lanes<T>{} + T(1);
    Lanes<T> sums[registers] = {};
    const auto add = [&](Packed<M> packed, int r) {
        const Wide<M> wide = Memory<M>::widen(packed);
        for (int k = 0; k < kRegistersOf<M>; ++k)
            sums[r + k] += scaled_exp<ExpOfSum<M>>(wide.x[k] - shift, one);
    };
    ptrdiff_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
        for (int k = 0; k < kLanes; k += line)
            prefetch_to_l2(ahead + j + k);
#pragma GCC unroll 16
        for (int r = 0; r < registers; r += kRegistersOf<M>)
            add(load(address_in(z, j + r * kWidth<T>)), r);
    }
#pragma GCC unroll 16
    for (int r = 0; r < registers; r += kRegistersOf<M>, j += kPacked<M>)
        if (j < n) add(load_some(address_in(z, j), n - j, lowest), r);
    return block_sum(reinterpret_cast<const T*>(sums), kLanes);
}

// Adds a block to the state. Meanwhile the numbers from `ahead` on are brought into L2.
template <class T, class Block>
inline void update(LseState<T>& state, Block z, ptrdiff_t n, const MemoryOf<Block>* ahead) {
    const T block = block_maximum(z, n);
    const T maximum = block > state.maximum ? block : state.maximum;
    const T shift = LseState<T>::shift_for(maximum);
    const double kept = state.sum * exp_nonpositive(state.maximum - shift);
    state.sum = kept + block_exp_sum(z, n, shift, ahead);
    state.maximum = maximum;
}

template <class T, class M>
inline void update(LseState<T>& state, const M* z, ptrdiff_t n) {
    update(state, z, n, ahead_of(z));
}

// A log-sum-exp as the unevaluated sum of two numbers. One float near 1e4 would be off by 5e-4, and
// every probability with it; torch's x - max - log(sum) is not.
template <class T>
struct Lse {
    T high, low;
};

template <class T>
inline Lse<T> finish(const LseState<T>& state) {
    const double maximum = state.maximum, log_sum = std::log(state.sum);
    const double sum = maximum + log_sum, back = sum - maximum;
    const double lost = (maximum - (sum - back)) + (log_sum - back);  // Knuth's two-sum
    const T high = T(sum);
    return {high, T((sum - high) + lost)};
}

template <class T>
inline T log_probability(T z, Lse<T> lse) {
    return (z - lse.high) - lse.low;
}

// Sums over a row in a second pass, while it is in cache, given its lse

template <class T>
inline double block_log_probability_sum(const T* z, ptrdiff_t n, Lse<T> lse) {
    return block_sum_of<T>(n, [=](ptrdiff_t j) { return log_probability(z[j], lse); });
}

template <class T>
inline double block_log_probability_dot(const T* z, const T* coefficient, ptrdiff_t n,
                                        Lse<T> lse) {
    return block_sum_of<T>(
        n, [=](ptrdiff_t j) { return coefficient[j] * log_probability(z[j], lse); });
}

// The sum of p log p. A term whose p is 0 adds 0, not 0 * -inf.
template <class T>
inline double block_negative_entropy(const T* z, ptrdiff_t n, Lse<T> lse) {
    return block_sum_of<T>(n, [=](ptrdiff_t j) {
        const T log_p = log_probability(z[j], lse), p = exp_nonpositive(log_p);
        return p == 0 ? T(0) : p * log_p;
    });
}

// The first j with is(z[j]), n if there is none; a part at a time, as no `for` with a break is
// vectorised.
template <class T, class Is>
inline ptrdiff_t block_find(const T* z, ptrdiff_t n, Is is) {
    constexpr ptrdiff_t part = 256;
    for (ptrdiff_t start = 0; start < n; start += part) {
        const ptrdiff_t end = std::min(start + part, n);
        int found = 0;
#pragma omp simd reduction(| : found)
        for (ptrdiff_t j = start; j < end; ++j) found |= is(z[j]);
        if (!found) continue;
        for (ptrdiff_t j = start; j < end; ++j)
            if (is(z[j])) return j;
    }
    return n;
}

// Elementwise maps of a block

// Where a gradient goes. Its stores may bypass the caches, and while a line of it is written, the
// same line of `ahead` is brought into L2: the logits that will be read next.
template <class M>
struct Destination {
    M* out;
    bool bypass_cache;
    const M* ahead;

    static Destination in_cache(M* out) { return {out, false, out}; }
    Destination from(ptrdiff_t column) const {
        return {out + column, bypass_cache, ahead + column};
    }
};

// out[j] = gradient(j, n): the packed numbers of the columns from j on, of which n are left. Whole
// lines of the cache are written at once, so the first may begin at a later column.
template <bool bypass_cache, class M, class Gradient>
inline void store_lines(Destination<M> to, ptrdiff_t n, Gradient gradient) {
    constexpr int line = kCacheLine / int(sizeof(M));
    const auto store_rest = [&](ptrdiff_t from, ptrdiff_t end) {
        for (ptrdiff_t j = from; j < end; j += kPacked<M>)
            store_some(gradient(j, end - j), end - j, to.out + j);
    };
    ptrdiff_t j = std::min(n, numbers_before_line(to.out));
    store_rest(0, j);
    for (; j + line <= n; j += line) {
#pragma GCC unroll 4
        for (int part = 0; part < line; part += kPacked<M>) {
            const Packed<M> packed = gradient(j + part, line);
            if (bypass_cache)
                stream(packed, to.out + j + part);
            else
                store(packed, to.out + j + part);
        }
        prefetch_to_l2(to.ahead + j);
    }
    store_rest(j, n);
}

template <class M, class Gradient>
inline void store_gradient(Destination<M> to, ptrdiff_t n, Gradient gradient) {
    if (to.bypass_cache)
        store_lines<true>(to, n, gradient);
    else
        store_lines<false>(to, n, gradient);
}

// out = scale * softmax(z) - offset. `out` may be `z`.
template <class M>
inline void block_softmax(const M* z, ptrdiff_t n, Lse<RealOf<M>> lse, RealOf<M> scale,
                          RealOf<M> offset, Destination<M> to) {
    using T = RealOf<M>;
    scale *= std::exp(-lse.low);  // e^(z - high - low) = e^-low e^(z - high)
    // In scaled_exp an infinite scale would be NaN. A NaN may have any bits, see Memory<bfloat16>.
    if (!(std::fabs(scale) < std::numeric_limits<T>::max() / 2)) {
        for (ptrdiff_t j = 0; j < n; ++j)
            narrow(scale * exp_nonpositive(widen(z[j]) - lse.high) - offset, to.out[j]);
        return;
    }
    const Lanes<T> scales = Lanes<T>{} + scale;
    store_gradient(to, n, [=](ptrdiff_t j, ptrdiff_t left) {
        return Memory<M>::narrow(
            of_each(Memory<M>::widen(load_some(z + j, left, M())), [=](Lanes<T> x) {
                return scaled_exp<ExpOfGradient<M>>(x - lse.high, scales) - offset;
            }));
    });
}

// out = patch(j, end, scale * softmax(z)) of each register, which is of the columns from j to before
// `end`, in their order.
// `out` may be `z`. For a scale up to half of the largest number.
template <class M, class Patch>
inline void block_softmax(const M* z, ptrdiff_t n, Lse<RealOf<M>> lse, RealOf<M> scale,
                          Destination<M> to, Patch patch) {
    using T = RealOf<M>;
    const Lanes<T> scales = Lanes<T>{} + scale * std::exp(-lse.low);
    store_gradient(to, n, [=](ptrdiff_t j, ptrdiff_t left) {
        const Wide<M> wide = Memory<M>::widen(load_some(z + j, left, M()));
        const Wide<M> softmax = of_each(wide, [=](Lanes<T> x) {
            return scaled_exp<ExpOfGradient<M>>(x - lse.high, scales);
        });
        return patch(j, j + std::min<ptrdiff_t>(left, kPacked<M>), Memory<M>::narrow(softmax));
    });
}

template <class T>
inline void block_softmax(const T* z, ptrdiff_t n, Lse<T> lse, T scale, T* out) {
    block_softmax(z, n, lse, scale, T(0), Destination<T>::in_cache(out));
}

// Below it e^x is 0 in double too. The log-probability of a score of -inf, cut off here, makes 0 of
// what would be 0 * inf.
constexpr double kLogOfZero = -1000;

// scale + slope * (log p + entropy), which multiplies p in the gradient of a row's entropy, by the
// distance x = z - lse.high of a score.
template <class T>
struct EntropyScale {
    T scale, slope, offset;

    template <class X>
    X operator()(X x) const {
        return scale + slope * (larger(x, X{} + T(kLogOfZero)) + offset);
    }
};

// out = (scale + slope * (log p + entropy)) * softmax(z) - offset. `out` may be `z`.
template <class M>
inline void block_entropy_gradient(const M* z, ptrdiff_t n, Lse<RealOf<M>> lse, RealOf<M> scale,
                                   RealOf<M> slope, double entropy, RealOf<M> offset,
                                   Destination<M> to) {
    using T = RealOf<M>;
    const T of_low = std::exp(-lse.low);
    const EntropyScale<T> scales = {scale * of_low, slope * of_low, T(entropy - lse.low)};
    constexpr T largest = std::numeric_limits<T>::max() / T(1 << 20);
    if (!(std::fabs(scales.scale) < largest && std::fabs(scales.slope) < largest)) {
        for (ptrdiff_t j = 0; j < n; ++j) {
            const T x = widen(z[j]) - lse.high;
            narrow(scales(x) * exp_nonpositive(x) - offset, to.out[j]);
        }
        return;
    }
    store_gradient(to, n, [=](ptrdiff_t j, ptrdiff_t left) {
        return Memory<M>::narrow(
            of_each(Memory<M>::widen(load_some(z + j, left, M())), [=](Lanes<T> z) {
                const Lanes<T> x = z - lse.high;
                return scaled_exp<ExpOfGradient<M>>(x, scales(x)) - offset;
            }));
    });
}

// out = x, rounded to the type in memory. No plain loop converts float16 by its instructions.
template <class M>
inline void block_store(const RealOf<M>* x, ptrdiff_t n, Destination<M> to) {
    if constexpr (std::is_same<M, bfloat16>::value) {
#pragma omp simd
        for (ptrdiff_t j = 0; j < n; ++j) narrow(x[j], to.out[j]);
    } else {
        constexpr int width = kWidth<RealOf<M>>;
        store_gradient(to, n, [=](ptrdiff_t j, ptrdiff_t left) {
            Wide<M> wide;
            for (int k = 0; k < kRegistersOf<M>; ++k)
                wide.x[k] = load_some(x + j + k * width, left - k * width, RealOf<M>(0));
            return Memory<M>::narrow(wide);
        });
    }
}

template <class M>
inline void block_widen(const M* from, ptrdiff_t n, RealOf<M>* to) {
    ptrdiff_t j = 0;
    if constexpr (std::is_same<M, float16>::value)
        for (; j + kPacked<M> <= n; j += kPacked<M>) {
            const Wide<M> wide = Memory<M>::widen(load(from + j));
            for (int k = 0; k < kRegistersOf<M>; ++k)
                store(wide.x[k], to + j + k * kWidth<RealOf<M>>);
        }
#pragma omp simd
    for (ptrdiff_t i = j; i < n; ++i) to[i] = widen(from[i]);
}

template <class T>
inline void block_scale(T* x, ptrdiff_t n, T scale) {
#pragma omp simd
    for (ptrdiff_t j = 0; j < n; ++j) x[j] *= scale;
}

template <class T>
inline void block_multiply(T* x, const T* y, ptrdiff_t n) {
#pragma omp simd
    for (ptrdiff_t j = 0; j < n; ++j) x[j] *= y[j];
}

// x -= constant
template <class T>
inline void block_subtract(T* x, ptrdiff_t n, T constant) {
#pragma omp simd
    for (ptrdiff_t j = 0; j < n; ++j) x[j] -= constant;
}

// out -= scale * x
template <class T>
inline void block_subtract(T* out, const T* x, ptrdiff_t n, T scale) {
#pragma omp simd
    for (ptrdiff_t j = 0; j < n; ++j) out[j] -= scale * x[j];
}

template <class T>
inline void block_softcap(T* z, ptrdiff_t n, T softcap) {
#pragma omp simd
    for (ptrdiff_t j = 0; j < n; ++j) z[j] = softcap * tanh_any(z[j] / softcap);
}

// The same, and the derivative of the cap.
template <class T>
inline void block_softcap_and_slope(T* z, ptrdiff_t n, T softcap, T* slope) {
#pragma omp simd
    for (ptrdiff_t j = 0; j < n; ++j) {
        const T y = z[j] / softcap;
        z[j] = softcap * tanh_any(y);
        slope[j] = tanh_slope(y);
    }
}

// The same by the dtype, kBFloat16 or kFloat16.
inline void widen_block(const void* from, int dtype, ptrdiff_t n, float* to) {
    if (dtype == kBFloat16)
        block_widen(static_cast<const bfloat16*>(from), n, to);
    else
        block_widen(static_cast<const float16*>(from), n, to);
}

inline void narrow_block(const float* from, int dtype, ptrdiff_t n, void* to) {
    if (dtype == kBFloat16)
        block_store(from, n, Destination<bfloat16>::in_cache(static_cast<bfloat16*>(to)));
    else
        block_store(from, n, Destination<float16>::in_cache(static_cast<float16*>(to)));
}

// Writes zeros, past the caches if the whole gradient does not fit in them: an ordinary store reads
// each cache line before it writes it, and 500 MB of ignored rows took 24 ms instead of 8. (memset
// does so by itself only for some megabytes in one call.)
template <class M>
inline void block_zero(ptrdiff_t n, Destination<M> to) {
    if (to.bypass_cache)
        store_lines<true>(to, n, [](ptrdiff_t, ptrdiff_t) { return Packed<M>{}; });
    else if (n > 0)
        std::memset(to.out, 0, n * sizeof(M));
}

}  // namespace neglog
