# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""kl: a student's distributions against a teacher's, row by row: forward, or with the gradient.

One row is computed in kl_row.hpp, where the loss stands; the divergence's formulas in
divergence.hpp. The functions take addresses, as those of nll.pyx. The Numba version, numba/kl.py,
has the same function.

A row is computed by one thread, in one order, so the bits do not depend on the number of threads.
"""

from cython.parallel cimport parallel, prange
from libc.float cimport DBL_MAX, DBL_MIN, FLT_MAX, FLT_MIN
from libc.stdint cimport int64_t, uintptr_t

from kl_row cimport KlGradient, KlOutput, KlProblem, taught_rows
from row cimport sum_of

cdef enum:
    FLOAT32 = 0
    FLOAT64 = 1
    LARGEST_CACHE = 64 << 20  # bytes


cdef Py_ssize_t rows_per_chunk(const KlProblem& p, int itemsize, int threads) noexcept nogil:
    """As in nll.pyx."""
    cdef Py_ssize_t rows = (<Py_ssize_t>4 << 20) // (p.vocab * itemsize + 1)
    return max(<Py_ssize_t>1, min(rows, p.rows // (8 * threads)))


cdef double softcap_of(int dtype, double softcap) noexcept:
    """As in nll.pyx."""
    if softcap == 0 or softcap > (DBL_MAX if dtype == FLOAT64 else FLT_MAX):
        return 0
    return max(softcap, <double>(DBL_MIN if dtype == FLOAT64 else FLT_MIN))


cdef void all_rows(const KlProblem& p, const KlOutput& o, const KlGradient& g, int itemsize,
                   int threads) noexcept nogil:
    cdef Py_ssize_t i
    cdef Py_ssize_t chunk = rows_per_chunk(p, itemsize, threads)
    cdef Py_ssize_t chunks = (p.rows + chunk - 1) // chunk
    with parallel(num_threads=threads):
        for i in prange(chunks, schedule="dynamic"):
            taught_rows(p, o, g, i * chunk, min(p.rows, (i + 1) * chunk))


def rows(int dtype, Py_ssize_t rows, Py_ssize_t vocab, uintptr_t logits, Py_ssize_t logits_stride,
         int teacher_dtype, uintptr_t teacher, Py_ssize_t teacher_stride, bint probabilities,
         uintptr_t ids, Py_ssize_t count, uintptr_t target, uintptr_t token_weight,
         int64_t ignore_index, double beta, double temperature, double soft_weight,
         double hard_weight, double logit_scale, double softcap, double teacher_scale,
         double teacher_softcap, uintptr_t loss, uintptr_t divergence, uintptr_t cross_entropy,
         uintptr_t grad, Py_ssize_t grad_stride, double grad_scale, uintptr_t out,
         Py_ssize_t out_stride, int threads):
    """Write each row's loss, divergence and cross-entropy, and with `out` the gradient of the
    logits for the upstream `grad * grad_scale`; without `grad`, `grad_scale`. `out` may be the
    address of the logits. Addresses are 0 where an array is absent; strides in elements; dtypes as
    in halves.hpp.

    Return the sum of the losses, and a row whose ids or log-probabilities are none, or -1. That row
    has a loss and a gradient of 0.
    """
    cdef KlProblem p
    cdef int64_t invalid = -1
    cdef int itemsize = 8 if dtype == FLOAT64 else 4 if dtype == FLOAT32 else 2
    p.dtype, p.teacher_dtype = dtype, teacher_dtype
    p.rows, p.vocab = rows, vocab
    p.logits, p.logits_stride = <const char*>logits, logits_stride
    p.teacher, p.teacher_stride = <const char*>teacher, teacher_stride
    p.probabilities = probabilities
    p.ids, p.count = <const int64_t*>ids, count
    p.target, p.token_weight = <const int64_t*>target, <const void*>token_weight
    p.ignore_index = ignore_index
    p.beta, p.temperature = beta, temperature
    p.soft_weight, p.hard_weight = soft_weight, hard_weight
    p.logit_scale, p.softcap = logit_scale, softcap_of(dtype, softcap)
    p.teacher_scale, p.teacher_softcap = teacher_scale, softcap_of(dtype, teacher_softcap)
    cdef KlOutput o = KlOutput(<void*>loss, <void*>divergence, <void*>cross_entropy, &invalid)
    cdef KlGradient g
    g.out, g.stride = <char*>out, out_stride
    g.bypass_cache = <double>rows * vocab * itemsize > LARGEST_CACHE and g.out != p.logits
    g.grad, g.grad_stride, g.grad_scale = <const void*>grad, grad_stride, grad_scale
    cdef double total = 0
    with nogil:
        all_rows(p, o, g, itemsize, threads)
        if loss != 0:
            total = sum_of(o.loss, rows, dtype)
    return total, invalid
