// The softmax state of a row: the maximum of the scores z read so far, and the sum of
// exp(z - maximum). One read of the row gives its log-sum-exp, maximum + log(sum). Depends on no
// framework.
//
//   RunningSoftmax<S> running
//   running.add(z)                    for the scores that a thread reads
//   lse = finish(block_merge(running.state()))
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

constexpr float kLog2E = 1.44269504f;

template <class S>
__device__ compute_t<S> exp_of(compute_t<S> x) {
    if constexpr (sizeof(S) == 2) return power_of_two(x * kLog2E);
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

// exp(z - shift) of scores stored as S. Of 16 bits it is 2^(z log2(e) - from), an fma and the
// device's power, where `from` is shift log2(e) rounded. What is lost by rounding is one factor for
// all z: they are multiplied by `missing` together.
template <class S>
class ExpBelow {
    using T = compute_t<S>;
    static constexpr bool is_approximate = sizeof(S) == 2;

    T scale, from;

public:
    __device__ explicit ExpBelow(T shift) : scale(1), from(shift) {
        // The product of a larger one would be inf. Two such scores are equal, or far apart.
        if (is_approximate && fabs(shift) < T(1e38)) {
            scale = kLog2E;
            from = rounded_product(shift, scale);
        }
    }

    __device__ T operator()(T z) const {
        if constexpr (is_approximate) return power_of_two(fma(z, scale, -from));
        else return exp(z - from);
    }

    // By which sums of operator() are multiplied to make them sums of `other`'s.
    __device__ T factor_to(const ExpBelow& other) const {
        if constexpr (is_approximate)
            return scale == other.scale ? power_of_two(from - other.from) : T(0);
        else return exp(from - other.from);
    }

    // exp(z - shift) is operator()(z) times this.
    __device__ T missing(T shift) const {
        if constexpr (is_approximate) return power_of_two(fma(-shift, scale, from));
        else return T(1);
    }
};

// NaN is ignored; the sum becomes NaN through its exp.
template <class T, int n>
__device__ T largest_of(const T (&z)[n]) {
    T largest = z[0];
#pragma unroll
    for (int i = 1; i < n; ++i) largest = fmax(largest, z[i]);
    return largest;
}

// The softmax state of the scores that one thread reads.
template <class S>
class RunningSoftmax {
    using T = compute_t<S>;

public:
    T maximum = T(-INFINITY), sum = 0;  // the sum of exp_below(z)
    ExpBelow<S> exp_below{T(0)};

    // Returns what sums of exp_below(z) were multiplied by.
    __device__ T raise(T largest) {
        if (!(largest > maximum)) return T(1);
        const ExpBelow<S> next(largest);
        const T factor = maximum == T(-INFINITY) ? T(0) : exp_below.factor_to(next);
        sum *= factor;
        maximum = largest;
        exp_below = next;
        return factor;
    }

    // Scores not above the maximum.
    template <int n>
    __device__ void add_terms(const T (&z)[n], T (&terms)[n]) {
        T sums[n];
#pragma unroll
        for (int i = 0; i < n; ++i) sums[i] = terms[i] = exp_below(z[i]);
#pragma unroll
        for (int step = 1; step < n; step *= 2)
#pragma unroll
            for (int i = 0; i + step < n; i += 2 * step) sums[i] += sums[i + step];
        sum += sums[0];
    }

    template <int n>
    __device__ void add(const T (&z)[n]) {
        const T largest = largest_of(z);
        if (largest > maximum) raise(largest);  // rare after the first vectors
        T terms[n];
        add_terms(z, terms);
    }

    // What the sum lacks, see ExpBelow.
    __device__ T missing() const { return exp_below.missing(shift_for(maximum)); }

    __device__ SoftmaxState<T> state() const { return {maximum, sum * missing()}; }
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

// The merged state of the warp's lanes, or of two states of each: the maximum first, so that each
// state takes one exp. Every lane gets the same bits.
template <class T>
__device__ SoftmaxState<T> warp_merge(const SoftmaxState<T>& own) {
    const T maximum = warp_maximum(own.maximum);
    const T factor = exp(own.maximum - shift_for(maximum));
    return {maximum, warp_sum(rounded_product(own.sum, factor))};
}

template <class T>
__device__ SoftmaxState<T> warp_merge(const SoftmaxState<T>& a, const SoftmaxState<T>& b) {
    const T maximum = fmax(a.maximum, b.maximum), shift = shift_for(maximum);
    const T sum = rounded_product(a.sum, exp(a.maximum - shift)) +
                  rounded_product(b.sum, exp(b.maximum - shift));
    return warp_merge(SoftmaxState<T>{maximum, sum});
}

// This lane's of `count` states.
template <class T>
__device__ SoftmaxState<T> state_of_lane(const SoftmaxState<T>* states, int count, int first = 0) {
    const int i = first + int(threadIdx.x) % kWarpSize;
    return i < count ? states[i] : empty_state<T>();
}

// Every thread gets the same bits. All threads of the block call it; the block is a whole number of
// warps.
template <class T>
__device__ SoftmaxState<T> block_merge(const SoftmaxState<T>& own) {
    __shared__ SoftmaxState<T> of_warps[kMaxThreads / kWarpSize];
    const auto state = warp_merge(own);
    if (blockDim.x == kWarpSize) return state;
    if (threadIdx.x % kWarpSize == 0) of_warps[threadIdx.x / kWarpSize] = state;
    __syncthreads();
    const auto mine = state_of_lane(of_warps, int(blockDim.x) / kWarpSize);
    __syncthreads();  // else a fast warp's next merge overwrites what a slow one still reads
    return warp_merge(mine);
}

}  // namespace neglog
