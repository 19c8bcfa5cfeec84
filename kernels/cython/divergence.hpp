// The divergence of two distributions, and its gradient, a block of scores at a time.
//
// Of the student's p and the teacher's q, with m = beta q + (1 - beta) p:
//
//     beta 0        KL(q | p)                              gradient of the student's scores  p - q
//     beta 1        KL(p | q) = D                          p (log p - log q - D)
//     between them  beta KL(q | m) + (1 - beta) K          (1 - beta) p (log(p / m) - K)
//
// where K = KL(p | m). As everywhere 0 log 0 is 0, so what both call impossible adds nothing.
//
// log(p / m) is formed of the difference d = log q - log p, as the log of m alone would lose its
// digits where p is close to q: log(p / m) = -log(1 + beta (e^d - 1)). Where d > 0 the same is
// done with p and q exchanged, so that no exp overflows.
#pragma once

#include "block.hpp"

namespace neglog {

enum Kind { kForward, kReverse, kBetween };

inline Kind kind_of(double beta) { return beta == 0 ? kForward : beta == 1 ? kReverse : kBetween; }

// What a row's gradient needs: the divergence, and D or K above.
struct Divergence {
    double value = 0, offset = 0;
};

// Scores of both, and their log-sum-exps.
template <class T>
struct Scores {
    const T *student, *teacher;
    Lse<T> of_student, of_teacher;

    T log_p(ptrdiff_t j) const { return log_probability(student[j], of_student); }
    T log_q(ptrdiff_t j) const { return log_probability(teacher[j], of_teacher); }
};

template <class T>
struct OverMean {
    T log_p, log_q;  // log(p / m), log(q / m)
};

template <class T>
__attribute__((always_inline)) inline OverMean<T> over_mean(T log_p, T log_q, T beta) {
    const T d = log_q - log_p;
    const bool teacher_is_larger = d > T(0);
    const T share = teacher_is_larger ? T(1) - beta : beta;  // of the smaller one
    const T smaller_over_larger = exp_nonpositive(teacher_is_larger ? -d : d);
    const T of_larger = -log_nonnegative(T(1) + share * (smaller_over_larger - T(1)));
    return teacher_is_larger ? OverMean<T>{of_larger - d, of_larger}
                             : OverMean<T>{of_larger, of_larger + d};
}

// p times a log, 0 where p is 0.
template <class T>
inline T weighed(T p, T log) {
    return p == T(0) ? T(0) : p * log;
}

// Both sums in one loop, by partial sums as in block_sum_of.
template <class T>
inline Divergence block_divergence_between(Scores<T> s, ptrdiff_t n, double beta) {
    const T share = T(beta);
    T of_teacher[kLanes] = {}, of_student[kLanes] = {};
    const auto add = [&](ptrdiff_t j, int i) {
        const T log_p = s.log_p(j), log_q = s.log_q(j);
        const OverMean<T> over = over_mean(log_p, log_q, share);
        of_teacher[i] += weighed(exp_nonpositive(log_q), over.log_q);
        of_student[i] += weighed(exp_nonpositive(log_p), over.log_p);
    };
    ptrdiff_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
#pragma omp simd
        for (int i = 0; i < kLanes; ++i) add(j + i, i);
    }
    const int rest = int(n - j);
#pragma omp simd
    for (int i = 0; i < rest; ++i) add(j + i, i);
    const double student = block_sum(of_student, kLanes);
    return {beta * block_sum(of_teacher, kLanes) + (1 - beta) * student, student};
}

// The sums over a block.
template <class T>
inline Divergence block_divergence(Scores<T> s, ptrdiff_t n, double beta) {
    switch (kind_of(beta)) {
        case kForward:
            return {block_sum_of<T>(n, [=](ptrdiff_t j) {
                        const T log_q = s.log_q(j);
                        return weighed(exp_nonpositive(log_q), log_q - s.log_p(j));
                    }),
                    0};
        case kReverse: {
            const double value = block_sum_of<T>(n, [=](ptrdiff_t j) {
                const T log_p = s.log_p(j);
                return weighed(exp_nonpositive(log_p), log_p - s.log_q(j));
            });
            return {value, value};
        }
        case kBetween: break;
    }
    return block_divergence_between(s, n, beta);
}

// out = scale times the gradient of the student's scores.
template <class T>
inline void block_divergence_gradient(Scores<T> s, ptrdiff_t n, double beta,
                                      const Divergence& of_row, T scale, T* out) {
    const T share = T(beta), offset = T(of_row.offset);
    switch (kind_of(beta)) {
        case kForward:
#pragma omp simd
            for (ptrdiff_t j = 0; j < n; ++j)
                out[j] = scale * (exp_nonpositive(s.log_p(j)) - exp_nonpositive(s.log_q(j)));
            return;
        case kReverse:
#pragma omp simd
            for (ptrdiff_t j = 0; j < n; ++j) {
                const T log_p = s.log_p(j);
                out[j] = scale * weighed(exp_nonpositive(log_p), log_p - s.log_q(j) - offset);
            }
            return;
        case kBetween: break;
    }
    scale *= T(1) - share;
#pragma omp simd
    for (ptrdiff_t j = 0; j < n; ++j) {
        const T log_p = s.log_p(j);
        const T over = over_mean(log_p, s.log_q(j), share).log_p;
        out[j] = scale * weighed(exp_nonpositive(log_p), over - offset);
    }
}

}  // namespace neglog
