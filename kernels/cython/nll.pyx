# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""nll: log-softmax and negative log-likelihood of rows: forward, backward, or both in one pass.

A row's scores are z = logit_scale * logit, with a softcap z = softcap * tanh(logit_scale * logit /
softcap). With lse = log(sum_c e^z_c), log p_c = z_c - lse, class weights w (1 without them),
eps = label_smoothing and V classes, the loss of a row is

    of an index t         -(1 - eps) w_t log p_t - eps / V sum_c w_c log p_c + z_loss w_t lse^2
    of probabilities q    -sum_c w_c q'_c log p_c + z_loss lse^2,  q'_c = (1 - eps) q_c + eps / V

times the row's token_weight, if there is one; and 0 where t is ignore_index or that weight 0. The
gradient's formula stands at GradientWeights, in row.hpp.

The functions take addresses, not arrays, so that the caller may be torch or NumPy and torch's
bfloat16 comes in without a copy. The Numba version, numba/nll.py, has the same functions.

Here are the loops over rows. One row is computed in row.hpp; rows of few classes, and those whose
class axis is not the last, a group at a time in positions.hpp. Each is computed by one thread, in
one order, so the bits do not depend on the number of threads. The one sum over rows is serial.
"""

from cython.parallel cimport parallel, prange
from libc.float cimport DBL_MAX, DBL_MIN, FLT_MAX, FLT_MIN
from libc.math cimport NAN
from libc.stdint cimport int64_t, uint8_t, uintptr_t

from block cimport finish_streams
from positions cimport group_backward, group_forward, group_forward_backward, group_size
from problem cimport Axes, Gradient, Output, Problem, Upstream
from row cimport count_targets, row_backward, row_forward, row_forward_backward, sum_of

cdef enum:
    FLOAT32 = 0
    FLOAT64 = 1
    LARGEST_CACHE = 64 << 20    # bytes
    FEW_CLASSES = 128           # rows of up to so many are computed a group at a time


# All rows

cdef Py_ssize_t rows_per_chunk(const Problem& p, int threads) noexcept nogil:
    """How many rows a thread takes at a time.

    Up to 4 MB: two threads that first write to one huge page at the same time both clear it. With
    256 KB a backward into new memory took 29 ms instead of 20. At most an eighth of the thread's
    share: otherwise a prompt of ignored rows would leave one thread with all the work.
    """
    cdef Py_ssize_t rows = (<Py_ssize_t>4 << 20) // (p.vocab * p.itemsize + 1)
    return max(<Py_ssize_t>1, min(rows, p.rows // (8 * threads)))


cdef bint by_groups(const Problem& p) noexcept nogil:
    return p.vocab <= FEW_CLASSES or p.positions > 1 or p.logits_axes.of_class != 1


cdef Py_ssize_t rows_per_step(const Problem& p) noexcept nogil:
    return group_size(p) if by_groups(p) else 1


cdef Py_ssize_t steps(const Problem& p) noexcept nogil:
    """Rows, or groups of them."""
    return (p.rows + rows_per_step(p) - 1) // rows_per_step(p)


cdef Py_ssize_t steps_per_chunk(const Problem& p, int threads) noexcept nogil:
    return max(<Py_ssize_t>1, rows_per_chunk(p, threads) // rows_per_step(p))


# A step: a row, or a group of rows

cdef inline void forward_step(const Problem& p, const Output& o, Py_ssize_t i) noexcept nogil:
    if by_groups(p):
        group_forward(p, o, i)
    else:
        row_forward(p, o, i)


cdef inline void backward_step(const Problem& p, const Gradient& g, const Upstream& u,
                               Py_ssize_t i) noexcept nogil:
    if by_groups(p):
        group_backward(p, g, u, i)
    else:
        row_backward(p, g, u, i)


cdef inline void forward_backward_step(const Problem& p, const Output& o, const Gradient& g,
                                       double grad_scale, Py_ssize_t i) noexcept nogil:
    if by_groups(p):
        group_forward_backward(p, o, g, grad_scale, i)
    else:
        row_forward_backward(p, o, g, grad_scale, i)


cdef double forward_rows(const Problem& p, const Output& o, int threads) noexcept nogil:
    cdef Py_ssize_t i
    cdef Py_ssize_t chunk = steps_per_chunk(p, threads)
    for i in prange(steps(p), num_threads=threads, schedule="dynamic", chunksize=chunk):
        forward_step(p, o, i)
    return sum_of(o.loss, p.rows, p.dtype)


cdef void backward_rows(const Problem& p, const Gradient& g, const Upstream& u,
                        int threads) noexcept nogil:
    cdef Py_ssize_t i
    cdef Py_ssize_t chunk = steps_per_chunk(p, threads)
    with parallel(num_threads=threads):
        for i in prange(steps(p), schedule="dynamic", chunksize=chunk):
            backward_step(p, g, u, i)
        finish_streams()


cdef double forward_backward_rows(const Problem& p, const Output& o, const Gradient& g,
                                  double grad_scale, int threads) noexcept nogil:
    cdef Py_ssize_t i
    cdef Py_ssize_t chunk = steps_per_chunk(p, threads)
    if threads == 1:  # a parallel region takes 0.4 of the 1.5 microseconds of 8 x 10
        for i in range(steps(p)):
            forward_backward_step(p, o, g, grad_scale, i)
        finish_streams()
    else:
        with parallel(num_threads=threads):
            for i in prange(steps(p), schedule="dynamic", chunksize=chunk):
                forward_backward_step(p, o, g, grad_scale, i)
            finish_streams()
    return sum_of(o.loss, p.rows, p.dtype)


# From Python: addresses, 0 where an array is absent; strides in elements; dtypes as in halves.hpp.
# `layout` is None for rows (N, V). For logits (B, V, P) it is P and the strides of class and
# position, of the logits, of the probabilities and of the gradient; `logits_stride`, `probs_stride`
# and `out_stride` are then those of B, and the rows are B * P.

cdef double softcap_of(int dtype, double softcap) noexcept:
    """0 for none. Beyond the range of what is computed in a cap is none: as inf it would make
    inf * 0. One that rounds to 0 would make 0 / 0, so the smallest normal number takes its place.
    """
    if softcap == 0 or softcap > (DBL_MAX if dtype == FLOAT64 else FLT_MAX):
        return 0
    return max(softcap, <double>(DBL_MIN if dtype == FLOAT64 else FLT_MIN))


cdef Problem make_problem(int dtype, Py_ssize_t rows, Py_ssize_t vocab, uintptr_t logits,
                          Py_ssize_t logits_stride, uintptr_t target, uintptr_t probs,
                          Py_ssize_t probs_stride, uintptr_t weight, uintptr_t token_weight,
                          int64_t ignore_index, double label_smoothing, double logit_scale,
                          double softcap, double z_loss, tuple layout) except *:
    cdef Problem p
    p.dtype = dtype
    p.itemsize = 8 if dtype == FLOAT64 else 4 if dtype == FLOAT32 else 2
    p.rows = rows
    p.vocab = vocab
    p.logits = <const char*>logits
    p.logits_stride = logits_stride
    p.target = <const int64_t*>target
    p.probs = <const char*>probs
    p.probs_stride = probs_stride
    p.weight = <const void*>weight
    p.token_weight = <const void*>token_weight
    p.ignore_index = ignore_index
    p.label_smoothing = label_smoothing
    p.logit_scale = logit_scale
    p.softcap = softcap_of(dtype, softcap)
    p.z_loss = z_loss
    p.positions = 1
    p.logits_axes = p.probs_axes = Axes(1, 0)
    if layout is not None:
        p.positions = layout[0]
        p.logits_axes = Axes(layout[1], layout[2])
        p.probs_axes = Axes(layout[3], layout[4])
    p.weight_sum = vocab
    if weight != 0 and label_smoothing != 0:
        p.weight_sum = sum_of(<const void*>weight, vocab, dtype)
    return p


cdef Gradient make_gradient(const Problem& p, uintptr_t out, Py_ssize_t out_stride,
                            tuple layout) except *:
    cdef Gradient g
    cdef bint larger_than_caches = <double>p.rows * p.vocab * p.itemsize > LARGEST_CACHE
    g.out = <char*>out
    g.stride = out_stride
    g.axes = Axes(1, 0) if layout is None else Axes(layout[5], layout[6])
    g.bypass_cache = larger_than_caches and g.out != p.logits
    return g


cdef double real_at(uintptr_t numbers, Py_ssize_t i, int dtype) noexcept:
    return (<const double*>numbers)[i] if dtype == FLOAT64 else (<const float*>numbers)[i]


cpdef double total_weight(Py_ssize_t rows, Py_ssize_t vocab, uintptr_t target, uintptr_t probs,
                          uintptr_t weight, uintptr_t token_weight, int64_t ignore_index,
                          int dtype) except? -1:
    """The divisor of the mean: the sum over the counted rows of class weight times token_weight.

    Raises IndexError for the first target that is neither ignored nor in [0, vocab).
    """
    cdef const int64_t* targets = <const int64_t*>target
    cdef Py_ssize_t row, counted
    cdef int64_t t
    cdef double total = 0, of_row = 1
    if probs != 0:
        if vocab == 0:
            return NAN  # as torch, whose rows are numbers / classes
        return rows if token_weight == 0 else sum_of(<const void*>token_weight, rows, dtype)
    counted = count_targets(targets, rows, vocab, ignore_index)
    if counted >= 0 and weight == 0 and token_weight == 0:
        return counted
    for row in range(rows):
        t = targets[row]
        if token_weight != 0:
            of_row = real_at(token_weight, row, dtype)
        if t == ignore_index or of_row == 0:
            continue
        if t < 0 or t >= vocab:
            raise IndexError(
                f"target {t} at row {row} is out of range: expected 0 <= target < {vocab}")
        total += of_row if weight == 0 else of_row * real_at(weight, t, dtype)
    return total


def forward(int dtype, Py_ssize_t rows, Py_ssize_t vocab, uintptr_t logits,
            Py_ssize_t logits_stride, uintptr_t target, uintptr_t probs, Py_ssize_t probs_stride,
            uintptr_t weight, uintptr_t token_weight, int64_t ignore_index, double label_smoothing,
            double logit_scale, double softcap, double z_loss, uintptr_t loss, uintptr_t lse,
            uintptr_t lse_low, uintptr_t correct, uintptr_t entropy, uintptr_t argmax, int threads,
            tuple layout=None):
    """Write each row's loss and statistics; return the sum of the losses."""
    cdef Problem p = make_problem(dtype, rows, vocab, logits, logits_stride, target, probs,
                                  probs_stride, weight, token_weight, ignore_index,
                                  label_smoothing, logit_scale, softcap, z_loss, layout)
    cdef Output o = Output(<void*>loss, <void*>lse, <void*>lse_low, <uint8_t*>correct,
                           <void*>entropy, <int64_t*>argmax)
    cdef double total
    with nogil:
        total = forward_rows(p, o, threads)
    return total


def backward(int dtype, Py_ssize_t rows, Py_ssize_t vocab, uintptr_t logits,
             Py_ssize_t logits_stride, uintptr_t target, uintptr_t probs, Py_ssize_t probs_stride,
             uintptr_t weight, uintptr_t token_weight, int64_t ignore_index, double label_smoothing,
             double logit_scale, double softcap, double z_loss, uintptr_t lse, uintptr_t lse_low,
             uintptr_t grad, Py_ssize_t grad_stride, double grad_scale, uintptr_t grad_lse,
             uintptr_t grad_entropy, uintptr_t entropy, uintptr_t out, Py_ssize_t out_stride,
             int threads, tuple layout=None):
    """Write the gradient of the logits for upstream `grad * grad_scale`, `grad_lse` and
    `grad_entropy` of the `entropy` that a forward wrote."""
    cdef Problem p = make_problem(dtype, rows, vocab, logits, logits_stride, target, probs,
                                  probs_stride, weight, token_weight, ignore_index,
                                  label_smoothing, logit_scale, softcap, z_loss, layout)
    cdef Gradient g = make_gradient(p, out, out_stride, layout)
    cdef Upstream u = Upstream(<const void*>lse, <const void*>lse_low, <const void*>grad,
                               grad_stride, grad_scale, <const void*>grad_lse,
                               <const void*>grad_entropy, <const void*>entropy)
    with nogil:
        backward_rows(p, g, u, threads)


cpdef double forward_backward(int dtype, Py_ssize_t rows, Py_ssize_t vocab, uintptr_t logits,
                              Py_ssize_t logits_stride, uintptr_t target, uintptr_t probs,
                              Py_ssize_t probs_stride, uintptr_t weight, uintptr_t token_weight,
                              int64_t ignore_index, double label_smoothing, double logit_scale,
                              double softcap, double z_loss, uintptr_t loss, uintptr_t lse,
                              uintptr_t lse_low, uintptr_t correct, uintptr_t entropy,
                              uintptr_t argmax, double grad_scale, uintptr_t out,
                              Py_ssize_t out_stride, int threads, tuple layout=None) except? -1:
    """forward, and while each row is in cache its gradient, for upstream `grad_scale`.

    `out` may be the address of the logits.
    """
    cdef Problem p = make_problem(dtype, rows, vocab, logits, logits_stride, target, probs,
                                  probs_stride, weight, token_weight, ignore_index,
                                  label_smoothing, logit_scale, softcap, z_loss, layout)
    cdef Output o = Output(<void*>loss, <void*>lse, <void*>lse_low, <uint8_t*>correct,
                           <void*>entropy, <int64_t*>argmax)
    cdef Gradient g = make_gradient(p, out, out_stride, layout)
    cdef double total
    with nogil:
        total = forward_backward_rows(p, o, g, grad_scale, threads)
    return total


def loss_and_gradient(int dtype, Py_ssize_t rows, Py_ssize_t vocab, uintptr_t logits,
                      Py_ssize_t logits_stride, uintptr_t target, uintptr_t probs,
                      Py_ssize_t probs_stride, uintptr_t weight, uintptr_t token_weight,
                      int64_t ignore_index, double label_smoothing, double logit_scale,
                      double softcap, double z_loss, bytearray of_rows, uintptr_t correct,
                      uintptr_t entropy, uintptr_t argmax, bint mean, object num_items,
                      double upstream, uintptr_t loss, uintptr_t out, Py_ssize_t out_stride,
                      int threads, tuple layout=None):
    """total_weight and forward_backward of a loss that is one number, which is written to `loss`.

    Return the divisor of its mean: num_items, or if None the weight of the rows, rounded as a
    tensor of the accumulation dtype holds it. The gradient is that of upstream / divisor. `of_rows`
    has room for the rows' lse, lse_low and losses, in this order.

    Of a small input the fixed cost of calls is all that is felt. This one takes 1 microsecond less
    than the two with the division in Python, and a bytearray 0.7 less than a tensor.
    """
    cdef char* lse = of_rows
    cdef Py_ssize_t size = rows * (8 if dtype == FLOAT64 else 4)
    cdef double weights = total_weight(rows, vocab, target, probs, weight, token_weight,
                                       ignore_index, dtype)
    cdef double divisor, total
    if num_items is not None:
        divisor = num_items
        divisor = divisor if divisor != 0 else 0  # of -0 the reciprocal is -inf
    else:
        divisor = weights if dtype == FLOAT64 else <float>weights
    total = forward_backward(
        dtype, rows, vocab, logits, logits_stride, target, probs, probs_stride, weight,
        token_weight, ignore_index, label_smoothing, logit_scale, softcap, z_loss,
        <uintptr_t>(lse + 2 * size), <uintptr_t>lse, <uintptr_t>(lse + size), correct, entropy,
        argmax, upstream * (1 / divisor) if mean else upstream, out, out_stride, threads, layout)
    if mean:
        total /= divisor
    if dtype == FLOAT64:
        (<double*>loss)[0] = total
    else:
        (<float*>loss)[0] = <float>total
    return divisor
