// Numbers in global memory, loaded and stored as whole 16-byte vectors. Depends on no framework.
//
// A row of a matrix starts at any address that its dtype allows. A block splits it into a head of
// single elements up to the first 16-byte boundary, vectors, and a tail of single elements.

#pragma once

#ifdef NEGLOG_EMULATED
#include "emulator/cuda_on_cpu.hpp"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace neglog {

constexpr int kVectorBytes = 16;

// Elements of a vector.
template <class S>
constexpr int kVectorSize = kVectorBytes / int(sizeof(S));

// Vectors that a thread loads before it uses the first. Doubles take more registers in the
// arithmetic.
template <class S>
constexpr int kLoadsInFlight = sizeof(S) == 8 ? 2 : 4;

// S is the type of the numbers in memory, T = compute_t<S> the type they are computed in.

template <class S>
struct ComputeType {
    using type = float;
};
template <>
struct ComputeType<double> {
    using type = double;
};
template <class S>
using compute_t = typename ComputeType<S>::type;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(double x, double& to) { to = x; }
__device__ inline void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half& to) { to = __float2half_rn(x); }

// One vector, or one element

// n adjacent elements; n is 1 or kVectorSize<S>.
template <class S, int n>
struct Elements {
    S value[n];
};

// Two bfloat16 numbers of one word take an instruction each. nvcc takes two for every second of
// them where they are converted one by one.
template <class S, int n>
__device__ void widen_all(const Elements<S, n>& x, compute_t<S> (&to)[n]) {
    if constexpr (std::is_same_v<S, __nv_bfloat16> && n % 2 == 0) {
        uint32_t words[n / 2];
        memcpy(words, &x, sizeof(words));
#pragma unroll
        for (int i = 0; i < n / 2; ++i) {
            const uint32_t low = words[i] << 16, high = words[i] & 0xffff0000u;
            memcpy(&to[2 * i], &low, sizeof(low));
            memcpy(&to[2 * i + 1], &high, sizeof(high));
        }
    } else {
#pragma unroll
        for (int i = 0; i < n; ++i) to[i] = widen(x.value[i]);
    }
}

template <class S>
__device__ bool is_aligned(const S* address) {
    return reinterpret_cast<uintptr_t>(address) % kVectorBytes == 0;
}

// Whether a + i is aligned wherever b + i is.
template <class S>
__device__ bool same_alignment(const S* a, const S* b) {
    return (reinterpret_cast<uintptr_t>(a) - reinterpret_cast<uintptr_t>(b)) % kVectorBytes == 0;
}

template <class S>
__device__ Elements<S, kVectorSize<S>> unpack(const uint4& bits) {
    Elements<S, kVectorSize<S>> x;
    memcpy(&x, &bits, sizeof(bits));
    return x;
}

// Returns a copy: when the vector was unpacked from memory directly, nvcc loaded it byte by byte.
__device__ inline uint4 load_vector(const uint4* from) {
#ifdef NEGLOG_EMULATED
    // GCC merges this branch with the unaligned one, and must not assume alignment there.
    uint4 bits;
    memcpy(&bits, reinterpret_cast<const char*>(from), sizeof(bits));
    return bits;
#else
    return *from;
#endif
}

// Never loads through the read-only cache (ld.global.nc): the op in place writes what it has read.
template <class S, int n>
__device__ Elements<S, n> load(const S* from, bool aligned) {
    if constexpr (n == kVectorSize<S>)
        if (aligned) return unpack<S>(load_vector(reinterpret_cast<const uint4*>(from)));
    Elements<S, n> x;
#pragma unroll
    for (int i = 0; i < n; ++i) x.value[i] = from[i];
    return x;
}

// In assembly, because nvcc split the vector stores of unrolled loops into four of 4 bytes each.
__device__ inline void store_vector(uint4* to, const uint4& bits) {
#ifdef NEGLOG_EMULATED
    memcpy(reinterpret_cast<char*>(to), &bits, sizeof(bits));
#else
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(bits.x), "r"(bits.y),
                 "r"(bits.z), "r"(bits.w)
                 : "memory");
#endif
}

template <class S, int n>
__device__ void store(S* to, const Elements<S, n>& x, bool aligned) {
    if constexpr (n == kVectorSize<S>)
        if (aligned) {
            uint4 bits;
            memcpy(&bits, &x, sizeof(bits));
            store_vector(reinterpret_cast<uint4*>(to), bits);
            return;
        }
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = x.value[i];
}

// Each number rounded to the storage type.
template <class S, class T, int n>
__device__ Elements<S, n> narrowed(const T (&x)[n]) {
    Elements<S, n> y;
#pragma unroll
    for (int i = 0; i < n; ++i) narrow(x[i], y.value[i]);
    return y;
}

// The first `count` elements of a vector, which alone lie in the tensor; 0 for the others.
template <class S>
__device__ Elements<S, kVectorSize<S>> load_partial(const S* from, int count) {
    constexpr int n = kVectorSize<S>;
    if (count == n) return load<S, n>(from, is_aligned(from));
    Elements<S, n> x;
#pragma unroll
    for (int i = 0; i < n; ++i) x.value[i] = i < count ? from[i] : S(0);
    return x;
}

template <class S>
__device__ void store_partial(S* to, const Elements<S, kVectorSize<S>>& x, int count) {
    constexpr int n = kVectorSize<S>;
    if (count == n) {
        store(to, x, is_aligned(to));
        return;
    }
#pragma unroll
    for (int i = 0; i < n; ++i)
        if (i < count) to[i] = x.value[i];
}

// A row, shared out over a block

template <class S>
struct VectorSplit {
    int64_t head;     // elements before the first vector
    int64_t vectors;  // whole vectors; the tail follows them
};

template <class S>
__device__ VectorSplit<S> split_at_vectors(const S* row, int64_t n) {
    const int past = int(reinterpret_cast<uintptr_t>(row) % kVectorBytes / sizeof(S));
    const int64_t head = past == 0 ? 0 : kVectorSize<S> - past;
    return head < n ? VectorSplit<S>{head, (n - head) / kVectorSize<S>} : VectorSplit<S>{n, 0};
}

// The column of the head or of the tail that this thread processes; n or more where there is none.
// One element each is enough: head and tail together are shorter than two vectors, at most 16
// elements, and a block has at least 32 threads.
template <class S>
__device__ int64_t edge_column(const VectorSplit<S>& split) {
    return threadIdx.x < split.head ? threadIdx.x : split.vectors * kVectorSize<S> + threadIdx.x;
}

// Whether for_each_in_row shows this column of the row to this thread.
template <class S>
__device__ bool is_own_column(const S* row, int64_t n, int64_t column) {
    const VectorSplit<S> split = split_at_vectors(row, n);
    const int64_t behind = split.vectors * kVectorSize<S>;
    if (column < split.head) return threadIdx.x == column;
    if (column >= split.head + behind) return threadIdx.x == column - behind;
    return threadIdx.x == (column - split.head) / kVectorSize<S> % blockDim.x;
}

// Calls visit(v, bits) once for each of `count` vectors, in a block-stride loop. A thread loads
// `in_flight` vectors before it visits the first. They stay packed until then: unpacked, each
// 16-bit element would take a whole register.
template <int in_flight, class Visit>
__device__ void for_each_vector(const uint4* vectors, int64_t count, Visit visit) {
    if constexpr (in_flight == 1) {
        for (int64_t v = threadIdx.x; v < count; v += blockDim.x)
            visit(v, load_vector(vectors + v));
        return;
    }
    uint4 bits[in_flight];
    const int64_t step = in_flight * blockDim.x;
    int64_t first = threadIdx.x;
    // A step that not all threads have in full none takes here: lanes that do would make their warp
    // run both loops.
    for (int64_t behind = step; behind <= count; behind += step, first += step) {
#pragma unroll
        for (int u = 0; u < in_flight; ++u) bits[u] = vectors[first + u * blockDim.x];
#pragma unroll
        for (int u = 0; u < in_flight; ++u) visit(first + u * blockDim.x, bits[u]);
    }
    if (first >= count) return;
#pragma unroll
    for (int u = 0; u < in_flight; ++u)
        if (first + u * blockDim.x < count) bits[u] = vectors[first + u * blockDim.x];
#pragma unroll
    for (int u = 0; u < in_flight; ++u)
        if (first + u * blockDim.x < count) visit(first + u * blockDim.x, bits[u]);
}

// Calls visit(column, elements) for each vector of the row, and for each single element of its head
// and tail.
template <int in_flight, class S, class Visit>
__device__ void for_each_in_row(const S* row, int64_t n, Visit visit) {
    const VectorSplit<S> split = split_at_vectors(row, n);
    const auto vectors = reinterpret_cast<const uint4*>(row + split.head);
    for_each_vector<in_flight>(vectors, split.vectors, [&](int64_t v, const uint4& bits) {
        visit(split.head + v * kVectorSize<S>, unpack<S>(bits));
    });
    const int64_t edge = edge_column(split);
    if (edge < n) visit(edge, load<S, 1>(row + edge, true));
}

template <class S>
__device__ void zero_row(S* row, int64_t n) {
    const VectorSplit<S> split = split_at_vectors(row, n);
    auto vectors = reinterpret_cast<uint4*>(row + split.head);
    for (int64_t v = threadIdx.x; v < split.vectors; v += blockDim.x) vectors[v] = uint4{};
    const int64_t edge = edge_column(split);
    if (edge < n) row[edge] = S(0);
}

}  // namespace neglog
