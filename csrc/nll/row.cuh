// One row of logits, computed by one thread block: its loss, its log-sum-exp, its statistics and
// its gradient.
//
//   z_c  = softcap * tanh(logit_c * logit_scale / softcap)
//   lse  = log(sum_c exp(z_c)),  log p_c = z_c - lse
//   loss = -(1 - smoothing) w_t log p_t - smoothing / V sum_c w_c log p_c + z_loss w_t lse^2
//
// for a target class t with class weights w. Without a softcap z_c = logit_c * logit_scale. For a
// target distribution q the loss is -sum_c w_c q'_c log p_c + z_loss lse^2, where q' = (1 -
// smoothing) q + smoothing / V. A row's loss is multiplied by its token weight; the row is ignored
// where that is 0, and where t is ignore_index.
//
// (a) Each thread keeps a softmax state of the vectors that it reads, several loads in flight. The
//     block merges the states through shuffles and shared memory: one read gives the log-sum-exp.
// (b) Label smoothing and a target distribution need the finished lse, so they read the row a second
//     time, mostly from L2. Accumulated in the first pass they would cancel at large logits. Calls
//     without these options skip the second pass. The statistics need one pass.
// (c) The gradient at the target is formed from expm1(log p): p - 1 would lose all digits as p
//     nears 1.
// (d) A gradient written in place: a thread writes only elements that it has just read itself,
//     after a barrier behind all other reads of the row.

#pragma once

#include "common/rows.cuh"

namespace neglog {
namespace {

// Blocks that a multiprocessor's registers must hold, so that one loads while another reduces: the
// second number of __launch_bounds__. With one block more the kernels spill registers. On sm_80 and
// sm_100 nvcc takes more registers, and they spill with three.
constexpr int kMinBlocksForwardBackward = 2;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1000
template <class S>
constexpr int kMinBlocks = sizeof(S) == 8 ? 2 : 3;
#else
template <class S>
constexpr int kMinBlocks = 2;
#endif

// From a logit to its score z. The loops contain no tanh without a softcap, and no product where
// the scores are the logits: it is one of nine instructions.
enum class Scoring { unchanged, scaled, capped };

// tanh in the loop takes more registers, and so does a row in shared memory whose scores are not its
// logits.
template <class S, Scoring scoring>
constexpr int kMinBlocksBackward = scoring == Scoring::capped ? 2 : kMinBlocks<S>;
template <class S, Scoring scoring>
constexpr int kMinBlocksInShared = scoring == Scoring::unchanged ? kMinBlocks<S> : 2;

template <class T, Scoring scoring>
struct LogitToScore {
    T logit_scale, softcap;

    __device__ T operator()(T x) const {
        if constexpr (scoring == Scoring::unchanged) return x;
        const T z = rounded_product(x, logit_scale);
        if constexpr (scoring == Scoring::scaled) return z;
        return rounded_product(softcap, tanh(z / softcap));
    }

    // dz / dlogit divided by logit_scale: 1 - tanh^2
    __device__ T slope(T z) const {
        if constexpr (scoring != Scoring::capped) return T(1);
        const T ratio = z / softcap;
        return (1 - ratio) * (1 + ratio);
    }
};

template <class S, Scoring scoring, int n>
__device__ void to_scores(const LogitToScore<compute_t<S>, scoring>& to_score,
                          const Elements<S, n>& x, compute_t<S> (&z)[n]) {
    widen_all(x, z);
#pragma unroll
    for (int i = 0; i < n; ++i) z[i] = to_score(z[i]);
}

template <class S, Scoring scoring>
struct Problem {
    int64_t rows, vocab;
    const S* logits;
    int64_t logits_stride;
    const int64_t* target;  // (rows), or null for probabilities
    int64_t target_stride;
    const S* probs;  // (rows, vocab), or null for indices
    int64_t probs_stride;
    const compute_t<S>* weight;        // (vocab), or null for ones
    const double* weight_sum;          // of all classes; null for vocab, and where nothing needs it
    const compute_t<S>* token_weight;  // (rows), or null for ones
    int64_t ignore_index;
    double label_smoothing, smoothing_per_class;  // the second is the first / vocab
    LogitToScore<compute_t<S>, scoring> to_score;
    double z_loss;
};

// Of a larger one nvcc makes loops over the row that test the call's options in every step.
static_assert(sizeof(Problem<float, Scoring::capped>) <= 128);

template <class T>
struct Output {
    T *loss, *lse, *lse_low;  // lse + lse_low is the log-sum-exp
    bool* correct;            // null without statistics
    T* entropy;               // likewise
    int64_t* argmax;          // likewise
};

template <class T>
struct Upstream {
    PerRow<T> loss, lse, entropy;  // first is null where nothing depends on the lse, the entropy
    const T* divisor;              // of the loss's; null for 1
};

// What a backward knows of a row from the forward.
template <class T>
struct Saved {
    PerRow<T> lse, lse_low, entropy;  // entropy.first is null where nothing depends on it
};

// The upstream of one row, and its entropy.
struct RowUpstream {
    double grad, grad_lse, grad_entropy, entropy;
};

// The gradient that a forward forms, for one upstream of all rows: in new memory, or in place.
template <class S>
struct Gradient {
    S* first;  // null where none is formed
    int64_t stride;
    const compute_t<S>*upstream, *divisor;  // null for 1; upstream NaN where none is formed
    bool divide_later;                      // explained in forward_in_place
};

// The gradient of a row by its scores is, with [c = t] 1 at the target and 0 elsewhere,
//
//   dz_c = softmax_weight p_c + target_weight (p_c - [c = t]) - uniform_weight a_c
//          - grad_entropy p_c (log p_c + entropy)
//
// where a_c are the coefficients of the log-probabilities in the loss, w_c or w_c q'_c (see
// coefficients below). The gradient by the logits is that times dz / dlogit.
template <class S>
struct GradientFactors {
    using T = compute_t<S>;
    // Where this thread has the target's column; elsewhere -1. The gradient is complete.
    int64_t own_target;
    T target_gradient;
    ExpBelow<S> exp_below;  // lse.high
    T of_exp;  // of exp_below(z): (softmax_weight + target_weight) exp(-lse.low) logit_scale
    T of_coefficient;  // of a_c: uniform_weight logit_scale
    // With an upstream of the entropy, of exp_below(z) there is besides
    // of_entropy (z - lse.high + entropy_offset).
    T of_entropy, entropy_offset;
};

// Below it exp is 0 in double too. The log-probability of a score of -inf, cut off here, makes 0 of
// what would be 0 * inf.
constexpr double kLogOfZero = -1000;

// Reading

template <class S, Scoring scoring>
__device__ compute_t<S> token_weight_of(const Problem<S, scoring>& p, int64_t row) {
    return p.token_weight ? p.token_weight[row] : compute_t<S>(1);
}

// What says whether a row counts.
template <class T>
struct RowLabel {
    int64_t target;  // -1 for a distribution
    T token_weight;
};

template <class S, Scoring scoring>
__device__ RowLabel<compute_t<S>> label_of(const Problem<S, scoring>& p, int64_t row) {
    return {p.target ? p.target[row * p.target_stride] : -1, token_weight_of(p, row)};
}

template <class S, Scoring scoring>
__device__ bool is_ignored(const Problem<S, scoring>& p, const RowLabel<compute_t<S>>& label) {
    return label.token_weight == 0 || (p.target && label.target == p.ignore_index);
}

template <class S, Scoring scoring>
__device__ bool is_ignored(const Problem<S, scoring>& p, int64_t row) {
    return is_ignored(p, label_of(p, row));
}

template <class S, Scoring scoring>
__device__ int64_t target_of(const Problem<S, scoring>& p, int64_t row) {
    const int64_t target = p.target[row * p.target_stride];
    assert(target >= 0 && target < p.vocab);
    return target;
}

template <class S, Scoring scoring>
__device__ const S* logits_row(const Problem<S, scoring>& p, int64_t row) {
    return p.logits + row * p.logits_stride;
}

template <class S, Scoring scoring>
__device__ compute_t<S> target_score(const Problem<S, scoring>& p, int64_t row) {
    return p.to_score(widen(logits_row(p, row)[target_of(p, row)]));
}

// 0 where the row has no class: it is ignored, or its target is a distribution.
template <class S, Scoring scoring>
__device__ compute_t<S> target_score_or_0(const Problem<S, scoring>& p, int64_t row) {
    return p.target && !is_ignored(p, row) ? target_score(p, row) : compute_t<S>(0);
}

// The factors a_c of the log-probabilities in the loss: w_c with a class target, w_c q'_c with a
// target distribution.
template <class S, Scoring scoring, int n>
__device__ void coefficients(const Problem<S, scoring>& p, int64_t row, int64_t column,
                             compute_t<S> (&a)[n]) {
    using T = compute_t<S>;
#pragma unroll
    for (int i = 0; i < n; ++i) a[i] = 1;
    if (p.probs) {
        const S* from = p.probs + row * p.probs_stride;
        const bool aligned = same_alignment(from, logits_row(p, row));
        const Elements<S, n> q = load<S, n>(from + column, aligned);
#pragma unroll
        for (int i = 0; i < n; ++i)
            a[i] = widen(q.value[i]) * T(1 - p.label_smoothing) + T(p.smoothing_per_class);
    }
    if (p.weight) {
#pragma unroll
        for (int i = 0; i < n; ++i) a[i] *= p.weight[column + i];
    }
}

// Forward

// Calls add(column, z) for the scores of a row.
template <class S, Scoring scoring, class Add>
__device__ void for_each_score(const Problem<S, scoring>& p, int64_t row, Add add) {
    const auto visit = [&]<int n>(int64_t column, const Elements<S, n>& x) {
        compute_t<S> z[n];
        to_scores(p.to_score, x, z);
        add(column, z);
    };
    for_each_in_row<kLoadsInFlight<S>>(logits_row(p, row), p.vocab, visit);
}

template <class S, Scoring scoring>
__device__ SoftmaxState<compute_t<S>> row_softmax_state(const Problem<S, scoring>& p, int64_t row) {
    RunningSoftmax<S> running;
    for_each_score(p, row, [&](int64_t, const auto& z) { running.add(z); });
    return block_merge(running.state());
}

// sum_c a_c log p_c
template <class S, Scoring scoring>
__device__ double row_cross_entropy(const Problem<S, scoring>& p, int64_t row,
                                    Lse<compute_t<S>> lse) {
    compute_t<S> sum = 0;
    const auto add = [&]<int n>(int64_t column, const Elements<S, n>& x) {
        compute_t<S> z[n], a[n];
        to_scores(p.to_score, x, z);
        coefficients(p, row, column, a);
#pragma unroll
        for (int i = 0; i < n; ++i) sum += a[i] * log_probability(z[i], lse);
    };
    for_each_in_row<kLoadsInFlightSecondPass>(logits_row(p, row), p.vocab, add);
    return block_sum(sum);
}

constexpr int64_t kNoColumn = INT64_MAX;

struct Smaller {
    __device__ int64_t operator()(int64_t a, int64_t b) const { return a < b ? a : b; }
};

// The first column with the maximum, and what the entropy is made of: with the maximum m and the sum
// s of exp(z - m), it is log(s) + sum exp(z - m) (m - z) / s. All terms have one sign, so nothing
// cancels, and the first pass over the row finds them.
template <class S>
class RunningStatistics {
    using T = compute_t<S>;

    RunningSoftmax<S> running;
    T weighted = 0;  // sum of exp_below(z) (maximum - z)
    int64_t first = kNoColumn;

    // Seldom called after the first vectors.
    template <int n>
    __device__ void move_to(T largest, int64_t column, const T (&z)[n]) {
        const T rise = largest - running.maximum;
        const bool empty = running.maximum == T(-INFINITY);
        const T raised = empty ? T(0) : weighted + rounded_product(rise, running.sum);
        weighted = raised * running.raise(largest);
        if (rise > 0) first = kNoColumn;
#pragma unroll
        for (int i = n - 1; i >= 0; --i)
            if (z[i] == largest && column + i < first) first = column + i;
    }

public:
    template <int n>
    __device__ void add(int64_t column, const T (&z)[n]) {
        const T largest = largest_of(z);
        if (largest >= running.maximum) move_to(largest, column, z);
        T terms[n];
        running.add_terms(z, terms);
#pragma unroll
        for (int i = 0; i < n; ++i)
            weighted += terms[i] * fmin(running.maximum - z[i], T(-kLogOfZero));  // 0 * inf is NaN
    }

    __device__ SoftmaxState<T> state() const { return running.state(); }

    // Of the block, whose merged state is `all`.
    __device__ double entropy(const SoftmaxState<T>& all) const {
        const auto own = state();
        const T below = all.maximum - own.maximum;
        const bool empty = own.maximum == T(-INFINITY);
        const T sum =
            empty ? T(0)
                  : (weighted * running.missing() + rounded_product(below, own.sum)) * exp(-below);
        return log(double(all.sum)) + block_sum(sum) / all.sum;
    }

    __device__ int64_t first_maximum(const SoftmaxState<T>& all) const {
        const bool has_it = state().maximum == all.maximum;
        return block_reduce(has_it ? first : kNoColumn, Smaller{});
    }
};

template <class S, Scoring scoring>
__device__ int64_t first_nan(const Problem<S, scoring>& p, int64_t row) {
    int64_t first = kNoColumn;
    const auto look = [&]<int n>(int64_t column, const Elements<S, n>& x) {
#pragma unroll
        for (int i = n - 1; i >= 0; --i)
            if (isnan(widen(x.value[i])) && column + i < first) first = column + i;
    };
    for_each_in_row<kLoadsInFlightSecondPass>(logits_row(p, row), p.vocab, look);
    return block_reduce(first, Smaller{});
}

// The argmax is the first column with a NaN, or else with the maximum, as torch's.
template <class S, Scoring scoring>
__device__ void write_statistics(const Problem<S, scoring>& p, const Output<compute_t<S>>& o,
                                 int64_t row, const RunningStatistics<S>& running,
                                 const SoftmaxState<compute_t<S>>& state) {
    const double entropy = running.entropy(state);
    int64_t first = running.first_maximum(state);
    const bool may_have_nan = isnan(state.sum);
    if (may_have_nan) {
        const int64_t nan = first_nan(p, row);
        if (nan != kNoColumn) first = nan;
    }
    if (threadIdx.x != 0) return;
    if (first == kNoColumn) first = 0;
    const bool nan_among_finite = may_have_nan && state.maximum < INFINITY;
    const bool counts = p.target && !is_ignored(p, row) && !nan_among_finite;
    o.correct[row] = counts && target_of(p, row) == first;
    o.argmax[row] = first;
    o.entropy[row] = compute_t<S>(entropy);
}

template <class S, Scoring scoring>
__device__ SoftmaxState<compute_t<S>> row_state_and_statistics(const Problem<S, scoring>& p,
                                                               const Output<compute_t<S>>& o,
                                                               int64_t row) {
    RunningStatistics<S> running;
    for_each_score(p, row, [&](int64_t column, const auto& z) { running.add(column, z); });
    const auto state = block_merge(running.state());
    write_statistics(p, o, row, running, state);
    return state;
}

template <class S, Scoring scoring>
__device__ double target_class_weight(const Problem<S, scoring>& p, int64_t row) {
    return p.target && p.weight ? p.weight[target_of(p, row)] : 1;
}

// `target_z` is the target's score. With a target distribution it is not used.
template <class S, Scoring scoring>
__device__ double row_loss(const Problem<S, scoring>& p, int64_t row, Lse<compute_t<S>> lse,
                           compute_t<S> target_z) {
    const double w = target_class_weight(p, row);
    double loss = 0;
    if (p.target) loss = -(1 - p.label_smoothing) * w * log_probability(target_z, lse);
    if (p.probs) loss = -row_cross_entropy(p, row, lse);
    else if (p.label_smoothing != 0) loss -= p.smoothing_per_class * row_cross_entropy(p, row, lse);
    if (p.z_loss != 0) loss += p.z_loss * w * (double(lse.high) * lse.high);
    return loss * token_weight_of(p, row);
}

template <class T>
__device__ void write_loss(const Output<T>& o, int64_t row, double loss, const Lse<T>& lse) {
    o.loss[row] = T(loss);
    o.lse[row] = lse.high;
    o.lse_low[row] = lse.low;
}

template <class S, Scoring scoring>
__device__ Lse<compute_t<S>> row_forward(const Problem<S, scoring>& p,
                                         const Output<compute_t<S>>& o, int64_t row) {
    const bool counted = !is_ignored(p, row);
    Lse<compute_t<S>> lse = {0, 0};
    double loss = 0;
    if (counted || o.correct) {
        const auto z = target_score_or_0(p, row);  // before the row, so that the loads overlap
        lse = finish(o.correct ? row_state_and_statistics(p, o, row) : row_softmax_state(p, row));
        // The first thread alone writes it; a sum over the row takes all of them.
        const bool sums = p.probs || p.label_smoothing != 0;
        if (counted && (sums || threadIdx.x == 0)) loss = row_loss(p, row, lse, z);
    }
    if (threadIdx.x == 0) write_loss(o, row, loss, lse);
    return lse;
}

// Gradient

// sum_c a_c
template <class S, Scoring scoring>
__device__ double row_coefficient_sum(const Problem<S, scoring>& p, int64_t row) {
    if (!p.probs) return p.weight_sum ? *p.weight_sum : double(p.vocab);
    compute_t<S> sum = 0;
    const auto add = [&]<int n>(int64_t column, const Elements<S, n>&) {
        compute_t<S> a[n];
        coefficients(p, row, column, a);
#pragma unroll
        for (int i = 0; i < n; ++i) sum += a[i];
    };
    for_each_in_row<kLoadsInFlightSecondPass>(logits_row(p, row), p.vocab, add);
    return block_sum(sum);
}

// What the parts of the gradient are multiplied by, as in the formula above.
struct GradientWeights {
    double softmax, target, uniform;
};

// Products that are added are rounded, here and below: with an fma in one kernel and none in another
// a gradient would have other bits where it is formed again.
template <class S, Scoring scoring>
__device__ GradientWeights gradient_weights(const Problem<S, scoring>& p, int64_t row, bool counted,
                                            Lse<compute_t<S>> lse, const RowUpstream& u) {
    if (!counted) return {u.grad_lse, 0, 0};
    const double grad = u.grad * token_weight_of(p, row), w = target_class_weight(p, row);
    const double uniform = p.probs                  ? grad
                           : p.label_smoothing != 0 ? grad * p.smoothing_per_class
                                                    : 0;
    double softmax = u.grad_lse;
    if (uniform != 0) softmax += rounded_product(uniform, row_coefficient_sum(p, row));
    if (p.z_loss != 0) softmax += rounded_product(grad * 2 * p.z_loss * w, double(lse.high));
    const double target = p.probs ? 0 : rounded_product(grad * (1 - p.label_smoothing), w);
    return {softmax, target, uniform};
}

template <class S, Scoring scoring>
__device__ compute_t<S> target_gradient(const Problem<S, scoring>& p, int64_t row,
                                        Lse<compute_t<S>> lse, compute_t<S> target_z,
                                        const GradientWeights& weights, const RowUpstream& u) {
    using T = compute_t<S>;
    const T log_p = log_probability(target_z, lse);
    const double probability = exp(log_p);
    double by_score = rounded_product(weights.softmax, probability) +
                      rounded_product(weights.target, double(expm1(log_p))) -
                      rounded_product(weights.uniform, target_class_weight(p, row));
    if (u.grad_entropy != 0 && probability != 0)
        by_score -= u.grad_entropy * probability * (log_p + u.entropy);
    return T(double(p.to_score.logit_scale) * by_score * p.to_score.slope(target_z));
}

// counted: whether the row is. own_target: the target's column where this thread writes its gradient,
// else -1.
template <class S, Scoring scoring>
__device__ GradientFactors<S> gradient_factors(const Problem<S, scoring>& p, int64_t row,
                                               bool counted, int64_t own_target,
                                               Lse<compute_t<S>> lse, compute_t<S> target_z,
                                               const RowUpstream& u) {
    using T = compute_t<S>;
    const auto weights = gradient_weights(p, row, counted, lse, u);
    const ExpBelow<S> exp_below(lse.high);
    const double scale = p.to_score.logit_scale;
    const double exp_scale = scale * exp(-lse.low) * exp_below.missing(lse.high);
    return {
        .own_target = own_target,
        .target_gradient =
            own_target < 0 ? T(0) : target_gradient(p, row, lse, target_z, weights, u),
        .exp_below = exp_below,
        .of_exp = T(exp_scale * (weights.target + weights.softmax)),
        .of_coefficient = T(scale * weights.uniform),
        .of_entropy = T(-exp_scale * u.grad_entropy),
        .entropy_offset = T(u.entropy - lse.low),
    };
}

// The gradient of n logits, except that of the target, which write_target_gradient writes over it.
template <bool has_uniform, bool through_entropy = false, class S, Scoring scoring, int n>
__device__ Elements<S, n> gradient_at(const Problem<S, scoring>& p, int64_t row, int64_t column,
                                      const Elements<S, n>& x, Lse<compute_t<S>> lse,
                                      const GradientFactors<S>& f) {
    using T = compute_t<S>;
    T z[n], grad[n];
    to_scores(p.to_score, x, z);
#pragma unroll
    for (int i = 0; i < n; ++i) {
        T of_exp = f.of_exp;
        if constexpr (through_entropy) {
            const T log_p = fmax(z[i] - lse.high, T(kLogOfZero));
            of_exp += rounded_product(f.of_entropy, log_p + f.entropy_offset);
        }
        grad[i] = rounded_product(of_exp, f.exp_below(z[i]));
    }
    // Of an ignored row the factor is 0, and the probabilities may be NaN.
    if (has_uniform && (!through_entropy || f.of_coefficient != 0)) {
        T a[n];
        coefficients(p, row, column, a);
#pragma unroll
        for (int i = 0; i < n; ++i) grad[i] -= rounded_product(f.of_coefficient, a[i]);
    }
#pragma unroll
    for (int i = 0; i < n; ++i) grad[i] *= p.to_score.slope(z[i]);
    return narrowed<S>(grad);
}

// Called when the thread has written all else, in whose order this store stands.
template <class S>
__device__ void write_target_gradient(const GradientFactors<S>& f, S* out) {
    if (f.own_target >= 0) narrow(f.target_gradient, out[f.own_target]);
}

template <int in_flight, bool has_uniform, bool through_entropy = false, class S, Scoring scoring>
__device__ void write_gradient(const Problem<S, scoring>& p, int64_t row, Lse<compute_t<S>> lse,
                               const GradientFactors<S>& f, S* out, bool aligned) {
    const auto write = [&]<int n>(int64_t column, const Elements<S, n>& x) {
        const auto gradient = gradient_at<has_uniform, through_entropy>(p, row, column, x, lse, f);
        store(out + column, gradient, aligned);
    };
    for_each_in_row<in_flight>(logits_row(p, row), p.vocab, write);
    write_target_gradient(f, out);
}

// Separate loops, so that the one that most calls take contains no code of the others.
template <int in_flight, class S, Scoring scoring>
__device__ void row_gradient(const Problem<S, scoring>& p, int64_t row, Lse<compute_t<S>> lse,
                             const GradientFactors<S>& f, S* out) {
    const bool aligned = same_alignment<S>(out, logits_row(p, row));
    if (f.of_entropy != 0)
        write_gradient<kLoadsInFlightSecondPass, true, true>(p, row, lse, f, out, aligned);
    else if (f.of_coefficient != 0) write_gradient<in_flight, true>(p, row, lse, f, out, aligned);
    else if (aligned) write_gradient<in_flight, false>(p, row, lse, f, out, true);
    else write_gradient<kLoadsInFlightSecondPass, false>(p, row, lse, f, out, false);
}

}  // namespace
}  // namespace neglog
