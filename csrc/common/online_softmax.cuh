// Device twin of kernels/numerics.hpp: the online log-sum-exp of a row that a whole block walks,
// and the walk itself. Knows no framework.
//
// Precision: float, __nv_bfloat16 and __half are computed in float, double in double, with the
// accurate log, tanh and expm1 (never -use_fast_math), and for float and double the accurate exp. Sums
// over a block are made in double.

#pragma once

#ifdef NEGLOG_EMULATED
#include "emulator/cuda_on_cpu.hpp"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

namespace neglog {

constexpr int kMaxThreads = 512;
// Of a block that walks rows, of which a multiprocessor's registers hold three, or two that read and
// then write: one loads while another reduces. With more they spill, and on sm_80 and sm_100, for
// which the compiler wants more registers, with three.
constexpr int kRowThreads = 256, kFusedBlocks = 2;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1000
template <class S>
constexpr int kRowBlocks = sizeof(S) == 8 ? 2 : 3;
#else
template <class S>
constexpr int kRowBlocks = 2;
#endif
constexpr int kThreadsOfMultiprocessor = 2048;
constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;
// Vectors a thread asks for before it uses the first; doubles want two registers each.
template <class S>
constexpr int kInFlight = sizeof(S) == 8 ? 2 : 4;

// Storage and the type computed in

template <class S>
struct RealOf {
    using type = float;
};
template <>
struct RealOf<double> {
    using type = double;
};
template <class S>
using real_of = typename RealOf<S>::type;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(double x, double& to) { to = x; }
__device__ inline void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half& to) { to = __float2half_rn(x); }

// exp as exact as numbers stored as S: in 16 bits the device's own power of two, off by 2^-22 and by
// 2^-24 of x. The accurate exp takes six instructions more, with which the walk over 16-bit logits
// would wait for arithmetic and not for memory (bench/sass.py counts them).
#ifdef NEGLOG_EMULATED
inline float power_of_two(float x) { return emulated::power_of_two(x); }
#else
__device__ inline float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

template <class S>
__device__ real_of<S> exp_of(real_of<S> x) {
    if constexpr (sizeof(S) == 2) return power_of_two(x * 1.44269504f);
    else return exp(x);
}

// A product that no later addition may absorb into an fma. A score z must be the same number in
// every pass: at z = 1e4 the unrounded product is off by 5e-4 from the one the lse was made of, and
// the probability with it.
__device__ inline float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double rounded_product(double a, double b) { return __dmul_rn(a, b); }

// Walking a row: single elements up to the first 16-byte boundary, vectors, single elements

template <class S>
constexpr int kLanes = kVectorBytes / int(sizeof(S));

// n neighbouring elements; n is 1 or kLanes<S>.
template <class S, int n>
struct Lanes {
    S at[n];
};

template <class S>
struct Cut {
    int64_t head, vectors;
};

template <class S>
__device__ Cut<S> cut_at_vectors(const S* row, int64_t n) {
    const int past = int(reinterpret_cast<uintptr_t>(row) % kVectorBytes / sizeof(S));
    const int64_t head = past == 0 ? 0 : kLanes<S> - past;
    return head < n ? Cut<S>{head, (n - head) / kLanes<S>} : Cut<S>{n, 0};
}

template <class S>
__device__ bool same_phase(const S* a, const S* b) {
    return (reinterpret_cast<uintptr_t>(a) - reinterpret_cast<uintptr_t>(b)) % kVectorBytes == 0;
}

template <class S>
__device__ Lanes<S, kLanes<S>> unpacked(const uint4& bits) {
    Lanes<S, kLanes<S>> x;
    memcpy(&x, &bits, sizeof(bits));
    return x;
}

// Into a value: unpacked where it lies, a vector was loaded byte by byte.
__device__ inline uint4 load_vector(const uint4* from) {
#ifdef NEGLOG_EMULATED
    uint4 bits;  // GCC joins this branch and the one for what is not aligned
    memcpy(&bits, reinterpret_cast<const char*>(from), sizeof(bits));
    return bits;
#else
    return *from;
#endif
}

// Loads are plain ones, never through the read-only path: the in-place op writes what it has read.
template <class S, int n>
__device__ Lanes<S, n> load(const S* from, bool aligned) {
    if constexpr (n == kLanes<S>)
        if (aligned) return unpacked<S>(load_vector(reinterpret_cast<const uint4*>(from)));
    Lanes<S, n> x;
#pragma unroll
    for (int i = 0; i < n; ++i) x.at[i] = from[i];
    return x;
}

// Left to the compiler, stores in unrolled loops came out as four of 4 bytes each.
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
__device__ void store(S* to, const Lanes<S, n>& x, bool aligned) {
    if constexpr (n == kLanes<S>)
        if (aligned) {
            uint4 bits;
            memcpy(&bits, &x, sizeof(bits));
            store_vector(reinterpret_cast<uint4*>(to), bits);
            return;
        }
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = x.at[i];
}

template <class S, class T, int n>
__device__ Lanes<S, n> narrowed(const T (&x)[n]) {
    Lanes<S, n> y;
#pragma unroll
    for (int i = 0; i < n; ++i) narrow(x[i], y.at[i]);
    return y;
}

// The column of the one element outside the vectors that this thread takes, or n or beyond. Head and
// tail are each shorter than a vector, so together shorter than the smallest block.
template <class S>
__device__ int64_t edge_column(const Cut<S>& cut) {
    return threadIdx.x < cut.head ? threadIdx.x : cut.vectors * kLanes<S> + threadIdx.x;
}

// Calls visit(v, bits) once for each of `count` vectors, shared out over the block. Vectors wait as
// they came: unpacked, each 16-bit element would hold a register.
template <int in_flight, class Visit>
__device__ void walk_vectors(const uint4* vectors, int64_t count, Visit visit) {
    uint4 bits[in_flight];
    int64_t first = threadIdx.x;
    for (; first + (in_flight - 1) * blockDim.x < count; first += in_flight * blockDim.x) {
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

// Calls visit(column, lanes) once for each piece of the row, shared out over the block.
template <int in_flight, class S, class Visit>
__device__ void walk(const S* row, int64_t n, Visit visit) {
    const Cut<S> cut = cut_at_vectors(row, n);
    const auto vectors = reinterpret_cast<const uint4*>(row + cut.head);
    walk_vectors<in_flight>(vectors, cut.vectors, [&](int64_t v, const uint4& bits) {
        visit(cut.head + v * kLanes<S>, unpacked<S>(bits));
    });
    const int64_t edge = edge_column(cut);
    if (edge < n) visit(edge, load<S, 1>(row + edge, true));
}

template <class S>
__device__ void zero_row(S* row, int64_t n) {
    const Cut<S> cut = cut_at_vectors(row, n);
    auto vectors = reinterpret_cast<uint4*>(row + cut.head);
    for (int64_t v = threadIdx.x; v < cut.vectors; v += blockDim.x) vectors[v] = uint4{};
    const int64_t edge = edge_column(cut);
    if (edge < n) row[edge] = S(0);
}

// A block as large as gives each thread all its loads in flight once, so that it depends on the
// vocabulary and the dtype alone.
template <class S>
int threads_for(int64_t vocab) {
    int threads = kWarp;
    while (threads < kRowThreads && int64_t(threads) * kInFlight<S> * kLanes<S> < vocab) threads *= 2;
    return threads;
}

// From a logit to its score, the z of the formulas. Without a softcap there is no tanh in the loops.
template <class T, bool capped>
struct Cap {
    T logit_scale, softcap;

    __device__ T operator()(T x) const {
        const T z = rounded_product(x, logit_scale);
        if constexpr (capped) return rounded_product(softcap, tanh(z / softcap));
        else return z;
    }

    // dz/dx over logit_scale, 1 - tanh^2
    __device__ T slope(T z) const {
        if constexpr (!capped) return T(1);
        const T ratio = z / softcap;
        return (1 - ratio) * (1 + ratio);
    }
};

template <class S, bool capped, int n>
__device__ void scores(const Cap<real_of<S>, capped>& cap, const Lanes<S, n>& x,
                       real_of<S> (&z)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) z[i] = cap(widen(x.at[i]));
}

// The online (maximum, sum) state of a log-sum-exp

template <class T>
struct LogSumExp {
    T maximum, sum;
};

template <class T>
__device__ LogSumExp<T> empty_log_sum_exp() {
    return {T(-INFINITY), T(0)};
}

// With every logit at -inf so far there is nothing to shift by: 0 keeps -inf - 0 = -inf, where
// -inf - -inf would poison rows that have a finite logit further on.
template <class T>
__device__ T shift_for(T maximum) {
    return maximum == T(-INFINITY) ? T(0) : maximum;
}

// fmax passes over a NaN; it reaches the sum through exp.
template <class S, class T, int n>
__device__ void absorb(LogSumExp<T>& state, const T (&z)[n]) {
    T maximum = z[0];
#pragma unroll
    for (int i = 1; i < n; ++i) maximum = fmax(maximum, z[i]);
    if (maximum > state.maximum) {  // rare after the first few: a branch costs less than the exp
        state.sum *= exp_of<S>(state.maximum - maximum);
        state.maximum = maximum;
    }
    const T shift = shift_for(state.maximum);
#pragma unroll
    for (int i = 0; i < n; ++i) state.sum += exp_of<S>(z[i] - shift);
}

struct MergeStates {
    template <class T>
    __device__ LogSumExp<T> operator()(const LogSumExp<T>& a, const LogSumExp<T>& b) const {
        const T maximum = fmax(a.maximum, b.maximum);
        const T shift = shift_for(maximum);
        const T sum = a.sum * exp(a.maximum - shift) + b.sum * exp(b.maximum - shift);
        return {maximum, sum};
    }
};

// lse as the unevaluated sum of two numbers. Rounded to one float at logits of 1e4 it would be off
// by 5e-4, and every probability with it; torch's x - max - log(sum) is not.
template <class T>
struct Lse {
    T high, low;
};

template <class T>
__device__ Lse<T> finish(const LogSumExp<T>& state) {
    const T log_sum = log(state.sum);
    const T high = state.maximum + log_sum;
    const T back = high - state.maximum;
    const T low = (state.maximum - (high - back)) + (log_sum - back);  // Knuth's two-sum
    return {high, low};
}

template <class T>
__device__ T log_probability(T z, Lse<T> lse) {
    return (z - lse.high) - lse.low;
}

// Reductions over a block, in one fixed order

struct Add {
    __device__ double operator()(double a, double b) const { return a + b; }
};

__device__ inline double from_lane_below(double x, int offset) {
    return __shfl_down_sync(0xffffffffu, x, offset);
}

template <class T>
__device__ LogSumExp<T> from_lane_below(const LogSumExp<T>& state, int offset) {
    return {__shfl_down_sync(0xffffffffu, state.maximum, offset),
            __shfl_down_sync(0xffffffffu, state.sum, offset)};
}

// Every thread gets the result, and the same bits: the lanes reduce downwards and each thread then
// folds the warps itself. A butterfly would not do, as a*x + b*y under an fma depends on the order.
// To be called by the whole block, whose size is a multiple of the warp's.
template <class State, class Merge>
__device__ State block_reduce(State state, Merge merge) {
    __shared__ State of_warp[kMaxThreads / kWarp];
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
        state = merge(state, from_lane_below(state, offset));
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = state;
    __syncthreads();
    State all = of_warp[0];
#pragma unroll 1
    for (int warp = 1; warp < int(blockDim.x) / kWarp; ++warp) all = merge(all, of_warp[warp]);
    __syncthreads();  // or a fast warp's next reduction overwrites what a slow one still reads
    return all;
}

__device__ inline double block_sum(double x) { return block_reduce(x, Add{}); }

// Blocks of a cluster, which read each other's shared memory; before sm_90 each is alone

#ifdef NEGLOG_EMULATED
#define NEGLOG_DYNAMIC_SHARED(name) uint4* const name = neglog::emulated::dynamic_shared()

inline unsigned cluster_rank() { return emulated::cluster_rank(); }
inline unsigned cluster_size() { return emulated::cluster_size(); }
inline void cluster_sync() { emulated::cluster_sync(); }

template <class T>
const T* of_block(const T* own, unsigned rank) {
    return emulated::of_block(own, rank);
}
#else
#define NEGLOG_DYNAMIC_SHARED(name) extern __shared__ uint4 name[]

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ inline unsigned cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
__device__ inline unsigned cluster_size() { return cooperative_groups::this_cluster().num_blocks(); }
__device__ inline void cluster_sync() { cooperative_groups::this_cluster().sync(); }

template <class T>
__device__ const T* of_block(const T* own, unsigned rank) {
    return cooperative_groups::this_cluster().map_shared_rank(own, rank);
}
#else
__device__ inline unsigned cluster_rank() { return 0; }
__device__ inline unsigned cluster_size() { return 1; }
__device__ inline void cluster_sync() {}

template <class T>
__device__ const T* of_block(const T* own, unsigned) {
    return own;
}
#endif
#endif

// A block's state merged with those of its cluster, in the order of their ranks: the same bits in
// every thread. `slot` lies in dynamic shared memory and must not be the last call's: a block that
// is quick would overwrite what a slow one still reads.
template <class T>
__device__ LogSumExp<T> cluster_reduce(const LogSumExp<T>& own, LogSumExp<T>* slot) {
    const unsigned parts = cluster_size();
    if (parts == 1) return own;
    if (threadIdx.x == 0) *slot = own;
    cluster_sync();
    LogSumExp<T> all = *of_block(slot, 0);
    for (unsigned part = 1; part < parts; ++part) all = MergeStates{}(all, *of_block(slot, part));
    return all;
}

}  // namespace neglog
