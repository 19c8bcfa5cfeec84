// One row of logits: its loss, its statistics and its gradient. The formulas stand in nll.pyx.
//
// (a) A row is read in blocks of 2048 numbers that stay in L1: their maximum, then their sum of
//     exps, which the online rule adds to the row's. One read of memory gives its log-sum-exp.
// (b) What needs the finished lse (label smoothing, probability targets, entropy) reads the row
//     again from L2. Accumulating it online would cancel at large logits, and the memory time of
//     the first read hides the second.
// (c) The gradient reads the row once more, from L2. Without logit scale, softcap, class weights
//     and probabilities it is formed in registers, else a block at a time in L1. exp is formed
//     twice: keeping the first in a buffer of a row took 15% longer.
// (d) A gradient larger than the caches is streamed past them: an ordinary store reads each line
//     before it writes it. While the gradient of a row is written its successor is brought into L2.
// (e) The target's own gradient is formed by expm1 of its log-probability: p - 1 would lose every
//     digit as p nears 1.
#pragma once

#include <algorithm>

#include "block.hpp"
#include "problem.hpp"

namespace neglog {

constexpr ptrdiff_t kBlock = 2048;
// Shorter rows are not streamed: the target's column is stored last, to a line that was streamed,
// and waits for memory. With rows of 512 bytes a gradient took 5 times as long.
constexpr ptrdiff_t kStreamedRowBytes = 16 << 10;

struct Span {  // columns start to start + n of a row
    ptrdiff_t start, n;
};

// The gradient of a row's scores, with p its probabilities and t the index of its target, is
//
//     softmax_weight p_c + target_weight (p_c - [c = t]) - uniform_weight b_c
//         + entropy_weight p_c (log p_c + entropy)
//
// where b_c = w_c; for a target of probabilities b_c = w_c q'_c and target_weight = 0.
struct GradientWeights {
    ptrdiff_t target;  // -1 if there is no index
    double target_weight, softmax_weight, uniform_weight;
    double entropy_weight, entropy;
};

// Of the target, without uniform_weight.
template <class T>
inline double target_gradient(const GradientWeights& weights, T log_p) {
    const T p = exp_nonpositive(log_p);
    const double gradient =
        weights.softmax_weight * p + weights.target_weight * std::expm1(double(log_p));
    if (weights.entropy_weight == 0 || p == 0) return gradient;
    return gradient + weights.entropy_weight * p * (log_p + weights.entropy);
}

// The upstream of one row.
struct RowUpstream {
    double grad, grad_lse, grad_entropy, entropy;
};

// M is the type in memory, T the type computed with.
template <class M>
class Row {
    using T = RealOf<M>;

  public:
    Row(const Problem& problem, ptrdiff_t row)
        : p(problem),
          row(row),
          logits(reinterpret_cast<const M*>(p.logits) + row * p.logits_stride),
          weight(static_cast<const T*>(p.weight)),
          token_weight(p.token_weight ? static_cast<const T*>(p.token_weight)[row] : T(1)),
          ignored((p.target && p.target[row] == p.ignore_index) || token_weight == 0),
          has_plain_scores(p.logit_scale == 1 && p.softcap == 0) {}

    // Writes the loss and the statistics; returns the log-sum-exp.
    Lse<T> forward(const Output& o) {
        Lse<T> lse = {0, 0};
        T maximum = 0;
        if (!ignored || o.correct || o.entropy || o.argmax) lse = log_sum_exp(maximum);
        double loss = 0;
        if (!ignored) loss = token_weight * (p.probs ? loss_of_probs(lse) : loss_of_index(lse));
        static_cast<T*>(o.loss)[row] = T(loss);
        if (o.lse) static_cast<T*>(o.lse)[row] = lse.high;
        if (o.lse_low) static_cast<T*>(o.lse_low)[row] = lse.low;
        if (o.correct || o.argmax) write_argmax(o, argmax(maximum, lse), maximum, lse);
        if (o.entropy) static_cast<T*>(o.entropy)[row] = T(entropy(lse));
        return lse;
    }

    // Writes the gradient. Meanwhile the logits from `ahead` on are brought into L2.
    void backward(const Gradient& g, Lse<T> lse, const RowUpstream& u, const M* ahead) {
        M* out = reinterpret_cast<M*>(g.out) + row * g.stride;
        Destination<M> to = {out, g.bypass_cache, ahead};
        const bool unused = u.grad_lse == 0 && u.grad_entropy == 0;
        if (ignored && (unused || !std::isfinite(lse.high))) {
            block_zero(p.vocab, to);  // even where the logits are NaN
            return;
        }
        to.bypass_cache &= p.vocab * ptrdiff_t(sizeof(M)) >= kStreamedRowBytes;
        const GradientWeights weights = gradient_weights(lse, u);
        const bool uniform_is_constant = !p.probs && !p.weight;
        if (has_plain_scores && (weights.uniform_weight == 0 || uniform_is_constant))
            gradient_in_registers(to, lse, weights);
        else
            gradient_by_blocks(to, lse, weights);
    }

    // The row that is read after this one if it counts, else this one.
    const M* next_row() const {
        const ptrdiff_t next = row + 1;
        const bool counts = next < p.rows && !(p.target && p.target[next] == p.ignore_index);
        return counts ? logits + p.logits_stride : logits;
    }

    const M* further_on() const { return ahead_of(logits); }

  private:
    const Problem& p;
    const ptrdiff_t row;
    const M* const logits;
    const T* const weight;
    const T token_weight;
    const bool ignored;
    const bool has_plain_scores;  // they are the logits
    // Blocks in L1, not cleared
    T z_buffer[kBlock], q_buffer[kBlock], slope[kBlock], gradient[kBlock];

    ptrdiff_t blocks() const { return (p.vocab + kBlock - 1) / kBlock; }

    Span block_span(ptrdiff_t block) const {
        return {block * kBlock, std::min(kBlock, p.vocab - block * kBlock)};
    }

    // Reading a block

    const T* as_real(const M* source, ptrdiff_t n, T* buffer) const {
        if constexpr (std::is_same<M, T>::value) return source;
        block_widen(source, n, buffer);
        return buffer;
    }

    // The logits after the scale. With a scale or a softcap they are in the buffer.
    const T* scaled_logits(Span span) {
        const T* z = as_real(logits + span.start, span.n, z_buffer);
        if (has_plain_scores) return z;
        const T scale = T(p.logit_scale);
#pragma omp simd
        for (ptrdiff_t j = 0; j < span.n; ++j) z_buffer[j] = z[j] * scale;
        return z_buffer;
    }

    // The scores z: the logits after scale and cap.
    const T* scores(Span span) {
        const T* z = scaled_logits(span);
        if (p.softcap != 0) block_softcap(z_buffer, span.n, T(p.softcap));
        return z;
    }

    // The same, and with a softcap its derivative in `slope`.
    const T* scores_and_slopes(Span span) {
        const T* z = scaled_logits(span);
        if (p.softcap != 0) block_softcap_and_slope(z_buffer, span.n, T(p.softcap), slope);
        return z;
    }

    T score_at(ptrdiff_t column) { return scores({column, 1})[0]; }

    // The weights w_c q'_c of the log-probabilities, for a target of probabilities.
    const T* coefficients(Span span) {
        const M* source = reinterpret_cast<const M*>(p.probs) + row * p.probs_stride + span.start;
        const T* q = as_real(source, span.n, q_buffer);
        if (p.label_smoothing == 0 && !weight) return q;
        const T kept = T(1 - p.label_smoothing), uniform = T(p.label_smoothing / p.vocab);
#pragma omp simd
        for (ptrdiff_t j = 0; j < span.n; ++j) q_buffer[j] = q[j] * kept + uniform;
        if (weight) block_multiply(q_buffer, weight + span.start, span.n);
        return q_buffer;
    }

    double class_weight_of_target() const { return weight ? weight[p.target[row]] : 1; }

    // The sum over the row's blocks of term(span).
    template <class Term>
    double sum_of_blocks(Term term) const {
        double total = 0;
        for (ptrdiff_t block = 0; block < blocks(); ++block) total += term(block_span(block));
        return total;
    }

    // Forward

    Lse<T> log_sum_exp(T& maximum) {
        LseState<T> state;
        for (ptrdiff_t block = 0; block < blocks(); ++block) {
            const Span span = block_span(block);
            if (has_plain_scores)
                update(state, logits + span.start, span.n);
            else
                update(state, scores(span), span.n);
        }
        maximum = state.maximum;
        return finish(state);
    }

    double loss_of_index(Lse<T> lse) {
        const double w = class_weight_of_target(), eps = p.label_smoothing;
        double loss = -(1 - eps) * w * log_probability(score_at(p.target[row]), lse);
        if (eps != 0)
            loss -= eps / p.vocab * sum_of_blocks([&](Span span) {
                const T* z = scores(span);
                return weight ? block_log_probability_dot(z, weight + span.start, span.n, lse)
                              : block_log_probability_sum(z, span.n, lse);
            });
        if (p.z_loss != 0) loss += p.z_loss * w * (double(lse.high) * lse.high);
        return loss;
    }

    double loss_of_probs(Lse<T> lse) {
        const double total = sum_of_blocks([&](Span span) {
            return block_log_probability_dot(scores(span), coefficients(span), span.n, lse);
        });
        if (p.z_loss != 0) return p.z_loss * (double(lse.high) * lse.high) - total;
        return -total;
    }

    double entropy(Lse<T> lse) {
        return -sum_of_blocks(
            [&](Span span) { return block_negative_entropy(scores(span), span.n, lse); });
    }

    // As torch has it: the first column with a NaN, or else with the maximum.
    ptrdiff_t argmax(T maximum, Lse<T> lse) {
        if (std::isnan(lse.high)) {
            const ptrdiff_t column = find([](T z) { return z != z; });
            if (column < p.vocab) return column;
        }
        const ptrdiff_t column = find([=](T z) { return z == maximum; });
        return column < p.vocab ? column : 0;
    }

    // The first column whose score is such a one; V for none.
    template <class Is>
    ptrdiff_t find(Is is) {
        for (ptrdiff_t block = 0; block < blocks(); ++block) {
            const Span span = block_span(block);
            const ptrdiff_t j = block_find(scores(span), span.n, is);
            if (j < span.n) return span.start + j;
        }
        return p.vocab;
    }

    void write_argmax(const Output& o, ptrdiff_t column, T maximum, Lse<T> lse) const {
        if (o.argmax) o.argmax[row] = column;
        if (!o.correct) return;
        const bool nan_among_finite =
            std::isnan(lse.high) && maximum < std::numeric_limits<T>::infinity();
        o.correct[row] = p.target && !ignored && !nan_among_finite && p.target[row] == column;
    }

    // Backward

    GradientWeights gradient_weights(Lse<T> lse, const RowUpstream& u) {
        const double grad = u.grad * token_weight;
        GradientWeights weights = {-1, 0, u.grad_lse, 0, -u.grad_entropy, u.entropy};
        if (ignored) return weights;
        const double eps = p.label_smoothing;
        double w = 1;
        if (p.probs) {
            weights.uniform_weight = grad;
            weights.softmax_weight += grad * sum_of_blocks([&](Span span) {
                return block_sum(coefficients(span), span.n);
            });
        } else {
            w = class_weight_of_target();
            weights.target = p.target[row];
            weights.target_weight = grad * (1 - eps) * w;
            weights.uniform_weight = eps != 0 ? grad * eps / p.vocab : 0;
            weights.softmax_weight += weights.uniform_weight * p.weight_sum;
        }
        if (p.z_loss != 0) weights.softmax_weight += grad * 2 * p.z_loss * w * lse.high;
        return weights;
    }

    // Of plain scores, where b_c is 1.
    void gradient_in_registers(Destination<M> to, Lse<T> lse, const GradientWeights& weights) {
        const T scale = T(weights.target_weight + weights.softmax_weight);
        const T uniform = T(weights.uniform_weight);
        T log_p = 0;  // before the row is written: `to` may be where the logits are
        if (weights.target >= 0) log_p = log_probability(widen(logits[weights.target]), lse);
        if (weights.entropy_weight == 0)
            block_softmax(logits, p.vocab, lse, scale, uniform, to);
        else
            block_entropy_gradient(logits, p.vocab, lse, scale, T(weights.entropy_weight),
                                   weights.entropy, uniform, to);
        if (weights.target >= 0)
            narrow(T(target_gradient(weights, log_p)) - uniform, to.out[weights.target]);
    }

    void gradient_by_blocks(Destination<M> to, Lse<T> lse, const GradientWeights& weights) {
        for (ptrdiff_t block = 0; block < blocks(); ++block) {
            const Span span = block_span(block);
            gradient_of_block(span, lse, weights);
            block_store(gradient, span.n, to.from(span.start));
        }
    }

    void gradient_of_block(Span span, Lse<T> lse, const GradientWeights& weights) {
        const T* z = scores_and_slopes(span);
        const T scale = T(weights.target_weight + weights.softmax_weight);
        if (weights.entropy_weight == 0)
            block_softmax(z, span.n, lse, scale, gradient);
        else
            block_entropy_gradient(z, span.n, lse, scale, T(weights.entropy_weight),
                                   weights.entropy, T(0), Destination<T>::in_cache(gradient));
        const ptrdiff_t target = weights.target - span.start;
        if (0 <= target && target < span.n)
            gradient[target] = T(target_gradient(weights, log_probability(z[target], lse)));
        if (weights.uniform_weight != 0) subtract_uniform(span, T(weights.uniform_weight));
        if (p.softcap != 0) block_multiply(gradient, slope, span.n);
        if (p.logit_scale != 1) block_scale(gradient, span.n, T(p.logit_scale));
    }

    // Subtracts uniform_weight b_c.
    void subtract_uniform(Span span, T uniform_weight) {
        if (p.probs)
            block_subtract(gradient, coefficients(span), span.n, uniform_weight);
        else if (weight)
            block_subtract(gradient, weight + span.start, span.n, uniform_weight);
        else
            block_subtract(gradient, span.n, uniform_weight);
    }
};

// For the type in memory

template <class M>
inline Lse<RealOf<M>> saved_lse(const Upstream& u, ptrdiff_t row) {
    using T = RealOf<M>;
    return {static_cast<const T*>(u.lse)[row], static_cast<const T*>(u.lse_low)[row]};
}

template <class M>
inline void backward_of(const Problem& p, const Gradient& g, const Upstream& u, ptrdiff_t row) {
    using T = RealOf<M>;
    const auto number = [row](const void* of_rows) -> double {
        return of_rows ? static_cast<const T*>(of_rows)[row] : 0;
    };
    const double grad = static_cast<const T*>(u.grad)[row * u.grad_stride] * u.grad_scale;
    const RowUpstream of_row = {grad, number(u.grad_lse), number(u.grad_entropy),
                                number(u.entropy)};
    Row<M> each(p, row);
    each.backward(g, saved_lse<M>(u, row), of_row, each.further_on());
}

template <class M>
inline void forward_backward_of(const Problem& p, const Output& o, const Gradient& g,
                                double grad_scale, ptrdiff_t row) {
    Row<M> each(p, row);
    each.backward(g, each.forward(o), {grad_scale, 0, 0, 0}, each.next_row());
}

// Calls what(M()) for the type M of a dtype.
template <class What>
inline void of_dtype(int dtype, What what) {
    switch (dtype) {
        case kFloat32: return what(float());
        case kFloat64: return what(double());
        case kBFloat16: return what(bfloat16());
        case kFloat16: return what(float16());
    }
}

inline void row_forward(const Problem& p, const Output& o, ptrdiff_t row) {
    of_dtype(p.dtype, [&](auto memory) { Row<decltype(memory)>(p, row).forward(o); });
}

inline void row_backward(const Problem& p, const Gradient& g, const Upstream& u, ptrdiff_t row) {
    of_dtype(p.dtype, [&](auto memory) { backward_of<decltype(memory)>(p, g, u, row); });
}

inline void row_forward_backward(const Problem& p, const Output& o, const Gradient& g,
                                 double grad_scale, ptrdiff_t row) {
    of_dtype(p.dtype, [&](auto memory) {
        forward_backward_of<decltype(memory)>(p, o, g, grad_scale, row);
    });
}

// The sum of numbers of type double, or else float. In order, 200,000 losses of rows took as long as
// two classes of them.
inline double sum_of(const void* numbers, ptrdiff_t n, int dtype) {
    return dtype == kFloat64 ? block_sum(static_cast<const double*>(numbers), n)
                             : block_sum(static_cast<const float*>(numbers), n);
}

// How many targets are not ignored; -1 if one of these is no class.
inline ptrdiff_t count_targets(const int64_t* target, ptrdiff_t n, ptrdiff_t vocab,
                               int64_t ignore_index) {
    int64_t counted = 0, outside = 0;
#pragma omp simd reduction(+ : counted) reduction(| : outside)
    for (ptrdiff_t i = 0; i < n; ++i) {
        const int64_t t = target[i], counts = t != ignore_index;
        counted += counts;
        outside |= counts & (int64_t(t < 0) | int64_t(t >= vocab));
    }
    return outside ? -1 : counted;
}

}  // namespace neglog
