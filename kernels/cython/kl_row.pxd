"""Rows of a student's logits against their teachers, from kl_row.hpp."""

from libc.stdint cimport int64_t

cdef extern from "kl_row.hpp" namespace "neglog" nogil:
    cdef struct KlProblem:
        int dtype, teacher_dtype
        Py_ssize_t rows, vocab
        const char* logits
        Py_ssize_t logits_stride
        const char* teacher
        Py_ssize_t teacher_stride
        bint probabilities
        const int64_t* ids
        Py_ssize_t count
        const int64_t* target
        const void* token_weight
        int64_t ignore_index
        double beta, temperature, soft_weight, hard_weight, logit_scale, softcap
        double teacher_scale, teacher_softcap

    cdef struct KlOutput:
        void* loss
        void* divergence
        void* cross_entropy
        int64_t* invalid

    cdef struct KlGradient:
        char* out
        Py_ssize_t stride
        bint bypass_cache
        const void* grad
        Py_ssize_t grad_stride
        double grad_scale

    void taught_rows(const KlProblem& p, const KlOutput& o, const KlGradient& g, Py_ssize_t first,
                     Py_ssize_t end)
