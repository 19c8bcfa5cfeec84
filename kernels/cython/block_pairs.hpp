// Arithmetic on the scores of pairs: a block of one row against adjacent columns.
//
// Every column has a maximum and a sum of its own, so that one pass over the scores serves the
// log-sum-exps of rows and of columns. With x the similarities, s the row's scale and b the bias:
//
//     z_j = s x_j + b_j;    row sum = sum_j e^(z_j - shift);    column_sum_j += e^(z_j - shift_j)
//
// The notes of block.hpp hold here. kernels/numba/block_pairs.py has the same functions.
#pragma once

#include "block.hpp"

namespace neglog {

// z = scale * similarity + bias; `bias` may be null.
template <class T>
inline void block_pair_scores(const T* similarity, ptrdiff_t n, T scale, const T* bias, T* z) {
    if (bias) {
#pragma omp simd
        for (ptrdiff_t j = 0; j < n; ++j) z[j] = similarity[j] * scale + bias[j];
    } else {
#pragma omp simd
        for (ptrdiff_t j = 0; j < n; ++j) z[j] = similarity[j] * scale;
    }
}

// z = -inf where a column's group is the row's.
template <class T>
inline void block_exclude(T* z, ptrdiff_t n, int64_t group, const int64_t* groups) {
#pragma omp simd
    for (ptrdiff_t j = 0; j < n; ++j)
        z[j] = groups[j] == group ? -std::numeric_limits<T>::infinity() : z[j];
}

// Drops NaN, which comes back in the sum, as in block_maximum.
template <class T>
inline void block_maximum_of_columns(const T* z, ptrdiff_t n, T* maximum) {
#pragma omp simd
    for (ptrdiff_t j = 0; j < n; ++j) maximum[j] = z[j] > maximum[j] ? z[j] : maximum[j];
}

// Returns the row's sum of e^z and adds each e^z to its column's sum: one exp serves both. There is
// no shift, so the scores must be near enough to 0 for e^z to be in range.
template <class T>
inline double block_exp_sum_of_row_and_columns(const T* z, ptrdiff_t n, T* column_sum) {
    return block_sum_of<T>(n, [=](ptrdiff_t j) {
        const T e = exp_nonpositive(z[j]);
        column_sum[j] += e;
        return e;
    });
}

template <class T>
inline void block_exp_sum_of_columns(const T* z, ptrdiff_t n, const T* shift, T* column_sum) {
#pragma omp simd
    for (ptrdiff_t j = 0; j < n; ++j) column_sum[j] += exp_nonpositive(z[j] - shift[j]);
}

// Adds the columns' partial sums of a few rows to their totals in double, and clears them.
template <class T>
inline void block_flush_sums(T* partial, ptrdiff_t n, double* total) {
#pragma omp simd
    for (ptrdiff_t j = 0; j < n; ++j) {
        total[j] += partial[j];
        partial[j] = 0;
    }
}

// out = (row + column) e^z: block_pair_gradient for scores near 0, with e^-lse in both factors.
template <class T>
inline void block_pair_gradient_bounded(const T* z, ptrdiff_t n, T row, const T* column, T* out) {
#pragma omp simd
    for (ptrdiff_t j = 0; j < n; ++j) out[j] = exp_nonpositive(z[j]) * (row + column[j]);
}

// out = row e^(z - row_lse) + column e^(z - column_lse)
template <class T>
inline void block_pair_gradient(const T* z, ptrdiff_t n, T row, T row_lse, const T* column,
                                const T* column_lse, T* out) {
#pragma omp simd
    for (ptrdiff_t j = 0; j < n; ++j)
        out[j] = row * exp_nonpositive(z[j] - row_lse) +
                 column[j] * exp_nonpositive(z[j] - column_lse[j]);
}

// log(1 + e) for 0 <= e <= 1, as 2 atanh(e / (2 + e)); the series is cut at 2e-9 and 2e-18.
template <class T>
inline T log1p_exp(T e) {
    constexpr int terms = sizeof(T) == 4 ? 9 : 18;
    const T t = e / (T(2) + e), square = t * t;
    T series = T(1) / T(2 * terms - 1);
    for (int k = terms - 2; k >= 0; --k) series = series * square + T(1) / T(2 * k + 1);
    return T(2) * t * series;
}

// softplus(z) = log(1 + e^z), and its derivative.
template <class T>
inline T softplus(T z, T& sigmoid) {
    const T e = exp_nonpositive(-std::fabs(z));
    sigmoid = (z < 0 ? e : T(1)) / (T(1) + e);
    return (z < 0 ? T(0) : z) + log1p_exp(e);
}

// Returns the sum of softplus(z); out = scale * sigmoid(z).
template <class T>
inline double block_softplus(const T* z, ptrdiff_t n, T scale, T* out) {
    return block_sum_of<T>(n, [=](ptrdiff_t j) {
        T sigmoid;
        const T value = softplus(z[j], sigmoid);
        out[j] = scale * sigmoid;
        return value;
    });
}

}  // namespace neglog
