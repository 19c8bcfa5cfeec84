// Arithmetic on one block of a row: exp, tanh, the online log-sum-exp, sums and elementwise maps.
//
// (a) Why C++ under the Cython: under IEEE rules GCC leaves `max` and float sums scalar, and Cython
//     cannot write the pragma that frees exactly those loops. -ffast-math over the file would
//     free them too, and break NaN and inf.
// (b) Every loop is a plain `for` that the compiler vectorises for the ISA level of the build. The
//     only intrinsics are for what no loop expresses: stores that bypass the caches, here, and the
//     conversion of float16, in halves.hpp.
// (c) NaN passes through: a clamp is `x < lo ? lo : x`, which is false for NaN. The maximum drops
//     NaN, and exp(NaN - max) brings it back in the sum.
// (d) A masked logit needs no branch: exp is exactly 0 below the clamp, because 2^n is formed in
//     the exponent bits, and n = -127 (float) leaves them all zero.
// (e) T is the type computed with, float or double. Logit is the type in memory: T or bfloat16.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "halves.hpp"

namespace neglog {

// exp and tanh

template <class T>
struct Real;

template <>
struct Real<float> {
    using Int = int32_t;
    static constexpr int mantissa_bits = 23, bias = 127;
    static constexpr float log2e = 1.44269504088896341f;
    static constexpr float ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
    static constexpr float round_magic = 12582912.0f;     // 1.5 * 2^23
    static constexpr float exp_lowest = -88.02969f;       // -127 ln 2: the result is exactly 0
    // (e^r - 1 - r) / r^2 on |r| <= ln2 / 2, relative error of e^r 1.0e-8
    static constexpr int exp_terms = 5;
    static constexpr float exp_poly[] = {0.5f, 0.1666657699f, 0.04166655462f, 0.008363179053f,
                                         0.001392618358f};
    // (tanh(y) / y - 1) / y^2 in y^2 on |y| <= 0.625, relative error 6.1e-10
    static constexpr int tanh_terms = 6;
    static constexpr float tanh_poly[] = {-0.3333333317f, 0.1333330356f,  -0.05395925958f,
                                          0.02176891865f, -0.008343945516f, 0.002292744816f};
};

template <>
struct Real<double> {
    using Int = int64_t;
    static constexpr int mantissa_bits = 52, bias = 1023;
    static constexpr double log2e = 1.44269504088896340736;
    static constexpr double ln2_hi = 6.93145751953125e-1, ln2_lo = 1.42860682030941723212e-6;
    static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double exp_lowest = -709.0895657128241;   // -1023 ln 2
    static constexpr int exp_terms = 10;                       // relative error 1.7e-17
    static constexpr double exp_poly[] = {
        0.5000000000000001022,    0.1666666666666666745,    0.04166666666662412787,
        0.008333333333330061833,  0.00138888889172137169,   0.0001984126986305361688,
        2.480152129595437513e-5,  2.755726845999706477e-6,  2.762008844540974816e-7,
        2.510038549551031908e-8};
    static constexpr int tanh_terms = 13;  // relative error 5.5e-20
    static constexpr double tanh_poly[] = {
        -0.3333333333333333332,   0.1333333333333332076,    -0.05396825396823590134,
        0.02186948853513322201,   -0.008863235499801992569, 0.003592127507599252229,
        -0.001455828399830324586, 0.0005899818158388232071, -0.000238889446367511739,
        9.604109157026265988e-5,  -3.708106921544233385e-5, 1.220992179016278166e-5,
        -2.438831631472087804e-6};
};

template <class T, int terms>
inline T horner(const T (&coefficients)[terms], T x) {
    T value = coefficients[terms - 1];
    for (int k = terms - 2; k >= 0; --k) value = value * x + coefficients[k];
    return value;
}

// e^x for x <= 0, within about 1 ulp. It holds for x > 0 too, until 2^n overflows.
template <class T>
inline T exp_nonpositive(T x) {
    using R = Real<T>;
    x = x < R::exp_lowest ? R::exp_lowest : x;
    // The low mantissa bits of `shifted` hold n = round(x / ln 2).
    const T shifted = x * R::log2e + R::round_magic;
    const T n = shifted - R::round_magic;
    const T r = (x - n * R::ln2_hi) - n * R::ln2_lo;
    const T fraction = (horner(R::exp_poly, r) * r + T(1)) * r + T(1);
    using Int = typename R::Int;
    using Bits = typename std::conditional<sizeof(T) == 4, uint32_t, uint64_t>::type;
    // Unsigned, because the sum runs past the sign bit on its way to the exponent.
    const Bits exponent = (bit_cast<Bits>(shifted) + Bits(Int(R::bias))) << R::mantissa_bits;
    return fraction * bit_cast<T>(exponent);
}

// e^x with a relative error of 3e-6, for bfloat16 logits: their gradient is rounded at 2e-3 anyway.
// It takes eight operations of the multiplier instead of eleven, and the multiplier bounds a loop
// that reads half the bytes.
inline float exp_nonpositive_coarse(float x) {
    using R = Real<float>;
    // The best fit's constant is 0.9999993. With it the loss of a target whose p is 1 would be
    // negative, so it is 1 here.
    constexpr float poly[] = {1.0f, 0.9999668f, 0.50003022f, 0.16787592f, 0.041513681f};
    x = x < R::exp_lowest ? R::exp_lowest : x;
    const float shifted = x * R::log2e + R::round_magic;
    const float r = x - (shifted - R::round_magic) * 0.69314718f;
    const uint32_t exponent = (bit_cast<uint32_t>(shifted) + R::bias) << R::mantissa_bits;
    return horner(poly, r) * bit_cast<float>(exponent);
}

// tanh of any number: by e^(-2 |y|), or by a polynomial near 0, where 1 - e^(-2 |y|) cancels.
template <class T>
inline T tanh_any(T y) {
    const T magnitude = std::fabs(y);
    const T square = y * y;
    const T decay = exp_nonpositive(T(-2) * magnitude);
    const T large = std::copysign((T(1) - decay) / (T(1) + decay), y);
    const T small = y + y * square * horner(Real<T>::tanh_poly, square);
    return magnitude < T(0.625) ? small : large;
}

// The derivative of tanh, 1 - tanh^2, which written so would have no digit where tanh is near 1.
template <class T>
inline T tanh_slope(T y) {
    const T decay = exp_nonpositive(T(-2) * std::fabs(y));
    return T(4) * decay / ((T(1) + decay) * (T(1) + decay));
}

// The exp for logits of a type: its error is hidden by their rounding.
inline float exp_for(float, float x) { return exp_nonpositive(x); }
inline double exp_for(double, double x) { return exp_nonpositive(x); }
inline float exp_for(bfloat16, float x) { return exp_nonpositive_coarse(x); }

// The online log-sum-exp: over the numbers seen so far, their maximum and sum of e^(z - maximum).
// bfloat16 is read as it is: through a buffer of floats the backward was a third slower.

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

template <class T, class Logit>
inline T block_maximum(const Logit* z, ptrdiff_t n) {
    T maximum = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : maximum)
    for (ptrdiff_t j = 0; j < n; ++j) {
        // + 0 makes GCC compare floats. For bfloat16 it would otherwise select the integer bits
        // through a mask register, at a quarter of the speed.
        const T value = std::is_same<T, Logit>::value ? T(widen(z[j])) : widen(z[j]) + T(0);
        maximum = value > maximum ? value : maximum;
    }
    return maximum;
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

template <class T, class Logit>
inline double block_exp_sum(const Logit* z, ptrdiff_t n, T shift) {
    return block_sum_of<T>(
        n, [=](ptrdiff_t j) { return exp_for(Logit(), widen(z[j]) - shift); });
}

// Adds a block to the state.
template <class T, class Logit>
inline void update(LseState<T>& state, const Logit* z, ptrdiff_t n) {
    const T block = block_maximum<T>(z, n);
    const T maximum = block > state.maximum ? block : state.maximum;
    const T shift = LseState<T>::shift_for(maximum);
    const double kept = state.sum * exp_nonpositive(state.maximum - shift);
    state.sum = kept + block_exp_sum(z, n, shift);
    state.maximum = maximum;
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

template <class T>
inline bool block_contains(const T* z, ptrdiff_t n, T value) {
    int found = 0;
#pragma omp simd reduction(| : found)
    for (ptrdiff_t j = 0; j < n; ++j) found |= z[j] == value;
    return found;
}

// Elementwise maps of a block

// out = scale * softmax(z). `out` may be `z`.
template <class T, class Logit>
inline void block_softmax(const Logit* z, ptrdiff_t n, Lse<T> lse, T scale, Logit* out) {
    scale *= std::exp(-lse.low);  // e^(z - high - low) = e^-low e^(z - high)
#pragma omp simd
    for (ptrdiff_t j = 0; j < n; ++j)
        narrow(scale * exp_for(Logit(), widen(z[j]) - lse.high), out[j]);
}

template <class T>
inline void block_scale(T* x, ptrdiff_t n, T scale) {
#pragma omp simd
    for (ptrdiff_t j = 0; j < n; ++j) x[j] *= scale;
}

template <class T>
inline void block_affine(T* x, ptrdiff_t n, T scale, T offset) {
#pragma omp simd
    for (ptrdiff_t j = 0; j < n; ++j) x[j] = x[j] * scale + offset;
}

template <class T>
inline void block_multiply(T* x, const T* y, ptrdiff_t n) {
#pragma omp simd
    for (ptrdiff_t j = 0; j < n; ++j) x[j] *= y[j];
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

// Writes zeros, past the caches if the whole gradient does not fit in them: an ordinary store reads
// each cache line before it writes it, and 500 MB of ignored rows took 24 ms instead of 8. (memset
// does so by itself only for some megabytes in one call.)
inline void zero_bytes(char* to, ptrdiff_t n, bool bypass_cache) {
#if defined(__SSE2__)
    if (bypass_cache) {
        constexpr ptrdiff_t line = 64;
        const ptrdiff_t head = ptrdiff_t(-reinterpret_cast<uintptr_t>(to) % line);
        if (head < n) {
            std::memset(to, 0, head);
            to += head;
            n -= head;
            for (; n >= line; n -= line, to += line)
                for (int part = 0; part < 4; ++part)
                    _mm_stream_si128(reinterpret_cast<__m128i*>(to) + part, _mm_setzero_si128());
            _mm_sfence();  // before another thread can learn that the row is done
        }
    }
#endif
    if (n > 0) std::memset(to, 0, n);  // with no classes `to` may be null
}

}  // namespace neglog
