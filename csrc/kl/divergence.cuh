// The divergence of two distributions, and its gradient, for some classes at a time.
//
// Of the student's p and the teacher's q, with m = beta q + (1 - beta) p:
//
//     beta 0        KL(q | p)                              gradient of the student's scores  p - q
//     beta 1        KL(p | q) = D                          p (log p - log q - D)
//     between them  beta KL(q | m) + (1 - beta) K          (1 - beta) p (log(p / m) - K)
//
// where K = KL(p | m). 0 log 0 is 0, so a class that both call impossible adds nothing.
//
// All are formed of d = log q - log p, and d of the difference of the scores: where p is close to q,
// that of two rounded log-probabilities would have few digits.

#pragma once

#include "common/online_softmax.cuh"

namespace neglog {
namespace {

enum class Kind { forward, reverse, between };

// Of the classes seen so far: the sums of q log(q / p), or q log(q / m), and of p log(p / q), or
// p log(p / m). Kind::between forms both, the others one.
struct DivergenceSums {
    double of_teacher, of_student;
};

struct Divergence {
    double value, offset;  // the second is D or K above, which the gradient needs
};

// The log-sum-exps of a row's scores, and the teacher's less the student's.
template <class T>
struct LogSums {
    Lse<T> student, teacher, difference;

    // Of a class with the scores z and t: log p, log q and d.
    __device__ T log_p(T z) const { return log_probability(z, student); }
    __device__ T log_q(T t) const { return log_probability(t, teacher); }
    __device__ T log_q_over_p(T z, T t) const {
        const T d = t - z, back = d - t;
        const T lost = (t - (d - back)) - (z + back);  // Knuth's two-sum; NaN where d is not finite
        return (d - difference.high) + ((fabs(d) < INFINITY ? lost : T(0)) - difference.low);
    }
};

template <class T>
__device__ LogSums<T> log_sums(Lse<T> student, Lse<T> teacher) {
    const double difference = (double(teacher.high) - student.high) + (teacher.low - student.low);
    const T high = T(difference);
    return {student, teacher, {high, T(difference - high)}};
}

template <class T>
struct OverMean {
    T log_p, log_q;  // log(p / m), log(q / m)
};

// The log of m alone would lose its digits where p is close to q. With l the larger and s the smaller
// of p and q, log(l / m) = -log(1 + share_of_s (s / l - 1)).
template <class T>
__device__ OverMean<T> over_mean(T d, T beta) {
    const bool teacher_is_larger = d > 0;
    const T share_of_smaller = teacher_is_larger ? 1 - beta : beta;
    const T of_larger = -log1p(share_of_smaller * expm1(-fabs(d)));
    return teacher_is_larger ? OverMean<T>{of_larger - d, of_larger}
                             : OverMean<T>{of_larger, of_larger + d};
}

// p times x, 0 where p is 0.
template <class T>
__device__ T weighed(T p, T x) {
    return p == 0 ? T(0) : p * x;
}

// p - q; of two impossible classes d is NaN.
template <class T>
__device__ T difference(T log_p, T log_q, T d) {
    if (log_p == -INFINITY && log_q == -INFINITY) return 0;
    const T of_larger = expm1(-fabs(d));  // (s - l) / l
    return d > 0 ? exp(log_q) * of_larger : -exp(log_p) * of_larger;
}

template <class T>
struct Measure {
    Kind kind;
    double beta;

    // Adds n classes, whose scores are z and t, to the sums: in T over the n, and the rest in double.
    template <int n>
    __device__ void add(const LogSums<T>& of, const T (&z)[n], const T (&t)[n],
                        DivergenceSums& sums) const {
        T of_teacher = 0, of_student = 0;
        switch (kind) {
            case Kind::forward:
#pragma unroll
                for (int i = 0; i < n; ++i)
                    of_teacher += weighed(exp(of.log_q(t[i])), of.log_q_over_p(z[i], t[i]));
                break;
            case Kind::reverse:
#pragma unroll
                for (int i = 0; i < n; ++i)
                    of_student += weighed(exp(of.log_p(z[i])), -of.log_q_over_p(z[i], t[i]));
                break;
            case Kind::between:
#pragma unroll
                for (int i = 0; i < n; ++i) {
                    const auto over = over_mean(of.log_q_over_p(z[i], t[i]), T(beta));
                    of_teacher += weighed(exp(of.log_q(t[i])), over.log_q);
                    of_student += weighed(exp(of.log_p(z[i])), over.log_p);
                }
        }
        sums.of_teacher += of_teacher;
        sums.of_student += of_student;
    }

    // Of all classes. Each thread of the block brings its own sums.
    __device__ Divergence divergence(const DivergenceSums& own) const {
        const double of_teacher = kind == Kind::reverse ? 0 : block_sum(own.of_teacher);
        if (kind == Kind::forward) return {of_teacher, 0};
        const double of_student = block_sum(own.of_student);
        if (kind == Kind::reverse) return {of_student, of_student};
        return {beta * of_teacher + (1 - beta) * of_student, of_student};
    }

    // `scale` times the gradient of n scores z of the student.
    template <int n>
    __device__ void gradient(const LogSums<T>& of, const T (&z)[n], const T (&t)[n],
                             const Divergence& of_row, T scale, T (&out)[n]) const {
        const T offset = T(of_row.offset);
        switch (kind) {
            case Kind::forward:
#pragma unroll
                for (int i = 0; i < n; ++i)
                    out[i] = scale * difference(of.log_p(z[i]), of.log_q(t[i]),
                                                of.log_q_over_p(z[i], t[i]));
                break;
            case Kind::reverse:
#pragma unroll
                for (int i = 0; i < n; ++i)
                    out[i] =
                        scale * weighed(exp(of.log_p(z[i])), -of.log_q_over_p(z[i], t[i]) - offset);
                break;
            case Kind::between:
#pragma unroll
                for (int i = 0; i < n; ++i) {
                    const auto over = over_mean(of.log_q_over_p(z[i], t[i]), T(beta));
                    out[i] =
                        scale * T(1 - beta) * weighed(exp(of.log_p(z[i])), over.log_p - offset);
                }
        }
    }
};

}  // namespace
}  // namespace neglog
