"""A group of rows of few classes or of a strided class axis, from positions.hpp."""

from problem cimport Gradient, Output, Problem, Upstream

cdef extern from "positions.hpp" namespace "neglog" nogil:
    Py_ssize_t group_size(const Problem& p)
    void group_forward(const Problem& p, const Output& o, Py_ssize_t group)
    void group_backward(const Problem& p, const Gradient& g, const Upstream& u, Py_ssize_t group)
    void group_forward_backward(const Problem& p, const Output& o, const Gradient& g,
                                double grad_scale, Py_ssize_t group)
