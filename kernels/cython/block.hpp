// Arithmetic on one block of a row: exp, tanh, 16-bit floats, and the reductions over them.
//
// (a) Why C++ under the Cython: under IEEE rules GCC leaves `max` and float sums scalar, and Cython
//     cannot write the pragma that frees exactly those loops. -ffast-math over the file would
//     free them too, and break NaN and inf.
// (b) Every loop is a plain `for` that the compiler vectorises for the ISA level of the build; the
//     only intrinsics are for what no loop expresses, the conversion of halves.
// (c) NaN passes: clamps are `x < lo ? lo : x`, which is false for NaN. The maximum drops NaN, and
//     exp(NaN - max) brings it back in the sum.
// (d) Masked logits cost nothing: exp is exactly 0 below the clamp because the scale 2^n is formed
//     in the exponent bits, and n = -127 (float) leaves them all zero. No blend is needed.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace neglog {

enum DType { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

template <class To, class From>
inline To bit_cast(From value) {
    To result;
    static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
    std::memcpy(&result, &value, sizeof(To));
    return result;
}

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

// e^x for x <= 0, within about 1 ulp; x above 0 is right up to the overflow of 2^n.
template <class T>
inline T exp_nonpositive(T x) {
    using R = Real<T>;
    x = x < R::exp_lowest ? R::exp_lowest : x;
    const T shifted = x * R::log2e + R::round_magic;  // the low mantissa bits now hold round(x / ln 2)
    const T n = shifted - R::round_magic;
    const T r = (x - n * R::ln2_hi) - n * R::ln2_lo;
    const T fraction = (horner(R::exp_poly, r) * r + T(1)) * r + T(1);
    using Int = typename R::Int;
    using Bits = typename std::conditional<sizeof(T) == 4, uint32_t, uint64_t>::type;
    // Unsigned, because the sum runs past the sign bit on its way to the exponent.
    const Bits exponent = (bit_cast<Bits>(shifted) + Bits(Int(R::bias))) << R::mantissa_bits;
    return fraction * bit_cast<T>(exponent);
}

// The same to 3e-6, for results that 16 bits will hold: those round at 2e-3. Eight operations on the
// multiplier instead of eleven, which is what bounds a loop that reads half the bytes.
inline float exp_nonpositive_coarse(float x) {
    using R = Real<float>;
    // The constant is 1 and not the best fit's 0.9999993, or a sure target's loss would be below 0.
    constexpr float poly[] = {1.0f, 0.9999668f, 0.50003022f, 0.16787592f, 0.041513681f};
    x = x < R::exp_lowest ? R::exp_lowest : x;
    const float shifted = x * R::log2e + R::round_magic;
    const float r = x - (shifted - R::round_magic) * 0.69314718f;
    const uint32_t exponent = (bit_cast<uint32_t>(shifted) + R::bias) << R::mantissa_bits;
    return horner(poly, r) * bit_cast<float>(exponent);
}

template <class T>
inline T tanh_any(T y) {
    const T magnitude = std::fabs(y);
    const T square = y * y;
    const T decay = exp_nonpositive(T(-2) * magnitude);
    const T large = std::copysign((T(1) - decay) / (T(1) + decay), y);
    const T small = y + y * square * horner(Real<T>::tanh_poly, square);
    return magnitude < T(0.625) ? small : large;
}

// 16-bit floats

// A type of its own, so that a loop can be written once for float and for this. Halves have none:
// only intrinsics convert them fast, a block at a time.
struct bfloat16 {
    uint16_t bits;
};

// The exp that logits of a type deserve.
inline float exp_for(float, float x) { return exp_nonpositive(x); }
inline double exp_for(double, double x) { return exp_nonpositive(x); }
inline float exp_for(bfloat16, float x) { return exp_nonpositive_coarse(x); }

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

inline void narrow(float x, float& to) { to = x; }
inline void narrow(double x, double& to) { to = x; }
inline void narrow(float x, bfloat16& to) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    to.bits = uint16_t(x == x ? rounded : 0x7fc0u);  // the carry could turn a NaN into an inf
}

inline float widen_float16(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000u) << 16;
    const uint32_t magnitude = uint32_t(h & 0x7fffu) << 13;
    // Multiplying by 2^112 moves the bias from 15 to 127 and normalises subnormals on the way.
    const float value = bit_cast<float>(magnitude) * bit_cast<float>(uint32_t(239) << 23);
    const uint32_t special = magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0u;
    return bit_cast<float>(bit_cast<uint32_t>(value) | special | sign);
}

inline uint16_t narrow_float16(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Below 2^-14 the sum with 0.5 puts a subnormal's bits, rounded to even, in the low mantissa.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to inf
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    return uint16_t(half | sign);
}

// The online (maximum, sum) state of a log-sum-exp. Logits come as T or, unconverted, as bfloat16:
// through a buffer of floats the backward was a third slower.

template <class T>
struct LogSumExp {
    T maximum = -std::numeric_limits<T>::infinity();
    double sum = 0;

    // With every logit at -inf so far there is nothing to shift by: 0 keeps -inf - 0 = -inf, where
    // -inf - -inf would poison rows that have a finite logit further on.
    static T shift_for(T maximum) {
        return maximum == -std::numeric_limits<T>::infinity() ? T(0) : maximum;
    }
};

template <class T, class Logit>
inline T block_maximum(const Logit* z, ptrdiff_t n) {
    T maximum = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : maximum)
    for (ptrdiff_t j = 0; j < n; ++j) {
        // + 0 keeps the comparison in floats: of a bfloat16 GCC else selects the integer bits, through
        // a mask register, at a quarter of the speed. It costs nothing where z is T already.
        const T value = std::is_same<T, Logit>::value ? T(widen(z[j])) : widen(z[j]) + T(0);
        maximum = value > maximum ? value : maximum;
    }
    return maximum;
}

template <class T>
inline double block_sum(const T* x, ptrdiff_t n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (ptrdiff_t j = 0; j < n; ++j) sum += x[j];
    return sum;
}

// In 64 partial sums that meet in double. The maximum's own exp is 1, and next to it small terms lose
// their digits: of a sure target's 1 - p, 1e-6 where a float sum over the block was left. Here that
// befalls one partial sum of 64.
template <class T, class Logit>
inline double block_exp_sum(const Logit* z, ptrdiff_t n, T shift) {
    constexpr int lanes = 64;
    T sums[lanes] = {};
    ptrdiff_t j = 0;
    for (; j + lanes <= n; j += lanes) {
#pragma omp simd
        for (int i = 0; i < lanes; ++i) sums[i] += exp_for(Logit(), widen(z[j + i]) - shift);
    }
    const int rest = int(n - j);
#pragma omp simd
    for (int i = 0; i < rest; ++i) sums[i] += exp_for(Logit(), widen(z[j + i]) - shift);
    return block_sum(sums, lanes);
}

template <class T, class Logit>
inline void absorb(LogSumExp<T>& state, const Logit* z, ptrdiff_t n) {
    const T block = block_maximum<T>(z, n);
    const T maximum = block > state.maximum ? block : state.maximum;
    const T shift = LogSumExp<T>::shift_for(maximum);
    const double kept = state.sum * exp_nonpositive(state.maximum - shift);
    state.sum = kept + block_exp_sum(z, n, shift);
    state.maximum = maximum;
}

// lse as the unevaluated sum of two numbers. Rounded to one float at logits of 1e4 it would be off
// by 5e-4, and every probability with it; torch's x - max - log(sum) is not.
template <class T>
struct Lse {
    T high, low;
};

template <class T>
inline Lse<T> finish(const LogSumExp<T>& state) {
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

// Second-pass sums over a row that is still in cache, given its finished lse

template <class T>
inline T block_log_probability_sum(const T* z, ptrdiff_t n, Lse<T> lse) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (ptrdiff_t j = 0; j < n; ++j) sum += log_probability(z[j], lse);
    return sum;
}

template <class T>
inline T block_log_probability_dot(const T* z, const T* coefficient, ptrdiff_t n, Lse<T> lse) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (ptrdiff_t j = 0; j < n; ++j) sum += coefficient[j] * log_probability(z[j], lse);
    return sum;
}

// sum of p log p; a term whose p is 0 counts 0, not 0 * -inf.
template <class T>
inline T block_negative_entropy(const T* z, ptrdiff_t n, Lse<T> lse) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (ptrdiff_t j = 0; j < n; ++j) {
        T log_p = log_probability(z[j], lse);
        log_p = log_p < Real<T>::exp_lowest ? Real<T>::exp_lowest : log_p;
        sum += exp_nonpositive(log_p) * log_p;
    }
    return sum;
}

template <class T>
inline bool block_contains(const T* z, ptrdiff_t n, T value) {
    int found = 0;
#pragma omp simd reduction(| : found)
    for (ptrdiff_t j = 0; j < n; ++j) found |= z[j] == value;
    return found;
}

// Elementwise maps of a block

template <class T, class Logit>
inline void block_softmax(const Logit* z, ptrdiff_t n, Lse<T> lse, T scale, Logit* out) {
    scale *= std::exp(-lse.low);  // e^(z - high - low), with low taken out of the loop
#pragma omp simd
    for (ptrdiff_t j = 0; j < n; ++j) narrow(scale * exp_for(Logit(), widen(z[j]) - lse.high), out[j]);
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

// The derivative of the cap is 1 - tanh^2, and tanh is z / softcap.
template <class T>
inline void block_softcap_backward(T* grad, const T* z, ptrdiff_t n, T softcap) {
#pragma omp simd
    for (ptrdiff_t j = 0; j < n; ++j) {
        const T ratio = z[j] / softcap;
        grad[j] *= (T(1) - ratio) * (T(1) + ratio);
    }
}

// Scores of pairs: a block of one row against adjacent columns, each of which has a state of its own

// `bias` may be null.
template <class T>
inline void block_pair_scores(const T* similarity, ptrdiff_t n, T scale, const T* bias, T* z) {
    if (bias) {
#pragma omp simd
        for (ptrdiff_t j = 0; j < n; ++j) z[j] = similarity[j] * scale + bias[j];
    } else {
#pragma omp simd
        for (ptrdiff_t j = 0; j < n; ++j) z[j] = similarity[j] * scale;
    }
}

template <class T>
inline void block_exclude(T* z, ptrdiff_t n, int64_t group, const int64_t* groups) {
#pragma omp simd
    for (ptrdiff_t j = 0; j < n; ++j)
        z[j] = groups[j] == group ? -std::numeric_limits<T>::infinity() : z[j];
}

// NaN is dropped here and comes back in the sum, as in block_maximum.
template <class T>
inline void block_maximum_of_columns(const T* z, ptrdiff_t n, T* maximum) {
#pragma omp simd
    for (ptrdiff_t j = 0; j < n; ++j) maximum[j] = z[j] > maximum[j] ? z[j] : maximum[j];
}

// One exp for both sums: right where no score is so far from 0 that e^z leaves the range of T. The
// row's in 64 partial sums for the sake of its 1 - p, as in block_exp_sum.
template <class T>
inline double block_exp_sum_both(const T* z, ptrdiff_t n, T* column_sum) {
    constexpr int lanes = 64;
    T sums[lanes] = {};
    ptrdiff_t j = 0;
    for (; j + lanes <= n; j += lanes) {
#pragma omp simd
        for (int i = 0; i < lanes; ++i) {
            const T e = exp_nonpositive(z[j + i]);
            sums[i] += e;
            column_sum[j + i] += e;
        }
    }
    const int rest = int(n - j);
#pragma omp simd
    for (int i = 0; i < rest; ++i) {
        const T e = exp_nonpositive(z[j + i]);
        sums[i] += e;
        column_sum[j + i] += e;
    }
    return block_sum(sums, lanes);
}

template <class T>
inline void block_exp_sum_of_columns(const T* z, ptrdiff_t n, const T* shift, T* column_sum) {
#pragma omp simd
    for (ptrdiff_t j = 0; j < n; ++j) column_sum[j] += exp_nonpositive(z[j] - shift[j]);
}

// Into sums in double, those of a few rows.
template <class T>
inline void block_pour(T* from, ptrdiff_t n, double* to) {
#pragma omp simd
    for (ptrdiff_t j = 0; j < n; ++j) {
        to[j] += from[j];
        from[j] = 0;
    }
}

// row e^(z - row_lse) + column e^(z - column_lse), where the factors hold e^-lse already.
template <class T>
inline void block_pair_gradient_bounded(const T* z, ptrdiff_t n, T row, const T* column, T* out) {
#pragma omp simd
    for (ptrdiff_t j = 0; j < n; ++j) out[j] = exp_nonpositive(z[j]) * (row + column[j]);
}

template <class T>
inline void block_pair_gradient(const T* z, ptrdiff_t n, T row, T row_lse, const T* column,
                                const T* column_lse, T* out) {
#pragma omp simd
    for (ptrdiff_t j = 0; j < n; ++j)
        out[j] = row * exp_nonpositive(z[j] - row_lse) +
                 column[j] * exp_nonpositive(z[j] - column_lse[j]);
}

// log(1 + e) for 0 <= e <= 1, as 2 atanh(e / (2 + e)); the series is cut at 2e-9 and 2e-18.
template <class T>
inline T log1p_exp(T e) {
    constexpr int terms = sizeof(T) == 4 ? 9 : 18;
    const T t = e / (T(2) + e), square = t * t;
    T series = T(1) / T(2 * terms - 1);
    for (int k = terms - 2; k >= 0; --k) series = series * square + T(1) / T(2 * k + 1);
    return T(2) * t * series;
}

// softplus(z), and its derivative.
template <class T>
inline T softplus(T z, T& sigmoid) {
    const T e = exp_nonpositive(-std::fabs(z));
    sigmoid = (z < 0 ? e : T(1)) / (T(1) + e);
    return (z < 0 ? T(0) : z) + log1p_exp(e);
}

// The sum of softplus(z), in partial sums as block_exp_sum; out = scale sigmoid(z).
template <class T>
inline double block_softplus(const T* z, ptrdiff_t n, T scale, T* out) {
    constexpr int lanes = 64;
    T sums[lanes] = {};
    for (ptrdiff_t j = 0; j < n; j += lanes) {
        const int width = n - j < lanes ? int(n - j) : lanes;
#pragma omp simd
        for (int i = 0; i < width; ++i) {
            T sigmoid;
            sums[i] += softplus(z[j + i], sigmoid);
            out[j + i] = scale * sigmoid;
        }
    }
    return block_sum(sums, lanes);
}

// Zeros. Past the caches, where the whole gradient does not fit in them: an ordinary store reads each
// line before it writes it, and 500 MB of ignored rows took 24 ms for 8 (memset itself does this, but
// only from some megabytes in one call).
inline void zero_bytes(char* to, ptrdiff_t n, bool past_caches) {
#if defined(__SSE2__)
    if (past_caches) {
        constexpr ptrdiff_t line = 64;
        const ptrdiff_t head = ptrdiff_t(-reinterpret_cast<uintptr_t>(to) % line);
        if (head < n) {
            std::memset(to, 0, head);
            to += head;
            n -= head;
            for (; n >= line; n -= line, to += line)
                for (int part = 0; part < 4; ++part)
                    _mm_stream_si128(reinterpret_cast<__m128i*>(to) + part, _mm_setzero_si128());
            _mm_sfence();  // before another thread may be told that the row is done
        }
    }
#endif
    std::memset(to, 0, n);
}

// 16-bit floats, a block at a time

inline void widen_block(const void* source, int dtype, ptrdiff_t n, float* to) {
    if (dtype == kBFloat16) {
        auto from = static_cast<const bfloat16*>(source);
#pragma omp simd
        for (ptrdiff_t j = 0; j < n; ++j) to[j] = widen(from[j]);
        return;
    }
    auto from = static_cast<const uint16_t*>(source);
    ptrdiff_t j = 0;
#if defined(__F16C__)
    for (; j + 8 <= n; j += 8) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j));
        _mm256_storeu_ps(to + j, _mm256_cvtph_ps(half));
    }
#endif
    for (; j < n; ++j) to[j] = widen_float16(from[j]);
}

inline void narrow_block(const float* from, int dtype, ptrdiff_t n, void* target) {
    if (dtype == kBFloat16) {
        auto to = static_cast<bfloat16*>(target);
#pragma omp simd
        for (ptrdiff_t j = 0; j < n; ++j) narrow(from[j], to[j]);
        return;
    }
    auto to = static_cast<uint16_t*>(target);
    ptrdiff_t j = 0;
#if defined(__F16C__)
    for (; j + 8 <= n; j += 8) {
        const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + j), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j), half);
    }
#endif
    for (; j < n; ++j) to[j] = narrow_float16(from[j]);
}

}  // namespace neglog
