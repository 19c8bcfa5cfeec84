// Lanes: the numbers of a register, computed with at once, and how they come from and go to memory.
//
// (a) A register is a vector of the compiler's, so arithmetic on it is written as on one number,
//     once for all ISA levels. Intrinsics stand for what that cannot express: the maximum in one
//     instruction, 2^n by scalef, float16, loads by a mask, and stores that bypass the caches.
// (b) T is the type computed with, float or double. M is the type in memory: T, bfloat16 or
//     float16. Packed<M> is a register as it is in memory. Wide<M> is its numbers to compute with:
//     one register of T, or two of float.
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
    typedef uint16_t Halves __attribute__((vector_size(kRegister)));
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

template <class T, int count>
struct Registers {
    Lanes<T> x[count];
};

template <class T>
struct MemoryOfReals {
    using Real = T;
    using Packed = Lanes<T>;
    using Wide = Registers<T, 1>;
    static Wide widen(Packed x) { return {{x}}; }
    static Packed narrow(Wide wide) { return wide.x[0]; }
};

template <class M>
struct Memory;
template <>
struct Memory<float> : MemoryOfReals<float> {};
template <>
struct Memory<double> : MemoryOfReals<double> {};

// The numbers of even columns are in one register, those of odd columns in the other, so no shuffle
// moves them. Rounding is without a branch for NaN, which took 12% of a gradient's time: no carry
// reaches the sign of a NaN whose low 16 bits are 0, as they are where a bfloat16 or an operation
// makes it. One that a user gives as an upstream does not come here, see block_softmax.
template <>
struct Memory<bfloat16> {
    using Real = float;
    using Packed = LanesOf<float>::Halves;
    using Wide = Registers<float, 2>;
    using Bits = LanesOf<float>::Bits;

    static Wide widen(Packed x) {
        const Bits pairs = (Bits)x;
        return {{(Lanes<float>)(pairs << 16), (Lanes<float>)(pairs & 0xffff0000u)}};
    }

    static Packed narrow(Wide wide) {
        return (Packed)((rounded(wide.x[0]) >> 16) | (rounded(wide.x[1]) & 0xffff0000u));
    }

    // Rounded in the high 16 bits.
    static Bits rounded(Lanes<float> x) {
        const Bits bits = (Bits)x;
        return bits + 0x7fffu + ((bits >> 16) & 1u);
    }
};

template <>
struct Memory<float16> {
    using Real = float;
    using Packed = LanesOf<float>::Halves;
    using Wide = Registers<float, 2>;

    static Wide widen(Packed x) {
#if NEGLOG_AVX512
        const __m512i y = (__m512i)x;
        return {{(Lanes<float>)_mm512_cvtph_ps(_mm512_castsi512_si256(y)),
                 (Lanes<float>)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(y, 1))}};
#elif defined(__F16C__) && defined(__AVX2__)
        const __m256i y = (__m256i)x;
        return {{(Lanes<float>)_mm256_cvtph_ps(_mm256_castsi256_si128(y)),
                 (Lanes<float>)_mm256_cvtph_ps(_mm256_extracti128_si256(y, 1))}};
#else
        constexpr int width = kWidth<float>;
        Wide wide;
        for (int i = 0; i < 2 * width; ++i)
            wide.x[i / width][i % width] = neglog::widen(float16{x[i]});
        return wide;
#endif
    }

    static Packed narrow(Wide wide) {
#if NEGLOG_AVX512
        constexpr int nearest = _MM_FROUND_TO_NEAREST_INT;
        const __m256i low = _mm512_cvtps_ph((__m512)wide.x[0], nearest);
        const __m256i high = _mm512_cvtps_ph((__m512)wide.x[1], nearest);
        return (Packed)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#elif defined(__F16C__) && defined(__AVX2__)
        constexpr int nearest = _MM_FROUND_TO_NEAREST_INT;
        const __m128i low = _mm256_cvtps_ph((__m256)wide.x[0], nearest);
        const __m128i high = _mm256_cvtps_ph((__m256)wide.x[1], nearest);
        return (Packed)_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
#else
        constexpr int width = kWidth<float>;
        Packed packed;
        for (int i = 0; i < 2 * width; ++i) {
            float16 to;
            neglog::narrow(wide.x[i / width][i % width], to);
            packed[i] = to.bits;
        }
        return packed;
#endif
    }
};

template <class M>
using RealOf = typename Memory<M>::Real;
template <class M>
using Packed = typename Memory<M>::Packed;
template <class M>
using Wide = typename Memory<M>::Wide;

template <class M>
constexpr int kPacked = kRegister / int(sizeof(M));  // the numbers of a register in memory
template <class M>
constexpr int kRegistersOf = kPacked<M> / kWidth<RealOf<M>>;  // that these fill, widened

// function(x) of each register.
template <class W, class Function>
inline W of_each(W wide, Function function) {
    for (auto& x : wide.x) x = function(x);
    return wide;
}

// Loads and stores, at any address

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

// The first n numbers; then `rest`.
template <class M>
inline Packed<M> load_some(const M* from, ptrdiff_t n, M rest) {
    if (n >= kPacked<M>) return load(from);
    M some[kPacked<M>];
    for (M& x : some) x = rest;
    Packed<M> packed = load(some);
    if (n <= 0) return packed;
#if NEGLOG_AVX512
    const uint64_t mask = (uint64_t(1) << n) - 1;
    const __m512i fill = (__m512i)packed;
    if constexpr (sizeof(M) == 2) packed = (Packed<M>)_mm512_mask_loadu_epi16(fill, mask, from);
    if constexpr (sizeof(M) == 4) packed = (Packed<M>)_mm512_mask_loadu_epi32(fill, mask, from);
    if constexpr (sizeof(M) == 8) packed = (Packed<M>)_mm512_mask_loadu_epi64(fill, mask, from);
#else
    for (int i = 0; i < n; ++i) some[i] = from[i];
    packed = load(some);
#endif
    return packed;
}

template <class M>
inline void store_some(Packed<M> packed, ptrdiff_t n, M* to) {
    if (n >= kPacked<M>) return store(packed, to);
#if NEGLOG_AVX512
    const uint64_t mask = (uint64_t(1) << n) - 1;
    if constexpr (sizeof(M) == 2) _mm512_mask_storeu_epi16(to, mask, (__m512i)packed);
    if constexpr (sizeof(M) == 4) _mm512_mask_storeu_epi32(to, mask, (__m512i)packed);
    if constexpr (sizeof(M) == 8) _mm512_mask_storeu_epi64(to, mask, (__m512i)packed);
#else
    M some[kPacked<M>];
    store(packed, some);
    for (int i = 0; i < n; ++i) to[i] = some[i];
#endif
}

// A store past the caches: it does not read the line before it writes it. `to` is aligned to the
// register. Others may read what was stored so after finish_streams.
template <class M>
inline void stream(Packed<M> packed, M* to) {
#if NEGLOG_AVX512
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)packed);
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)packed);
#elif defined(__SSE2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)packed);
#else
    store(packed, to);
#endif
}

inline void finish_streams() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

inline void prefetch_to_l2(const void* address) { __builtin_prefetch(address, 0, 2); }

// How many numbers lie before the first line of the cache that begins at or after `at`.
template <class M>
inline ptrdiff_t numbers_before_line(const M* at) {
    return ptrdiff_t(-reinterpret_cast<uintptr_t>(at) % kCacheLine / sizeof(M));
}

}  // namespace neglog
