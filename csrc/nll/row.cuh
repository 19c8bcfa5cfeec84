// One row of logits, by a whole block: its log-sum-exp, its loss, its gradient. The formulas and the
// edge cases are those of kernels/nll.pyx.
//
// (a) Each thread keeps an online (maximum, sum) over 16-byte vectors, several of them in flight; the
//     block merges the states by shuffles and shared memory. One read of memory gives the row's
//     log-sum-exp.
// (b) What needs the finished lse (label smoothing, probability targets, statistics) walks the row
//     again, from L2 while the rows at work fit there: accumulated online it would cancel at large
//     logits. The second walk is skipped where no option asks for it.
// (c) The target's own gradient is formed by expm1 of its log-probability: p - 1 would lose every
//     digit as p nears 1.
// (d) In place, a thread writes only vectors that it has just read itself, after a barrier that ends
//     all other reading of the row.

#pragma once

#include "common/online_softmax.cuh"

#undef NDEBUG  // Python's own compiler flags set it; without the assertion a target reads anywhere
#include <cassert>

namespace neglog {
namespace {

// Vectors that a second walk asks for ahead: it finds the row in a cache, and other blocks are at work
// while it waits.
constexpr int kAgain = 1;

template <class S, bool capped>
struct Problem {
    int64_t rows, vocab;
    const S* logits;
    int64_t logits_stride;
    const int64_t* target;  // (rows), or null for probabilities
    int64_t target_stride;
    const S* probs;  // (rows, vocab), or null for indices
    int64_t probs_stride;
    const real_of<S>* weight;  // (vocab), or null for ones
    int64_t ignore_index;
    double label_smoothing, share;  // share: label_smoothing / vocab
    Cap<real_of<S>, capped> cap;
    double z_loss;
};

template <class T>
struct Output {
    T *loss, *lse, *lse_low;
    bool* correct;  // both null without statistics
    T* entropy;
};

// A number for each row; stride 0 for the same one.
template <class T>
struct Strided {
    const T* first;
    int64_t stride;
    __device__ T operator[](int64_t row) const { return first[row * stride]; }
};

template <class T>
struct Upstream {
    Strided<T> loss, lse;  // lse.first null for none
    const T* divisor;      // null for 1
};

// The row's gradient by the scores is soft * p, and hard * (p - 1) more at the target, less spread
// times the mass at each class. Then times dz/dx, here all of it but the softcap's part.
template <class T>
struct Factors {
    int64_t target;  // -1 for none
    T at_target;     // what is written there, the softcap's part too
    T elsewhere;     // hard + soft, times exp(-lse.low): of exp(z - lse.high)
    T spread;
};

// Reading

template <class S, bool capped>
__device__ bool ignored(const Problem<S, capped>& p, int64_t row) {
    return p.target && p.target[row * p.target_stride] == p.ignore_index;
}

template <class S, bool capped>
__device__ int64_t class_of(const Problem<S, capped>& p, int64_t row) {
    const int64_t target = p.target[row * p.target_stride];
    assert(target >= 0 && target < p.vocab);
    return target;
}

template <class S, bool capped>
__device__ const S* logits_of(const Problem<S, capped>& p, int64_t row) {
    return p.logits + row * p.logits_stride;
}

template <class S, bool capped>
__device__ real_of<S> target_score(const Problem<S, capped>& p, int64_t row) {
    return p.cap(widen(logits_of(p, row)[class_of(p, row)]));
}

// 0 where the row has no class: it is ignored, or its target is a distribution.
template <class S, bool capped>
__device__ real_of<S> target_score_or_0(const Problem<S, capped>& p, int64_t row) {
    return p.target && !ignored(p, row) ? target_score(p, row) : real_of<S>(0);
}

// What multiplies each log-probability besides the target's own: w_c, or w_c q'_c.
template <class S, bool capped, int n>
__device__ void mass(const Problem<S, capped>& p, int64_t row, int64_t column, real_of<S> (&a)[n]) {
    using T = real_of<S>;
#pragma unroll
    for (int i = 0; i < n; ++i) a[i] = 1;
    if (p.probs) {
        const S* from = p.probs + row * p.probs_stride;
        const bool aligned = same_phase(from, logits_of(p, row));
        const Lanes<S, n> q = load<S, n>(from + column, aligned);
#pragma unroll
        for (int i = 0; i < n; ++i)
            a[i] = widen(q.at[i]) * T(1 - p.label_smoothing) + T(p.share);
    }
    if (p.weight) {
#pragma unroll
        for (int i = 0; i < n; ++i) a[i] *= p.weight[column + i];
    }
}

// Forward of one row, by the whole block

template <class S, bool capped>
__device__ LogSumExp<real_of<S>> row_state(const Problem<S, capped>& p, int64_t row) {
    auto state = empty_log_sum_exp<real_of<S>>();
    walk<kInFlight<S>>(logits_of(p, row), p.vocab, [&]<int n>(int64_t, const Lanes<S, n>& x) {
        real_of<S> z[n];
        scores(p.cap, x, z);
        absorb<S>(state, z);
    });
    return block_reduce(state, MergeStates{});
}

// sum of mass * log p over the vocabulary
template <class S, bool capped>
__device__ double row_cross_entropy(const Problem<S, capped>& p, int64_t row, Lse<real_of<S>> lse) {
    real_of<S> sum = 0;
    walk<kAgain>(logits_of(p, row), p.vocab, [&]<int n>(int64_t column, const Lanes<S, n>& x) {
        real_of<S> z[n], a[n];
        scores(p.cap, x, z);
        mass(p, row, column, a);
#pragma unroll
        for (int i = 0; i < n; ++i) sum += a[i] * log_probability(z[i], lse);
    });
    return block_sum(sum);
}

// Whether the target is where argmax would look, the first of the maxima, but for columns before it.
template <class S, bool capped>
__device__ bool at_maximum(const Problem<S, capped>& p, int64_t row, real_of<S> maximum,
                           Lse<real_of<S>> lse) {
    const bool nan_among_finite = isnan(lse.high) && maximum < INFINITY;
    if (!p.target || ignored(p, row) || nan_among_finite) return false;
    return target_score(p, row) == maximum;
}

template <class S, bool capped>
__device__ void row_statistics(const Problem<S, capped>& p, const Output<real_of<S>>& o,
                               int64_t row, real_of<S> maximum, Lse<real_of<S>> lse) {
    using T = real_of<S>;
    const bool candidate = at_maximum(p, row, maximum, lse);
    const int64_t target = candidate ? class_of(p, row) : 0;
    bool earlier = false;
    T sum = 0;
    walk<kAgain>(logits_of(p, row), p.vocab, [&]<int n>(int64_t column, const Lanes<S, n>& x) {
        T z[n];
        scores(p.cap, x, z);
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const T log_p = log_probability(z[i], lse);
            const T probability = exp(log_p);
            sum += probability == 0 ? 0 : probability * log_p;  // not 0 * -inf
            earlier |= column + i < target && z[i] == maximum;
        }
    });
    const double entropy = -block_sum(sum);
    earlier = __syncthreads_or(earlier);
    if (threadIdx.x == 0) {
        o.correct[row] = candidate && !earlier;
        o.entropy[row] = T(entropy);
    }
}

template <class S, bool capped>
__device__ double target_weight(const Problem<S, capped>& p, int64_t row) {
    return p.target && p.weight ? p.weight[class_of(p, row)] : 1;
}

// `target_z` is the target's score; of no account with probabilities.
template <class S, bool capped>
__device__ double row_loss(const Problem<S, capped>& p, int64_t row, Lse<real_of<S>> lse,
                           real_of<S> target_z) {
    const double w = target_weight(p, row);
    double loss = 0;
    if (p.target) loss = -(1 - p.label_smoothing) * w * log_probability(target_z, lse);
    if (p.probs)
        loss = -row_cross_entropy(p, row, lse);
    else if (p.label_smoothing != 0)
        loss -= p.share * row_cross_entropy(p, row, lse);
    if (p.z_loss != 0) loss += p.z_loss * w * (double(lse.high) * lse.high);
    return loss;
}

template <class S, bool capped>
__device__ Lse<real_of<S>> row_forward(const Problem<S, capped>& p, const Output<real_of<S>>& o,
                                       int64_t row) {
    const bool counted = !ignored(p, row);
    Lse<real_of<S>> lse = {0, 0};
    double loss = 0;
    if (counted || o.correct) {
        const auto z = target_score_or_0(p, row);  // its load is under way while the row is walked
        const auto state = row_state(p, row);
        lse = finish(state);
        if (counted) loss = row_loss(p, row, lse, z);
        if (o.correct) row_statistics(p, o, row, state.maximum, lse);
    }
    if (threadIdx.x == 0) {
        o.loss[row] = real_of<S>(loss);
        o.lse[row] = lse.high;
        o.lse_low[row] = lse.low;
    }
    return lse;
}

// Gradient of one row, by the whole block

// sum of w_c over the vocabulary, where label smoothing needs it
template <class S, bool capped>
__device__ double weight_sum(const Problem<S, capped>& p) {
    if (!p.weight || p.label_smoothing == 0 || p.probs) return double(p.vocab);
    real_of<S> sum = 0;
    for (int64_t c = threadIdx.x; c < p.vocab; c += blockDim.x) sum += p.weight[c];
    return block_sum(sum);
}

template <class S, bool capped>
__device__ double row_mass(const Problem<S, capped>& p, int64_t row) {
    real_of<S> sum = 0;
    walk<kAgain>(logits_of(p, row), p.vocab, [&]<int n>(int64_t column, const Lanes<S, n>&) {
        real_of<S> a[n];
        mass(p, row, column, a);
#pragma unroll
        for (int i = 0; i < n; ++i) sum += a[i];
    });
    return block_sum(sum);
}

// `weights` is the sum of w_c where label smoothing needs it.
template <class S, bool capped>
__device__ Factors<real_of<S>> row_factors(const Problem<S, capped>& p, int64_t row,
                                           Lse<real_of<S>> lse, real_of<S> target_z, double grad,
                                           double grad_lse, double weights) {
    using T = real_of<S>;
    const double slope = p.cap.logit_scale, tail = slope * exp(-lse.low);
    if (ignored(p, row)) return {-1, T(0), T(tail * grad_lse), T(0)};
    const double w = target_weight(p, row);
    const double spread = p.probs ? grad : p.label_smoothing != 0 ? grad * p.share : 0;
    double soft = grad_lse + spread * (p.probs ? row_mass(p, row) : weights);
    if (p.z_loss != 0) soft += grad * 2 * p.z_loss * w * lse.high;
    if (p.probs) return {-1, T(0), T(tail * soft), T(slope * spread)};
    const double hard = grad * (1 - p.label_smoothing) * w;
    const T log_p = log_probability(target_z, lse);
    const double at_target =
        (soft * exp(log_p) + hard * expm1(log_p) - spread * w) * p.cap.slope(target_z);
    return {class_of(p, row), T(slope * at_target), T(tail * (hard + soft)), T(slope * spread)};
}

// But for the target's.
template <bool spread, class S, bool capped, int n>
__device__ Lanes<S, n> gradient_at(const Problem<S, capped>& p, int64_t row, int64_t column,
                                   const Lanes<S, n>& x, Lse<real_of<S>> lse,
                                   const Factors<real_of<S>>& f) {
    using T = real_of<S>;
    T z[n], grad[n];
    scores(p.cap, x, z);
#pragma unroll
    for (int i = 0; i < n; ++i) grad[i] = f.elsewhere * exp_of<S>(z[i] - lse.high);
    if constexpr (spread) {
        T a[n];
        mass(p, row, column, a);
#pragma unroll
        for (int i = 0; i < n; ++i) grad[i] -= f.spread * a[i];
    }
#pragma unroll
    for (int i = 0; i < n; ++i) grad[i] *= p.cap.slope(z[i]);
    return narrowed<S>(grad);
}

// The target's own is written by the thread that has just written over it.
template <class S, int n>
__device__ void write_at_target(const Factors<real_of<S>>& f, int64_t column, S* out) {
    if (uint64_t(f.target - column) < n) narrow(f.at_target, out[f.target]);
}

template <int in_flight, bool spread, class S, bool capped>
__device__ void write_gradient(const Problem<S, capped>& p, int64_t row, Lse<real_of<S>> lse,
                               const Factors<real_of<S>>& f, S* out, bool aligned) {
    walk<in_flight>(logits_of(p, row), p.vocab, [&]<int n>(int64_t column, const Lanes<S, n>& x) {
        store(out + column, gradient_at<spread>(p, row, column, x, lse, f), aligned);
        write_at_target<S, n>(f, column, out);
    });
}

// The loop that most calls take has no other's code in it.
template <int in_flight, class S, bool capped>
__device__ void row_gradient(const Problem<S, capped>& p, int64_t row, Lse<real_of<S>> lse,
                             const Factors<real_of<S>>& f, S* out) {
    const bool aligned = same_phase<S>(out, logits_of(p, row));
    if (f.spread != 0) write_gradient<in_flight, true>(p, row, lse, f, out, aligned);
    else if (aligned) write_gradient<in_flight, false>(p, row, lse, f, out, true);
    else write_gradient<kAgain, false>(p, row, lse, f, out, false);
}

}  // namespace
}  // namespace neglog
