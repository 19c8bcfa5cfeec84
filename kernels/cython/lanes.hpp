// Lanes: the numbers of a register, computed with at once, and how they come from and go to memory.
//
// (a) A register is a vector of the compiler's, so arithmetic on it is written as on one number,
//     once for all ISA levels. Intrinsics stand for what that cannot express: the maximum in one
//     instruction, 2^n by scalef, float16, loads by a mask, and stores that bypass the caches.
// (b) T is the type computed with, float or double. M is the type in memory: T, bfloat16 or
//     float16. Memory<M> holds and converts as many numbers of M as there are lanes.
#pragma once

#include <type_traits>

#include "halves.hpp"

namespace neglog {

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#define NEGLOG_AVX512 1
constexpr int kRegister = 64;  // bytes
#elif defined(__AVX2__)
#define NEGLOG_AVX512 0
constexpr int kRegister = 32;
#else
#define NEGLOG_AVX512 0
constexpr int kRegister = 16;
#endif
constexpr int kCacheLine = 64;

template <class T>
constexpr int kWidth = kRegister / int(sizeof(T));

template <class T>
struct LanesOf;
template <>
struct LanesOf<float> {
    typedef float Type __attribute__((vector_size(kRegister)));
    typedef uint32_t Bits __attribute__((vector_size(kRegister)));
    typedef uint16_t Halves __attribute__((vector_size(kRegister / 2)));
};
template <>
struct LanesOf<double> {
    typedef double Type __attribute__((vector_size(kRegister)));
    typedef uint64_t Bits __attribute__((vector_size(kRegister)));
};
template <class T>
using Lanes = typename LanesOf<T>::Type;

// The type of one number, and of the bits, of V: float, double or lanes of them.
template <class V>
struct Parts {
    using Number = V;
    using Bits = typename std::conditional<sizeof(V) == 4, uint32_t, uint64_t>::type;
    static constexpr bool lanes = false;
};
template <class T>
struct PartsOfLanes {
    using Number = T;
    using Bits = typename LanesOf<T>::Bits;
    static constexpr bool lanes = true;
};
template <>
struct Parts<Lanes<float>> : PartsOfLanes<float> {};
template <>
struct Parts<Lanes<double>> : PartsOfLanes<double> {};
template <class V>
using NumberOf = typename Parts<V>::Number;
template <class V>
using BitsOf = typename Parts<V>::Bits;
template <class V>
constexpr bool is_lanes = Parts<V>::lanes;

// The larger; `other` where `x` is NaN. NaN in `other` stays.
template <class V>
inline V larger(V x, V other) {
#if NEGLOG_AVX512
    if constexpr (std::is_same<V, Lanes<float>>::value)
        return (V)_mm512_max_ps((__m512)x, (__m512)other);
    if constexpr (std::is_same<V, Lanes<double>>::value)
        return (V)_mm512_max_pd((__m512d)x, (__m512d)other);
#elif defined(__AVX2__)
    if constexpr (std::is_same<V, Lanes<float>>::value)
        return (V)_mm256_max_ps((__m256)x, (__m256)other);
    if constexpr (std::is_same<V, Lanes<double>>::value)
        return (V)_mm256_max_pd((__m256d)x, (__m256d)other);
#elif defined(__SSE2__)
    if constexpr (std::is_same<V, Lanes<float>>::value)
        return (V)_mm_max_ps((__m128)x, (__m128)other);
    if constexpr (std::is_same<V, Lanes<double>>::value)
        return (V)_mm_max_pd((__m128d)x, (__m128d)other);
#endif
    return x > other ? x : other;
}

#if NEGLOG_AVX512
// x * 2^n, rounded once.
inline Lanes<float> scale_by_power_of_two(Lanes<float> x, Lanes<float> n) {
    return (Lanes<float>)_mm512_scalef_ps((__m512)x, (__m512)n);
}
inline Lanes<double> scale_by_power_of_two(Lanes<double> x, Lanes<double> n) {
    return (Lanes<double>)_mm512_scalef_pd((__m512d)x, (__m512d)n);
}
#endif

// Types in memory

template <class T>
struct MemoryOfReals {
    using Real = T;
    using Packed = Lanes<T>;
    static Lanes<T> widen(Packed x) { return x; }
    static Packed narrow(Lanes<T> x) { return x; }
};

template <class M>
struct Memory;
template <>
struct Memory<float> : MemoryOfReals<float> {};
template <>
struct Memory<double> : MemoryOfReals<double> {};

// 16 bits to 32 and back. The compiler's own conversion goes by halves of a register.
struct MemoryOfHalves {
    using Real = float;
    using Packed = LanesOf<float>::Halves;
    using Bits = LanesOf<float>::Bits;

    static Bits widen_bits(Packed x) {
#if NEGLOG_AVX512
        return (Bits)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
        return (Bits)_mm256_cvtepu16_epi32((__m128i)x);
#else
        return __builtin_convertvector(x, Bits);
#endif
    }

    // Of numbers below 2^16.
    static Packed narrow_bits(Bits x) {
#if NEGLOG_AVX512
        return (Packed)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__)
        const __m256i y = (__m256i)x;
        return (Packed)_mm_packus_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
#else
        return __builtin_convertvector(x, Packed);
#endif
    }
};

template <>
struct Memory<bfloat16> : MemoryOfHalves {
    static Lanes<float> widen(Packed x) { return (Lanes<float>)(widen_bits(x) << 16); }

    static Packed narrow(Lanes<float> x) {
        const Bits bits = (Bits)x;
        const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        const Bits nan = Bits{} + 0x7fc0u;  // the carry could turn a NaN into an inf
        return narrow_bits(x == x ? rounded : nan);
    }
};

template <>
struct Memory<float16> : MemoryOfHalves {
    static Lanes<float> widen(Packed x) {
#if NEGLOG_AVX512
        return (Lanes<float>)_mm512_cvtph_ps((__m256i)x);
#elif defined(__F16C__) && defined(__AVX2__)
        return (Lanes<float>)_mm256_cvtph_ps((__m128i)x);
#else
        Lanes<float> wide;
        for (int i = 0; i < kWidth<float>; ++i) wide[i] = neglog::widen(float16{x[i]});
        return wide;
#endif
    }

    static Packed narrow(Lanes<float> x) {
#if NEGLOG_AVX512
        return (Packed)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__) && defined(__AVX2__)
        return (Packed)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
        Packed half;
        for (int i = 0; i < kWidth<float>; ++i) {
            float16 to;
            neglog::narrow(x[i], to);
            half[i] = to.bits;
        }
        return half;
#endif
    }
};

template <class M>
using RealOf = typename Memory<M>::Real;
template <class M>
using Packed = typename Memory<M>::Packed;
template <class M>
constexpr int kLanesOf = kWidth<RealOf<M>>;

// Loads and stores, at any address; of the first n numbers if there are fewer than lanes.

template <class M>
inline Packed<M> load(const M* from) {
    Packed<M> packed;
    std::memcpy(&packed, from, sizeof packed);
    return packed;
}

template <class M>
inline void store(Packed<M> packed, M* to) {
    std::memcpy(to, &packed, sizeof packed);
}

// The lanes from n on are 0.
template <class M>
inline Packed<M> load_some(const M* from, int n) {
#if NEGLOG_AVX512
    const uint32_t mask = (1u << n) - 1;
    if constexpr (sizeof(M) == 2) return (Packed<M>)_mm256_maskz_loadu_epi16(mask, from);
    if constexpr (sizeof(M) == 4) return (Packed<M>)_mm512_maskz_loadu_epi32(mask, from);
    if constexpr (sizeof(M) == 8) return (Packed<M>)_mm512_maskz_loadu_epi64(mask, from);
#else
    M some[kLanesOf<M>] = {};
    for (int i = 0; i < n; ++i) some[i] = from[i];
    return load(some);
#endif
}

template <class M>
inline void store_some(Packed<M> packed, int n, M* to) {
#if NEGLOG_AVX512
    const uint32_t mask = (1u << n) - 1;
    if constexpr (sizeof(M) == 2) _mm256_mask_storeu_epi16(to, mask, (__m256i)packed);
    if constexpr (sizeof(M) == 4) _mm512_mask_storeu_epi32(to, mask, (__m512i)packed);
    if constexpr (sizeof(M) == 8) _mm512_mask_storeu_epi64(to, mask, (__m512i)packed);
#else
    M some[kLanesOf<M>];
    store(packed, some);
    for (int i = 0; i < n; ++i) to[i] = some[i];
#endif
}

template <class M>
inline Lanes<RealOf<M>> load_lanes(const M* from) {
    return Memory<M>::widen(load(from));
}

// The lanes from n on are `rest`.
template <class M>
inline Lanes<RealOf<M>> load_some_lanes(const M* from, int n, RealOf<M> rest) {
    using T = RealOf<M>;
    typename LanesOf<T>::Bits lane;
    for (int i = 0; i < kWidth<T>; ++i) lane[i] = i;
    return lane < typename LanesOf<T>::Bits{} + n ? Memory<M>::widen(load_some(from, n))
                                                  : Lanes<T>{} + rest;
}

// A store past the caches: it does not read the line before it writes it. `to` is aligned to the
// packed numbers. Others may read what was stored so after finish_streams.
template <class M>
inline void stream(Packed<M> packed, M* to) {
    constexpr int size = sizeof packed;
#if NEGLOG_AVX512
    if constexpr (size == 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)packed);
#endif
#if defined(__AVX2__)
    if constexpr (size == 32) _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)packed);
#endif
#if defined(__x86_64__)
    if constexpr (size == 16) _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)packed);
    if constexpr (size == 8) _mm_stream_si64(reinterpret_cast<long long*>(to), (long long)packed);
#else
    store(packed, to);
#endif
}

inline void finish_streams() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

inline void prefetch_to_l2(const void* address) { __builtin_prefetch(address, 0, 2); }

// How many lanes the next n numbers of a loop take.
template <class T>
inline int lanes_left(ptrdiff_t n) {
    return n < kWidth<T> ? int(n) : kWidth<T>;
}

// How many numbers lie before the first line of the cache that begins at or after `at`.
template <class M>
inline ptrdiff_t numbers_before_line(const M* at) {
    return ptrdiff_t(-reinterpret_cast<uintptr_t>(at) % kCacheLine / sizeof(M));
}

}  // namespace neglog
