"""What the kernels of nll are asked, from problem.hpp."""

from libc.stdint cimport int64_t, uint8_t

cdef extern from "problem.hpp" namespace "neglog" nogil:
    cdef struct Axes:
        Py_ssize_t of_class, position

    cdef struct Problem:
        int dtype
        Py_ssize_t rows, vocab, positions
        const char* logits
        Py_ssize_t logits_stride
        Axes logits_axes
        const int64_t* target
        const char* probs
        Py_ssize_t probs_stride
        Axes probs_axes
        const void* weight
        const void* token_weight
        int64_t ignore_index
        double label_smoothing, logit_scale, softcap, z_loss
        double weight_sum
        int itemsize

    cdef struct Output:
        void* loss
        void* lse
        void* lse_low
        uint8_t* correct
        void* entropy
        int64_t* argmax

    cdef struct Gradient:
        char* out
        Py_ssize_t stride
        Axes axes
        bint bypass_cache

    cdef struct Upstream:
        const void* lse
        const void* lse_low
        const void* grad
        Py_ssize_t grad_stride
        double grad_scale
        const void* grad_lse
        const void* grad_entropy
        const void* entropy
