// exp and tanh, of one number or of lanes, and log of one number.
//
// (a) One number is for loops that the compiler vectorises, under `#pragma omp simd`. Lanes are
//     those of lanes.hpp; with AVX-512 they have 2^n by one instruction.
// (b) NaN passes through. exp is exactly 0 at and below its clamp, so also at -inf.
#pragma once

#include <cmath>
#include <limits>

#include "lanes.hpp"

namespace neglog {

template <class T>
struct Real;

template <>
struct Real<float> {
    static constexpr int mantissa_bits = 23;
    static constexpr uint32_t bias = 127;
    static constexpr float log2e = 1.44269504088896341f;
    static constexpr float ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
    static constexpr float round_magic = 12582912.0f;   // 1.5 * 2^23
    static constexpr float exp_lowest = -88.02969f;     // -127 ln 2: the exponent's bits are 0
    static constexpr float scalef_lowest = -104.0f;     // half of the smallest number: 0
    // (e^r - 1 - r) / r^2 on |r| <= ln2 / 2, relative error of e^r 1.0e-8
    static constexpr float exp_linear = 1.0f;
    static constexpr float exp_poly[] = {0.5f, 0.1666657699f, 0.04166655462f, 0.008363179053f,
                                         0.001392618358f};
    // (tanh(y) / y - 1) / y^2 in y^2 on |y| <= 0.625, relative error 6.1e-10
    static constexpr float tanh_poly[] = {-0.3333333317f, 0.1333330356f,  -0.05395925958f,
                                          0.02176891865f, -0.008343945516f, 0.002292744816f};
};

template <>
struct Real<double> {
    static constexpr int mantissa_bits = 52;
    static constexpr uint64_t bias = 1023;
    static constexpr double log2e = 1.44269504088896340736;
    static constexpr double ln2_hi = 6.93145751953125e-1, ln2_lo = 1.42860682030941723212e-6;
    static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double exp_lowest = -709.0895657128241;   // -1023 ln 2
    static constexpr double scalef_lowest = -746.0;
    static constexpr double exp_linear = 1.0;
    static constexpr double exp_poly[] = {  // relative error 1.7e-17
        0.5000000000000001022,    0.1666666666666666745,    0.04166666666662412787,
        0.008333333333330061833,  0.00138888889172137169,   0.0001984126986305361688,
        2.480152129595437513e-5,  2.755726845999706477e-6,  2.762008844540974816e-7,
        2.510038549551031908e-8};
    static constexpr double tanh_poly[] = {  // relative error 5.5e-20
        -0.3333333333333333332,   0.1333333333333332076,    -0.05396825396823590134,
        0.02186948853513322201,   -0.008863235499801992569, 0.003592127507599252229,
        -0.001455828399830324586, 0.0005899818158388232071, -0.000238889446367511739,
        9.604109157026265988e-5,  -3.708106921544233385e-5, 1.220992179016278166e-5,
        -2.438831631472087804e-6};
};

// The polynomial of an e^x with a relative error of 3e-6, for what is rounded to 16 bits at 2e-3 or
// 5e-4. It takes two operations of the multiplier less, and the multiplier bounds a loop that reads
// half the bytes. The best fit's constant is 0.9999993. With it the loss of a target whose p is 1
// would be negative, so it is 1 here.
struct CoarseExp {
    static constexpr float exp_linear = 0.9999668f;
    static constexpr float exp_poly[] = {0.50003022f, 0.16787592f, 0.041513681f};
};

template <class T, int terms, class V>
inline V horner(const T (&coefficients)[terms], V x) {
    V value = V{} + coefficients[terms - 1];
    for (int k = terms - 2; k >= 0; --k) value = value * x + coefficients[k];
    return value;
}

// The same times a scale. Where a loop does not change the scale, its products with the
// coefficients are formed before the loop.
template <class T, int terms, class V>
inline V scaled_horner(const T (&coefficients)[terms], V x, V scale) {
    V value = scale * coefficients[terms - 1];
    for (int k = terms - 2; k >= 0; --k) value = value * x + scale * coefficients[k];
    return value;
}

// x - n ln 2. In lanes of floats ln 2 is one float, off by 1.9e-9, and n of it by 2.7e-9 x: a tenth
// of what the rounding of x, a logit less a log-sum-exp, has lost. Two floats took 12% longer.
template <class V>
inline V remainder_of_ln2(V x, V n) {
    using R = Real<NumberOf<V>>;
    if constexpr (std::is_same<V, Lanes<float>>::value) return x - n * 0.69314718f;
    return (x - n * R::ln2_hi) - n * R::ln2_lo;
}

// fraction * 2^n. The low bits of the mantissa of `shifted` hold n.
template <class V>
inline V times_power_of_two(V fraction, [[maybe_unused]] V n, V shifted) {
    using R = Real<NumberOf<V>>;
#if NEGLOG_AVX512
    if constexpr (is_lanes<V>) return scale_by_power_of_two(fraction, n);
#endif
    // Unsigned, because the sum runs past the sign bit on its way to the exponent.
    const BitsOf<V> bias = BitsOf<V>{} + R::bias;
    return fraction * bit_cast<V>((bit_cast<BitsOf<V>>(shifted) + bias) << R::mantissa_bits);
}

// scale * e^x for x <= 0 and |scale| up to a half of the largest number, within about 1 ulp. It
// holds for x > 0 too, until 2^n overflows. P has the polynomial.
template <class P, class V>
__attribute__((always_inline)) inline V scaled_exp(V x, V scale) {
    using R = Real<NumberOf<V>>;
    constexpr bool by_scalef = NEGLOG_AVX512 && is_lanes<V>;
    x = larger(V{} + (by_scalef ? R::scalef_lowest : R::exp_lowest), x);
    const V shifted = x * R::log2e + R::round_magic;
    const V n = shifted - R::round_magic;  // round(x / ln 2)
    const V r = remainder_of_ln2(x, n);
    const V slope = scaled_horner(P::exp_poly, r, scale) * r + scale * P::exp_linear;
    return times_power_of_two(slope * r + scale, n, shifted);
}

template <class V>
__attribute__((always_inline)) inline V exp_nonpositive(V x) {
    return scaled_exp<Real<NumberOf<V>>>(x, V{} + NumberOf<V>(1));
}

// For logits of type M in memory. A loss is float32 for float16 logits too, so its exps are exact.
template <class M>
using ExpOfSum = typename std::conditional<std::is_same<M, bfloat16>::value, CoarseExp,
                                           Real<RealOf<M>>>::type;
template <class M>
using ExpOfGradient = typename std::conditional<sizeof(M) == 2, CoarseExp, Real<RealOf<M>>>::type;

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

// log of a number from 0, -inf of 0, within 2 ulp: by x = 2^n m, m around 1, and atanh's series
// log m = 2 (s + s^3 / 3 + s^5 / 5 + ...) of s = (m - 1) / (m + 1), which is at most 0.172.
template <class T>
__attribute__((always_inline)) inline T log_nonnegative(T x) {
    using R = Real<T>;
    using Bits = BitsOf<T>;
    using Signed = typename std::make_signed<Bits>::type;
    constexpr T infinity = std::numeric_limits<T>::infinity();
    constexpr int terms = sizeof(T) == 4 ? 5 : 11;
    // A number below the smallest normal one has no exponent of its own.
    const bool tiny = x < std::numeric_limits<T>::min();
    const T up = T(Bits(1) << (R::mantissa_bits + 1));
    const Bits bits = bit_cast<Bits>(tiny ? x * up : x);
    const Bits half = bit_cast<Bits>(T(0.70710678118654752440));
    const Signed n = Signed(bits - half) >> R::mantissa_bits;
    const T m = bit_cast<T>(bits - (Bits(n) << R::mantissa_bits));
    const T s = (m - T(1)) / (m + T(1)), square = s * s;
    T series = T(1) / T(2 * terms - 1);
#pragma GCC unroll 16
    for (int k = terms - 2; k >= 0; --k) series = series * square + T(1) / T(2 * k + 1);
    const T exponent = T(n) - (tiny ? T(R::mantissa_bits + 1) : T(0));
    const T value = exponent * R::ln2_hi + (exponent * R::ln2_lo + T(2) * s * series);
    const T of_others = x == T(0) ? -infinity : std::numeric_limits<T>::quiet_NaN();
    return x > T(0) ? (x < infinity ? value : x) : of_others;
}

// The derivative of tanh, 1 - tanh^2, which written so would have no digit where tanh is near 1.
template <class T>
inline T tanh_slope(T y) {
    const T decay = exp_nonpositive(T(-2) * std::fabs(y));
    return T(4) * decay / ((T(1) + decay) * (T(1) + decay));
}

}  // namespace neglog
