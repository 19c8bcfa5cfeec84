// One row of a student's logits against its teacher, computed by one thread block: the loss and its
// gradient.
//
//     loss = token_weight (soft_weight D(z / temperature, teacher) + hard_weight (lse(z) - z_t))
//
// with the divergence D of divergence.cuh, z = softcap tanh(logit_scale logits / softcap) and t the
// target. The row is ignored where t is ignore_index or the token weight 0.
//
// (a) Three passes: the log-sum-exps, the divergence, the gradient. The first reads the student's
//     row and then the teacher's, each in its own vectors with several loads in flight. The others
//     find both in a cache, and go by the vectors of the student.
// (b) Numbers are computed in compute_t of the logits. The teacher's dtype is asked for at run time,
//     once for its row in the first pass, and for each vector in the others, where arithmetic takes
//     the time: a kernel for each pair of dtypes would be 16 of them.
// (c) exp is the accurate one for 16 bits too. Where the student is close to the teacher, the
//     divergence and its gradient are differences much smaller than what is subtracted.
// (d) A gradient written in place: a thread writes only elements that it has just read itself,
//     after a barrier behind all other reads of the row.

#pragma once

#include "common/rows.cuh"
#include "kl/divergence.cuh"

namespace neglog {
namespace {

// What the kernels are asked

enum class DType { float32, float64, bfloat16, float16 };

// From a number in memory to a score.
template <class T>
struct ToScore {
    T scale, softcap;  // softcap is 0 for none

    template <int n>
    __device__ void operator()(T (&z)[n]) const {
#pragma unroll
        for (int i = 0; i < n; ++i) z[i] = rounded_product(z[i], scale);
        if (softcap == 0) return;
#pragma unroll
        for (int i = 0; i < n; ++i) z[i] = rounded_product(softcap, tanh(z[i] / softcap));
    }

    // From the gradients of n scores z to those of the numbers.
    template <int n>
    __device__ void to_gradient_of_numbers(const T (&z)[n], T (&gradient)[n]) const {
        if (softcap != 0) {
#pragma unroll
            for (int i = 0; i < n; ++i) {
                const T ratio = z[i] / softcap;
                gradient[i] *= (1 - ratio) * (1 + ratio);  // 1 - tanh^2
            }
        }
#pragma unroll
        for (int i = 0; i < n; ++i) gradient[i] *= scale;
    }
};

// Scores (rows, vocab) or, with `probabilities`, probabilities; log-probabilities (rows, count) of
// named classes.
struct Teacher {
    const void* first;
    int64_t stride;
    DType dtype;
    bool probabilities;
};

template <class S>
struct Problem {
    using T = compute_t<S>;

    int64_t rows, vocab;
    const S* logits;
    int64_t logits_stride;
    Teacher teacher;
    const int64_t* ids;  // (rows, count), or null where the teacher is of all classes
    int64_t ids_stride, count;
    PerRow<int64_t> target;
    PerRow<T> token_weight;  // first is null for ones
    int64_t ignore_index;
    Measure<T> measure;
    ToScore<T> to_score, to_teacher_score;  // the second with the temperature in it
    T inverse_temperature;
    double temperature, soft_weight, hard_weight;
    bool has_hard_sum;  // whether the cross-entropy needs a log-sum-exp of its own
};

template <class T>
struct Output {
    T *loss, *divergence, *cross_entropy;
};

template <class S>
struct Gradient {
    S* first;  // null where none is formed
    int64_t stride;
    PerRow<compute_t<S>> upstream;  // first is null for ones
};

// Reading

template <class S>
__device__ compute_t<S> token_weight_of(const Problem<S>& p, int64_t row) {
    return p.token_weight.first ? p.token_weight[row] : compute_t<S>(1);
}

template <class S>
__device__ bool is_ignored(const Problem<S>& p, int64_t row) {
    return p.target[row] == p.ignore_index || token_weight_of(p, row) == 0;
}

template <class S>
__device__ const S* logits_row(const Problem<S>& p, int64_t row) {
    return p.logits + row * p.logits_stride;
}

template <class T, class M, int n>
__device__ void widen_to(const Elements<M, n>& x, T (&to)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = T(widen(x.value[i]));
}

// The scores of n logits, without the temperature.
template <class S, int n>
__device__ void to_scores(const Problem<S>& p, const Elements<S, n>& x, compute_t<S> (&z)[n]) {
    widen_to(x, z);
    p.to_score(z);
}

template <class S>
__device__ compute_t<S> score_at(const Problem<S>& p, int64_t row, int64_t column) {
    compute_t<S> z[1];
    to_scores(p, load<S, 1>(logits_row(p, row) + column, true), z);
    return z[0];
}

// Calls use(pointer), of the teacher's dtype, to the row's first number.
template <class Use>
__device__ void use_teacher(const Teacher& t, int64_t row, Use use) {
    const int64_t start = row * t.stride;
    switch (t.dtype) {
        case DType::float32: return use(static_cast<const float*>(t.first) + start);
        case DType::float64: return use(static_cast<const double*>(t.first) + start);
        case DType::bfloat16: return use(static_cast<const __nv_bfloat16*>(t.first) + start);
        case DType::float16: return use(static_cast<const __half*>(t.first) + start);
    }
}

// n numbers of the teacher's as T, by its own vectors where they lie so.
template <class S, class T, int n>
__device__ void teacher_numbers(const Problem<S>& p, int64_t row, int64_t column, T (&q)[n]) {
    use_teacher(p.teacher, row, [&]<class M>(const M* numbers) {
        constexpr int size = n < kVectorSize<M> ? 1 : kVectorSize<M>;
#pragma unroll
        for (int start = 0; start < n; start += size) {
            const M* from = numbers + column + start;
            const auto x = load<M, size>(from, is_aligned(from));
#pragma unroll
            for (int i = 0; i < size; ++i) q[start + i] = T(widen(x.value[i]));
        }
    });
}

// From the teacher's scores or probabilities to its scores with the temperature.
template <class S, int n>
__device__ void to_teacher_scores(const Problem<S>& p, compute_t<S> (&q)[n]) {
    if (p.teacher.probabilities) {
#pragma unroll
        for (int i = 0; i < n; ++i) q[i] = log(q[i]);
    }
    p.to_teacher_score(q);
}

// Log-sum-exps

struct Maximum {
    __device__ double operator()(double a, double b) const { return fmax(a, b); }
};

// Of the states of the block's threads, summed in double: where the student is close to the teacher,
// the divergence is smaller than what a float's sum is rounded by.
template <class T>
__device__ Lse<T> block_log_sum(const SoftmaxState<T>& own) {
    const double maximum = block_reduce(double(own.maximum), Maximum{});
    const T shift = shift_for(T(maximum));
    const double sum = block_sum(own.sum * exp(own.maximum - shift));
    const auto exact = finish(SoftmaxState<double>{maximum, sum});
    const T high = T(exact.high);
    return {high, T((exact.high - high) + exact.low)};
}

// Of the student's scores with the temperature, and without.
template <class T>
struct StudentSums {
    Lse<T> soft, hard;
};

// The scores with the temperature.
template <class S, class T, int n>
__device__ void soften(const Problem<S>& p, const T (&z)[n], T (&soft)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) soft[i] = rounded_product(z[i], p.inverse_temperature);
}

// change(column, z) may change the scores z with the temperature.
template <class S, class Change>
__device__ StudentSums<compute_t<S>> student_sums(const Problem<S>& p, int64_t row, Change change) {
    using T = compute_t<S>;
    RunningSoftmax<T> soft, hard;
    const auto add = [&]<int n>(int64_t column, const Elements<S, n>& x) {
        T z[n];
        to_scores(p, x, z);
        if (p.has_hard_sum) hard.add(z);
        soften(p, z, z);
        change(column, z);
        soft.add(z);
    };
    for_each_in_row<kLoadsInFlight<S>>(logits_row(p, row), p.vocab, add);
    const Lse<T> of_soft = block_log_sum(soft.state());
    if (!p.has_hard_sum) return {of_soft, of_soft};
    return {of_soft, block_log_sum(hard.state())};
}

template <class S>
__device__ Lse<compute_t<S>> teacher_sum(const Problem<S>& p, int64_t row) {
    using T = compute_t<S>;
    RunningSoftmax<T> running;
    use_teacher(p.teacher, row, [&]<class M>(const M* numbers) {
        const auto add = [&]<int n>(int64_t, const Elements<M, n>& x) {
            T q[n];
            widen_to(x, q);
            to_teacher_scores(p, q);
            running.add(q);
        };
        for_each_in_row<kLoadsInFlight<M>>(numbers, p.vocab, add);
    });
    return block_log_sum(running.state());
}

// Gradient

// What the gradient of a row is formed of.
template <class T>
struct Factors {
    T soft_scale;  // of the divergence's gradient by the scores with the temperature
    T hard_scale;  // of the cross-entropy's by the scores
    Lse<T> of_hard;
    int64_t target;
    T target_slope;  // p - 1, formed by expm1: p - 1 would lose all digits as p nears 1
};

// From the divergence's gradients of the scores z to the gradients of the logits.
template <class S, int n>
__device__ void to_gradient(const Problem<S>& p, const Factors<compute_t<S>>& f, int64_t column,
                            const compute_t<S> (&z)[n], compute_t<S> (&gradient)[n]) {
    if (f.hard_scale != 0) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const bool is_target = column + i == f.target;
            gradient[i] +=
                f.hard_scale * (is_target ? f.target_slope : exp(log_probability(z[i], f.of_hard)));
        }
    }
    p.to_score.to_gradient_of_numbers(z, gradient);
}

// of_soft(column, z, gradient) forms the divergence's gradients of the scores z with the
// temperature; where their scale is 0 it is not called, as they may be inf or NaN.
template <class S, class OfSoft>
__device__ void write_row_gradient(const Problem<S>& p, int64_t row, const Factors<compute_t<S>>& f,
                                   S* out, OfSoft of_soft) {
    const bool aligned = same_alignment<S>(out, logits_row(p, row));
    const auto write = [&]<int n>(int64_t column, const Elements<S, n>& x) {
        compute_t<S> z[n], soft[n], gradient[n] = {};
        to_scores(p, x, z);
        soften(p, z, soft);
        if (f.soft_scale != 0) of_soft(column, soft, gradient);
        to_gradient(p, f, column, z, gradient);
        store(out + column, narrowed<S>(gradient), aligned);
    };
    for_each_in_row<kLoadsInFlightSecondPass>(logits_row(p, row), p.vocab, write);
}

// A row whose teacher is of all classes. NamedRow in named.cuh has the same functions.
template <class S>
class ScoredRow {
    using T = compute_t<S>;

    const Problem<S>& p;
    const int64_t row;
    LogSums<T> sums;

    template <int n>
    __device__ void teacher_scores(int64_t column, T (&t)[n]) const {
        teacher_numbers(p, row, column, t);
        to_teacher_scores(p, t);
    }

public:
    __device__ ScoredRow(const Problem<S>& problem, int64_t row) : p(problem), row(row) {}

    // The first pass. Returns the log-sum-exp of the scores without the temperature.
    __device__ Lse<T> find_sums() {
        const auto student = student_sums(p, row, [](int64_t, auto&) {});
        sums = log_sums(student.soft, teacher_sum(p, row));
        return student.hard;
    }

    __device__ Divergence divergence() const {
        DivergenceSums of_thread = {0, 0};
        const auto add = [&]<int n>(int64_t column, const Elements<S, n>& x) {
            T z[n], t[n];
            to_scores(p, x, z);
            soften(p, z, z);
            teacher_scores(column, t);
            p.measure.add(sums, z, t, of_thread);
        };
        for_each_in_row<kLoadsInFlightSecondPass>(logits_row(p, row), p.vocab, add);
        return p.measure.divergence(of_thread);
    }

    __device__ void write_gradient(const Divergence& d, const Factors<T>& f, S* out) const {
        write_row_gradient(p, row, f, out,
                           [&]<int n>(int64_t column, const T(&z)[n], T(&gradient)[n]) {
                               T t[n];
                               teacher_scores(column, t);
                               p.measure.gradient(sums, z, t, d, f.soft_scale, gradient);
                           });
    }
};

}  // namespace
}  // namespace neglog
