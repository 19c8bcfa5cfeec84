// Lines of numbers, one number a row: what positions.hpp computes with.
//
// (a) log and expm1 are written here, as loops over lanes take them. From libm they took 20
//     nanoseconds a row, as long as the exps of 100 classes.
// (b) A line's alignment spares each loop the numbers before a vector's boundary. A compiler takes
//     these one at a time, which took half of the time of all.
#pragma once

#include <algorithm>
#include <utility>

#include "block.hpp"

namespace neglog {

template <class U, int lanes>
struct alignas(64) Line {
    U numbers[lanes];

    U& operator[](int i) { return numbers[i]; }
    const U& operator[](int i) const { return numbers[i]; }
};

// The numbers of a register, from the i-th on.
template <class T, int lanes>
inline Lanes<T> lanes_at(const Line<T, lanes>& line, int i) {
    return load(line.numbers + i);
}
template <class T, int lanes>
inline void set_lanes(Line<T, lanes>& line, int i, Lanes<T> x) {
    store<T>(x, line.numbers + i);
}

// The numbers of a register in double, which are two registers where they are floats.
struct InDouble {
    Lanes<double> first, second;

    explicit InDouble(Lanes<double> x) : first(x), second() {}
    explicit InDouble(Lanes<float> x) {  // the compiler's own conversion goes by quarters
#if NEGLOG_AVX512
        first = (Lanes<double>)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x));
        second = (Lanes<double>)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1));
#elif defined(__AVX2__)
        first = (Lanes<double>)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x));
        second = (Lanes<double>)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1));
#else
        constexpr int half = kWidth<double>;
        for (int i = 0; i < half; ++i) {
            first[i] = x[i];
            second[i] = x[half + i];
        }
#endif
    }
    void operator+=(InDouble other) {
        first += other.first;
        second += other.second;
    }
};

// log and expm1

// log x of x from 1, of 0 or NaN: of a sum of exps whose largest is 1. Error below 1 ulp.
inline double log_of_sum(double x) {
    // (2 atanh(s) / s - 2) / s^2 in s^2 on |s| <= 0.1716, relative error of the log 4.6e-18
    constexpr double poly[] = {0.666666666666667,   0.39999999999899444, 0.2857142862600327,
                               0.22222211130259878, 0.18182889455674947, 0.15331710618210773,
                               0.14616585424888623};
    constexpr double root_of_2 = 1.4142135623730951;
    constexpr double infinity = std::numeric_limits<double>::infinity();
    using R = Real<double>;
    // An integer k in the low bits of the mantissa of 2^52 makes the number 2^52 + k.
    constexpr uint64_t two_52 = uint64_t(1075) << 52, one = uint64_t(1023) << 52;
    const uint64_t bits = bit_cast<uint64_t>(x), mantissa_mask = (uint64_t(1) << 52) - 1;
    double exponent = bit_cast<double>((bits >> 52) | two_52) - bit_cast<double>(two_52) - 1023;
    double mantissa = bit_cast<double>((bits & mantissa_mask) | one);
    exponent = mantissa > root_of_2 ? exponent + 1 : exponent;
    mantissa = mantissa > root_of_2 ? mantissa * 0.5 : mantissa;
    const double f = mantissa - 1, s = f / (mantissa + 1), square = s * s;
    const double log_mantissa = f - s * (f - square * horner(poly, square));  // 2 s = f - s f
    const double log = exponent * R::ln2_hi + (log_mantissa + exponent * R::ln2_lo);
    return x > 0 ? log : x == 0 ? -infinity : x;
}

// e^x - 1 for x <= 0, within about 1 ulp.
inline double expm1_nonpositive(double x) {
    using R = Real<double>;
    x = x < R::exp_lowest ? R::exp_lowest : x;
    const double shifted = x * R::log2e + R::round_magic;
    const double n = shifted - R::round_magic;
    const double r = (x - n * R::ln2_hi) - n * R::ln2_lo;
    const double power = bit_cast<double>((bit_cast<uint64_t>(shifted) + R::bias)
                                          << R::mantissa_bits);
    return (r + r * r * horner(R::exp_poly, r)) * power + (power - 1);
}

// Transposition: to[c * to_stride + r] = from[r * from_stride + c]

// Numbers in order, half of one vector and half of the other: a[0] b[0] a[1] b[1] ...
template <int first, class V, int... i>
inline V interleave(V a, V b, std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(a, b, (first + i / 2 + i % 2 * int(sizeof...(i)))...);
}

// A square. Each round interleaves the first half of the rows with the last.
template <int size, class U>
inline void transpose_square(const U* from, ptrdiff_t from_stride, U* to, ptrdiff_t to_stride) {
    typedef U Row __attribute__((vector_size(size * sizeof(U))));
    constexpr int half = size / 2;
    const auto order = std::make_integer_sequence<int, size>();
    Row rows[size], mixed[size];
#pragma GCC unroll 16
    for (int r = 0; r < size; ++r) std::memcpy(&rows[r], from + r * from_stride, sizeof(Row));
#pragma GCC unroll 4
    for (int done = 1; done < size; done *= 2) {
#pragma GCC unroll 8
        for (int r = 0; r < half; ++r) {
            mixed[2 * r] = interleave<0>(rows[r], rows[r + half], order);
            mixed[2 * r + 1] = interleave<half>(rows[r], rows[r + half], order);
        }
#pragma GCC unroll 16
        for (int r = 0; r < size; ++r) rows[r] = mixed[r];
    }
#pragma GCC unroll 16
    for (int r = 0; r < size; ++r) std::memcpy(to + r * to_stride, &rows[r], sizeof(Row));
}

template <int size, class U>
inline void transpose_by_squares(const U* from, ptrdiff_t from_stride, ptrdiff_t rows,
                                 ptrdiff_t columns, U* to, ptrdiff_t to_stride) {
    for (ptrdiff_t r = 0; r < rows; r += size) {
        const ptrdiff_t row = std::min(r, rows - size);  // the last square overlaps that before
        for (ptrdiff_t c = 0; c < columns; c += size) {
            const ptrdiff_t column = std::min(c, columns - size);
            transpose_square<size>(from + row * from_stride + column, from_stride,
                                   to + column * to_stride + row, to_stride);
        }
    }
}

template <class U>
inline void transpose(const U* from, ptrdiff_t from_stride, ptrdiff_t rows, ptrdiff_t columns,
                      U* to, ptrdiff_t to_stride) {
    const ptrdiff_t least = std::min(rows, columns);
    constexpr int widest = kRegister / int(sizeof(U)) < 16 ? 8 : 16;
    if (least >= widest)
        transpose_by_squares<widest>(from, from_stride, rows, columns, to, to_stride);
    else if (least >= 8)
        transpose_by_squares<8>(from, from_stride, rows, columns, to, to_stride);
    else if (least >= 4)
        transpose_by_squares<4>(from, from_stride, rows, columns, to, to_stride);
    else
        for (ptrdiff_t r = 0; r < rows; ++r)
            for (ptrdiff_t c = 0; c < columns; ++c)
                to[c * to_stride + r] = from[r * from_stride + c];
}

}  // namespace neglog
