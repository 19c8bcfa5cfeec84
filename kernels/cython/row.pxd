"""One row of logits, from row.hpp."""

from libc.stdint cimport int64_t

from problem cimport Gradient, Output, Problem, Upstream

cdef extern from "row.hpp" namespace "neglog" nogil:
    void row_forward(const Problem& p, const Output& o, Py_ssize_t row)
    void row_backward(const Problem& p, const Gradient& g, const Upstream& u, Py_ssize_t row)
    void row_forward_backward(const Problem& p, const Output& o, const Gradient& g,
                              double grad_scale, Py_ssize_t row)
    double sum_of(const void* numbers, Py_ssize_t n, int dtype)
    Py_ssize_t count_targets(const int64_t* target, Py_ssize_t n, Py_ssize_t vocab,
                             int64_t ignore_index)
