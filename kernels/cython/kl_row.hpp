// One row of a student's logits against its teacher: the loss and its gradient.
//
//     loss = token_weight (soft_weight D(z / temperature, teacher) + hard_weight (lse(z) - z_t))
//
// with the divergence D of divergence.hpp, z the logits after scale and cap, and t the target.
//
// (a) Numbers of any type in memory are brought to a block in L1 as T, the type computed with, so
//     that there is one code for all pairs of types. A row is read three times, the last two from
//     L2: its log-sum-exps, then the divergence, then the gradient.
// (b) A teacher of some classes is a distribution over count + 1 bins: those classes, and all
//     others as one. The student's is that of its scores of them, and of the log-sum-exp of all
//     others as the score of the last bin. So D and its gradient by these scores are those of any
//     two distributions; that of the last bin goes on to its classes by their softmax.
// (c) The log-sum-exp of the others leaves the named classes out, as -inf in a copy of the block.
//     Subtracted from the whole row's it would have no digits where they hold nearly all of it.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "divergence.hpp"
#include "kl_problem.hpp"
#include "row.hpp"

namespace neglog {

constexpr ptrdiff_t kTaughtBlock = 1024;  // five blocks of floats fit in L1
// Log-probabilities in 16 bits may sum to somewhat more than 1.
constexpr double kLargestMass = 1.05;

template <class T>
constexpr int kDTypeOf = std::is_same<T, double>::value ? kFloat64 : kFloat32;

// n numbers of any type in memory as T: where they are, or else in `buffer`.
template <class T>
inline const T* as_numbers(const char* from, int dtype, ptrdiff_t start, ptrdiff_t n, T* buffer) {
    if (dtype == kDTypeOf<T>) return reinterpret_cast<const T*>(from) + start;
    of_dtype(dtype, [&](auto memory) {
        using M = decltype(memory);
        const M* x = reinterpret_cast<const M*>(from) + start;
        if constexpr (std::is_same<RealOf<M>, T>::value) {
            block_widen(x, n, buffer);
        } else {
#pragma omp simd
            for (ptrdiff_t j = 0; j < n; ++j) buffer[j] = T(widen(x[j]));
        }
    });
    return buffer;
}

// Where they will be read a while after those at `start`.
template <class T>
inline const T* ahead_of_numbers(const char* from, int dtype, ptrdiff_t start) {
    const ptrdiff_t size = dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
    return reinterpret_cast<const T*>(from + start * size + kAheadBytes);
}

// x += scale * softmax(z)
template <class T>
inline void block_add_softmax(T* x, const T* z, ptrdiff_t n, Lse<T> lse, T scale) {
#pragma omp simd
    for (ptrdiff_t j = 0; j < n; ++j) x[j] += scale * exp_nonpositive(log_probability(z[j], lse));
}

// The classes that a teacher names, in ascending order, and the bins of (b).
template <class T>
struct Named {
    std::vector<ptrdiff_t> column;
    std::vector<ptrdiff_t> start;  // of each block's in `column`, and their end
    std::vector<T> student, teacher, gradient;  // of each column, and then of the others

    ptrdiff_t count() const { return ptrdiff_t(column.size()); }
};

template <class T>
class TaughtRow {
  public:
    TaughtRow(const KlProblem& problem, ptrdiff_t row, Named<T>& named)
        : p(problem),
          row(row),
          named(named),
          token_weight(p.token_weight ? static_cast<const T*>(p.token_weight)[row] : T(1)),
          ignored(p.target[row] == p.ignore_index || token_weight == 0) {}

    void forward(const KlOutput& o) {
        if (!ignored && p.ids && !read_named()) {
            *o.invalid = row;
            ignored = true;
        }
        double soft = 0, hard = 0;
        if (!ignored) {
            find_log_sums();
            if (p.soft_weight != 0) divergence = find_divergence();
            soft = divergence.value;
            if (p.hard_weight != 0) hard = -target_log_p();
        }
        write(o.loss, ignored ? 0 : token_weight * (weighted(p.soft_weight, soft) +
                                                    weighted(p.hard_weight, hard)));
        write(o.divergence, soft);
        write(o.cross_entropy, hard);
    }

    // After forward.
    void backward(const KlGradient& g) {
        const double given = g.grad ? static_cast<const T*>(g.grad)[row * g.grad_stride] : 1;
        const double upstream = given * g.grad_scale * token_weight;
        soft_scale = T(upstream * p.soft_weight / p.temperature);
        hard_scale = T(upstream * p.hard_weight);
        if (!ignored && p.ids) find_gradient_of_bins();
        if (!ignored && can_be_in_registers()) {
            gradient_in_registers(g);
            return;
        }
        for (ptrdiff_t block = 0; block < blocks(); ++block) {
            const Span span = block_span(block);
            if (ignored)
                std::fill(gradient, gradient + span.n, T(0));
            else
                gradient_of_block(block, span);
            store(g, span);
        }
    }

  private:
    const KlProblem& p;
    const ptrdiff_t row;
    Named<T>& named;
    const T token_weight;
    bool ignored;
    T soft_scale = 0, hard_scale = 0;
    Divergence divergence;
    Lse<T> of_student = {0, 0};  // of the soft scores; of a teacher of some classes, of the bins
    Lse<T> of_others = {0, 0};   // the score of the last bin
    Lse<T> of_teacher = {0, 0};
    Lse<T> of_hard = {0, 0};     // of the scores without the temperature
    // Blocks in L1, not cleared
    T z[kTaughtBlock], soft[kTaughtBlock], t[kTaughtBlock], slope[kTaughtBlock];
    T gradient[kTaughtBlock], without_named[kTaughtBlock];

    static double weighted(double weight, double value) { return weight == 0 ? 0 : weight * value; }

    void write(void* to, double value) const {
        if (to) static_cast<T*>(to)[row] = T(value);
    }

    ptrdiff_t blocks() const { return (p.vocab + kTaughtBlock - 1) / kTaughtBlock; }

    Span block_span(ptrdiff_t block) const {
        return {block * kTaughtBlock, std::min(kTaughtBlock, p.vocab - block * kTaughtBlock)};
    }

    bool is_tempered() const { return p.temperature != 1; }

    // Reading a block

    // The scores without the temperature, and with a softcap their slopes.
    const T* scores_of(Span span, bool slopes = false) {
        const T* x = as_numbers(p.logits, p.dtype, at(span), span.n, z);
        return to_scores(x, span.n, p.logit_scale, p.softcap, z, slopes);
    }

    ptrdiff_t at(Span span) const { return row * p.logits_stride + span.start; }

    const T* to_scores(const T* x, ptrdiff_t n, double scale, double softcap, T* to, bool slopes) {
        if (scale == 1 && softcap == 0) return x;
        const T factor = T(scale);
#pragma omp simd
        for (ptrdiff_t j = 0; j < n; ++j) to[j] = x[j] * factor;
        if (softcap != 0 && slopes)
            block_softcap_and_slope(to, n, T(softcap), slope);
        else if (softcap != 0)
            block_softcap(to, n, T(softcap));
        return to;
    }

    // Those with the temperature.
    const T* softened(const T* scores, ptrdiff_t n) {
        if (!is_tempered()) return scores;
        const T inverse = T(1 / p.temperature);
#pragma omp simd
        for (ptrdiff_t j = 0; j < n; ++j) soft[j] = scores[j] * inverse;
        return soft;
    }

    const T* teacher_of(Span span) {
        const T* x = as_numbers(p.teacher, p.teacher_dtype, teacher_at(span), span.n, t);
        if (p.probabilities) {
#pragma omp simd
            for (ptrdiff_t j = 0; j < span.n; ++j) t[j] = log_nonnegative(x[j]);
            x = t;
        }
        return to_scores(x, span.n, p.teacher_scale, p.teacher_softcap, t, false);
    }

    ptrdiff_t teacher_at(Span span) const { return row * p.teacher_stride + span.start; }

    // A score without the temperature.
    T score_at(ptrdiff_t column) { return scores_of({column, 1})[0]; }

    T target_log_p() { return log_probability(score_at(p.target[row]), of_hard); }

    // Named classes

    // False if these are no distribution over classes. One of probability 0 is left to the others.
    bool read_named() {
        const int64_t* ids = p.ids + row * p.count;
        const ptrdiff_t start = row * p.teacher_stride;
        named.gradient.resize(p.count);  // before there is one, room for numbers of other types
        const T* logs =
            as_numbers(p.teacher, p.teacher_dtype, start, p.count, named.gradient.data());
        const double mass = block_sum_of<double>(
            p.count, [=](ptrdiff_t k) { return exp_nonpositive(std::min(double(logs[k]), 1.0)); });
        if (mass > kLargestMass || !sort_named(ids, logs)) return false;
        const bool others = named.count() < p.vocab;  // else what the sum lacks is its rounding
        named.teacher.push_back(T(log_nonnegative(others ? std::max(1 - mass, 0.0) : 0.0)));
        return true;
    }

    static bool is_named(T log) { return log != -std::numeric_limits<T>::infinity(); }

    // By blocks, whose classes are counted, and within each by insertion. False if one is no class,
    // or is named twice.
    bool sort_named(const int64_t* ids, const T* logs) {
        named.start.assign(blocks() + 1, 0);
        ptrdiff_t count = 0;
        for (ptrdiff_t k = 0; k < p.count; ++k) {
            if (!is_named(logs[k])) continue;
            if (ids[k] < 0 || ids[k] >= p.vocab) return false;
            ++named.start[ids[k] / kTaughtBlock + 1];
            ++count;
        }
        for (ptrdiff_t b = 0; b < blocks(); ++b) named.start[b + 1] += named.start[b];
        named.column.assign(count, -1);
        named.teacher.resize(count);
        for (ptrdiff_t k = 0; k < p.count; ++k)
            if (is_named(logs[k]) && !insert(ids[k], logs[k])) return false;
        return true;
    }

    // Into its block's part of `column`, whose free places at its end are -1.
    bool insert(ptrdiff_t column, T log) {
        ptrdiff_t place = named.start[column / kTaughtBlock];
        while (named.column[place] >= 0 && named.column[place] < column) ++place;
        if (named.column[place] == column) return false;
        for (; column >= 0; ++place) {
            std::swap(named.column[place], column);
            std::swap(named.teacher[place], log);
        }
        return true;
    }

    // Calls visit(k, j) for each named class k of a block, in its column j.
    template <class Visit>
    void for_named(ptrdiff_t block, Visit visit) const {
        for (ptrdiff_t k = named.start[block]; k < named.start[block + 1]; ++k)
            visit(k, named.column[k] - block * kTaughtBlock);
    }

    Scores<T> bins() const {
        return {named.student.data(), named.teacher.data(), of_student, Lse<T>{0, 0}};
    }

    // Forward

    void find_log_sums() {
        LseState<T> student, teacher, hard;
        if (p.ids) named.student.resize(named.count() + 1);
        for (ptrdiff_t block = 0; block < blocks(); ++block) {
            const Span span = block_span(block);
            const T* scores = scores_of(span);
            const T* ahead = ahead_of_numbers<T>(p.logits, p.dtype, at(span));
            if (has_hard_sum()) update(hard, scores, span.n, ahead);
            const T* of_soft = softened(scores, span.n);
            if (p.ids) {
                add_others(student, block, of_soft, span.n, ahead);
                continue;
            }
            update(student, of_soft, span.n, ahead);
            update(teacher, teacher_of(span), span.n,
                   ahead_of_numbers<T>(p.teacher, p.teacher_dtype, teacher_at(span)));
        }
        of_student = finish(student);
        if (p.ids)
            find_bins();
        else
            of_teacher = finish(teacher);
        of_hard = has_hard_sum() ? finish(hard) : of_student;
    }

    // Whether the cross-entropy needs a log-sum-exp of its own.
    bool has_hard_sum() const { return p.hard_weight != 0 && (is_tempered() || p.ids); }

    // Adds a block without its named classes, whose scores are kept. Registers that hold one are
    // copied, with -inf in its place: to copy the block took a tenth of a row's time.
    void add_others(LseState<T>& state, ptrdiff_t block, const T* of_soft, ptrdiff_t n,
                    const T* ahead) {
        constexpr ptrdiff_t width = kWidth<T>;
        const T* registers[kTaughtBlock / width];
        for (ptrdiff_t r = 0; r * width < n; ++r) registers[r] = of_soft + r * width;
        for_named(block, [&](ptrdiff_t k, ptrdiff_t j) {
            const ptrdiff_t r = j / width, first = r * width;
            T* copy = without_named + first;
            if (registers[r] != copy) {
                std::copy(of_soft + first, of_soft + std::min(first + width, n), copy);
                registers[r] = copy;
            }
            named.student[k] = of_soft[j];
            copy[j - first] = -std::numeric_limits<T>::infinity();
        });
        update(state, Scattered<T>{registers}, n, ahead);
    }

    // The scores of the bins, less the largest. The last one's is two numbers, of which the first
    // alone would be off by 5e-4 near 1e4; less that, a score that is 1e4 above it would be.
    void find_bins() {
        of_others = of_student;
        T shift = of_others.high;
        for (ptrdiff_t k = 0; k < named.count(); ++k) shift = std::fmax(shift, named.student[k]);
        if (!std::isfinite(shift)) shift = 0;
        for (T& score : named.student) score -= shift;
        const bool finite = std::isfinite(of_others.high);
        named.student[named.count()] =
            finite ? (of_others.high - shift) + of_others.low : of_others.high;
        LseState<T> state;
        update(state, named.student.data(), named.count() + 1);
        of_student = finish(state);
    }

    Divergence find_divergence() {
        if (p.ids) return block_divergence(bins(), named.count() + 1, p.beta);
        Divergence sum;
        for (ptrdiff_t block = 0; block < blocks(); ++block) {
            const Span span = block_span(block);
            const T* of_soft = softened(scores_of(span), span.n);
            const Divergence part =
                block_divergence(both(of_soft, teacher_of(span)), span.n, p.beta);
            sum.value += part.value;
            sum.offset += part.offset;
        }
        return sum;
    }

    Scores<T> both(const T* of_soft, const T* teacher) const {
        return {of_soft, teacher, of_student, of_teacher};
    }

    // Backward

    void find_gradient_of_bins() {
        named.gradient.resize(named.count() + 1);
        block_divergence_gradient(bins(), named.count() + 1, p.beta, divergence, soft_scale,
                                  named.gradient.data());
    }

    // Where it is a multiple of the others' softmax but for the named classes, and the scores are
    // the logits: by way of a block in L1 a row of 64 of 32000 took 15% longer.
    bool can_be_in_registers() const {
        if (!p.ids || hard_scale != 0 || is_tempered() || p.logit_scale != 1 || p.softcap != 0)
            return false;
        const T scale = named.gradient[named.count()];
        return std::isfinite(of_others.high) && std::isfinite(2 * scale);
    }

    void gradient_in_registers(const KlGradient& g) const {
        with_destination(g, {0, p.vocab}, [&](auto to) {
            using M = typename std::remove_pointer<decltype(to.out)>::type;
            const M* logits = reinterpret_cast<const M*>(p.logits) + row * p.logits_stride;
            ptrdiff_t k = 0;
            const auto patch = [&](ptrdiff_t j, ptrdiff_t end, Packed<M> packed) {
                if (k == named.count() || named.column[k] >= end) return packed;
                M numbers[kPacked<M>];
                neglog::store(packed, numbers);
                for (; k < named.count() && named.column[k] < end; ++k)
                    narrow(named.gradient[k], numbers[named.column[k] - j]);
                return load(numbers);
            };
            block_softmax(logits, p.vocab, of_others, named.gradient[named.count()], to, patch);
        });
    }

    void gradient_of_block(ptrdiff_t block, Span span) {
        const T* scores = scores_of(span, true);
        const T* of_soft = softened(scores, span.n);
        if (soft_scale == 0)
            std::fill(gradient, gradient + span.n, T(0));
        else if (p.ids)
            gradient_of_bins(block, span, of_soft);
        else
            block_divergence_gradient(both(of_soft, teacher_of(span)), span.n, p.beta, divergence,
                                      soft_scale, gradient);
        if (hard_scale != 0) add_cross_entropy(scores, span);
        if (p.softcap != 0) block_multiply(gradient, slope, span.n);
        if (p.logit_scale != 1) block_scale(gradient, span.n, T(p.logit_scale));
    }

    void gradient_of_bins(ptrdiff_t block, Span span, const T* of_soft) {
        if (std::isinf(of_others.high))  // the others are all impossible, or one is certain
            std::fill(gradient, gradient + span.n, T(0));
        else
            block_softmax(of_soft, span.n, of_others, named.gradient[named.count()], gradient);
        for_named(block, [&](ptrdiff_t k, ptrdiff_t j) { gradient[j] = named.gradient[k]; });
    }

    void add_cross_entropy(const T* scores, Span span) {
        const ptrdiff_t target = p.target[row] - span.start;
        const bool is_here = 0 <= target && target < span.n;
        const T before = is_here ? gradient[target] : T(0);
        block_add_softmax(gradient, scores, span.n, of_hard, hard_scale);
        if (!is_here) return;
        const double log_p = log_probability(scores[target], of_hard);
        gradient[target] = T(before + hard_scale * std::expm1(log_p));
    }

    void store(const KlGradient& g, Span span) const {
        with_destination(g, span, [&](auto to) { block_store(gradient, span.n, to); });
    }

    // Calls what(to) with where the columns of the gradient go; while they are written, those of
    // the next row's logits are brought into L2.
    template <class What>
    void with_destination(const KlGradient& g, Span span, What what) const {
        of_dtype(p.dtype, [&](auto memory) {
            using M = decltype(memory);
            if constexpr (std::is_same<RealOf<M>, T>::value) {
                M* out = reinterpret_cast<M*>(g.out) + row * g.stride + span.start;
                const ptrdiff_t next = std::min(row + 1, p.rows - 1) * p.logits_stride + span.start;
                what(Destination<M>{out, g.bypass_cache,
                                    reinterpret_cast<const M*>(p.logits) + next});
            }
        });
    }
};

// Rows `first` to `end`: forward, and backward if `g` has somewhere to write.
inline void taught_rows(const KlProblem& p, const KlOutput& o, const KlGradient& g, ptrdiff_t first,
                        ptrdiff_t end) {
    const auto run = [&](auto real) {
        using T = decltype(real);
        thread_local Named<T> named;  // its memory is kept
        for (ptrdiff_t row = first; row < end; ++row) {
            TaughtRow<T> each(p, row, named);
            each.forward(o);
            if (g.out) each.backward(g);
        }
    };
    if (p.dtype == kFloat64)
        run(double());
    else
        run(float());
    finish_streams();
}

}  // namespace neglog
