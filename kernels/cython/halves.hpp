// bfloat16 and float16: conversion of one number to float and back. lanes.hpp converts many.
//
// Rounding is to nearest, ties to even. NaN stays NaN, and what is too large becomes inf.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
// GCC 12 warns of the operands that its own intrinsics leave undefined.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
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

struct float16 {
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

inline float widen(float16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
    const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
    // Multiplying by 2^112 moves the bias from 15 to 127 and normalises subnormals on the way.
    const float value = bit_cast<float>(magnitude) * bit_cast<float>(uint32_t(239) << 23);
    const uint32_t special = magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0u;
    return bit_cast<float>(bit_cast<uint32_t>(value) | special | sign);
}

inline void narrow(float x, float16& to) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Below 2^-14 the sum with 0.5 puts a subnormal's bits, rounded to even, in the low mantissa.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to inf
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    to.bits = uint16_t(half | sign);
}

}  // namespace neglog
