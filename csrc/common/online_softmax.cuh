// The softmax state of a row: the maximum of the scores z read so far, and the sum of
// exp(z - maximum). One read of the row gives its log-sum-exp, maximum + log(sum). Depends on no
// framework.
//
//   state = empty_state()
//   accumulate(state, z)              for the scores that a thread reads
//   state = block_reduce(state, MergeStates{})
//   lse = finish(state)
//
// Precision: float, __nv_bfloat16 and __half are computed in float, double in double. log, tanh and
// expm1 are the accurate ones (never compile with -use_fast_math), and so is exp for float and
// double. Sums over a block are formed in double.

#pragma once

#include "common/vector_io.cuh"

#include <cmath>

namespace neglog {

constexpr int kMaxThreads = 512;  // of a block
constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// Arithmetic

// exp, as accurate as numbers stored as S need it. For 16 bits it is the hardware's 2^x, with a
// relative error of about 2^-22 + |x| 2^-24. The accurate exp takes six instructions more, and the
// loops over 16-bit logits would then be bound by arithmetic, not by memory (bench/sass.py counts).
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
__device__ compute_t<S> exp_of(compute_t<S> x) {
    if constexpr (sizeof(S) == 2) return power_of_two(x * 1.44269504f);
    else return exp(x);
}

// A product that the compiler may not contract into an fma with a later addition. A score must be
// the same number in every pass: at z = 1e4 the unrounded product differs by 5e-4 from the one in
// the lse, and so would the probability. And in a sum of two products it is free to contract either:
// two kernels that contain the same function would give a row two log-sum-exps.
__device__ inline float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double rounded_product(double a, double b) { return __dmul_rn(a, b); }

// The state

template <class T>
struct SoftmaxState {
    T maximum, sum;
};

template <class T>
__device__ SoftmaxState<T> empty_state() {
    return {T(-INFINITY), T(0)};
}

// What to subtract from the scores before exp. While every score is -inf it is 0, because -inf -
// -inf is NaN, which would spoil the sum of a row whose later scores are finite.
template <class T>
__device__ T shift_for(T maximum) {
    return maximum == T(-INFINITY) ? T(0) : maximum;
}

// fmax ignores a NaN score; the sum becomes NaN through its exp.
template <class S, class T, int n>
__device__ void accumulate(SoftmaxState<T>& state, const T (&z)[n]) {
    T maximum = z[0];
#pragma unroll
    for (int i = 1; i < n; ++i) maximum = fmax(maximum, z[i]);
    if (maximum > state.maximum) {  // rare after the first vectors: a branch costs less than an exp
        state.sum *= exp_of<S>(state.maximum - maximum);
        state.maximum = maximum;
    }
    const T shift = shift_for(state.maximum);
#pragma unroll
    for (int i = 0; i < n; ++i) state.sum += exp_of<S>(z[i] - shift);
}

struct MergeStates {
    template <class T>
    __device__ SoftmaxState<T> operator()(const SoftmaxState<T>& a,
                                          const SoftmaxState<T>& b) const {
        const T maximum = fmax(a.maximum, b.maximum);
        const T shift = shift_for(maximum);
        return {maximum, rounded_product(a.sum, exp(a.maximum - shift)) +
                             rounded_product(b.sum, exp(b.maximum - shift))};
    }
};

// The log-sum-exp as an unevaluated sum, high + low. Rounded to one float at scores of 1e4 it would
// be off by 5e-4, and every probability with it; torch's x - max - log(sum) is not.
template <class T>
struct Lse {
    T high, low;
};

template <class T>
__device__ Lse<T> finish(const SoftmaxState<T>& state) {
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

// Reductions, in one fixed order: the same call gives the same bits

struct Add {
    __device__ double operator()(double a, double b) const { return a + b; }
};

__device__ inline double shuffle_down(double x, int offset) {
    return __shfl_down_sync(kFullMask, x, offset);
}

__device__ inline int64_t shuffle_down(int64_t x, int offset) {
    return __shfl_down_sync(kFullMask, x, offset);
}

template <class T>
__device__ SoftmaxState<T> shuffle_down(const SoftmaxState<T>& state, int offset) {
    return {__shfl_down_sync(kFullMask, state.maximum, offset),
            __shfl_down_sync(kFullMask, state.sum, offset)};
}

// Every thread gets the same bits: each warp reduces to its lane 0, then every thread merges the
// warps' results in order. All threads of the block call it; the block is a whole number of warps.
template <class State, class Merge>
__device__ State block_reduce(State state, Merge merge) {
    __shared__ State warp_states[kMaxThreads / kWarpSize];
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
        state = merge(state, shuffle_down(state, offset));
    if (threadIdx.x % kWarpSize == 0) warp_states[threadIdx.x / kWarpSize] = state;
    __syncthreads();
    State total = warp_states[0];
#pragma unroll 1
    for (int warp = 1; warp < int(blockDim.x) / kWarpSize; ++warp)
        total = merge(total, warp_states[warp]);
    __syncthreads();  // else a fast warp's next reduction overwrites what a slow one still reads
    return total;
}

__device__ inline double block_sum(double x) { return block_reduce(x, Add{}); }

// Every lane gets the result. All lanes of the warp call it.
template <class T>
__device__ T warp_maximum(T x) {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
        x = fmax(x, __shfl_xor_sync(kFullMask, x, offset));
    return x;
}

template <class T>
__device__ T warp_sum(T x) {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
        x += __shfl_xor_sync(kFullMask, x, offset);
    return x;
}

}  // namespace neglog
