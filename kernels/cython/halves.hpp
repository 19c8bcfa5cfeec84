// bfloat16 and float16: conversion to float and back, one number or a block at a time.
//
// (a) bfloat16 is a type of its own, so that a loop is written once for float and for it: shifts
//     convert it, and the compiler vectorises them. float16 has no such type: only the F16C
//     instructions convert it fast, eight at a time, so it is converted a block at a time.
// (b) Rounding is to nearest, ties to even. NaN stays NaN, and what is too large becomes inf.
// (c) The scalar float16 functions serve builds without F16C (x86-64-v2, generic) and the last
//     seven numbers of a block. Both round alike; only the payload of a NaN may differ.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

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

struct bfloat16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

inline void narrow(float x, float& to) { to = x; }
inline void narrow(double x, double& to) { to = x; }
inline void narrow(float x, bfloat16& to) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
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

// A block at a time; `dtype` is kBFloat16 or kFloat16.

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
