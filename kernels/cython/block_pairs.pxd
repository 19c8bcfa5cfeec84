"""Arithmetic on the scores of pairs, from block_pairs.hpp."""

from libc.stdint cimport int64_t

cdef extern from "block_pairs.hpp" namespace "neglog" nogil:
    void block_pair_scores[T](const T* similarity, Py_ssize_t n, T scale, const T* bias, T* z)
    void block_exclude[T](T* z, Py_ssize_t n, int64_t group, const int64_t* groups)
    void block_maximum_of_columns[T](const T* z, Py_ssize_t n, T* maximum)
    double block_exp_sum_of_row_and_columns[T](const T* z, Py_ssize_t n, T* column_sum)
    void block_exp_sum_of_columns[T](const T* z, Py_ssize_t n, const T* shift, T* column_sum)
    void block_flush_sums[T](T* partial, Py_ssize_t n, double* total)
    void block_pair_gradient_bounded[T](const T* z, Py_ssize_t n, T row, const T* column, T* out)
    void block_pair_gradient[T](const T* z, Py_ssize_t n, T row, T row_lse, const T* column,
                                const T* column_lse, T* out)
    T softplus[T](T z, T& sigmoid)
    double block_softplus[T](const T* z, Py_ssize_t n, T scale, T* out)
