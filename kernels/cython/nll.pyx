# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""nll: log-softmax and negative log-likelihood of rows: forward, backward, or both in one pass.

A row's scores are z = logit_scale * logit, with a softcap z = softcap * tanh(logit_scale * logit /
softcap). With lse = log(sum_c e^z_c), log p_c = z_c - lse, class weights w (1 without them),
eps = label_smoothing and V classes, the loss of a row is

    of an index t         -(1 - eps) w_t log p_t - eps / V sum_c w_c log p_c + z_loss w_t lse^2
    of probabilities q    -sum_c w_c q'_c log p_c + z_loss lse^2,  q'_c = (1 - eps) q_c + eps / V

and 0 where t is ignore_index. The gradient's formula stands at GradientWeights.

The functions take addresses, not arrays, so that the caller may be torch or NumPy and torch's
bfloat16 comes in without a copy. The Numba version, numba/nll.py, has the same functions.

(a) A row is read in blocks of 2048 numbers that stay in L1: their maximum, then their sum of exps,
    which the online rule adds to the row's. One read of memory gives the row's log-sum-exp.
(b) What needs the finished lse (label smoothing, probability targets, entropy) reads the row again
    from L2. Accumulating it online would cancel at large logits, and the memory time of the first
    read hides the second.
(c) The target's own gradient is formed by expm1 of its log-probability: p - 1 would lose every
    digit as p nears 1.
(d) Each row is computed by one thread, in one order, so the bits do not depend on the number of
    threads. The one sum over rows is serial.
(e) An argument `tag` is not read: its type tells Cython whether to compute in float or in double.
"""

from cython.parallel cimport prange
from libc.float cimport DBL_MAX, DBL_MIN, FLT_MAX, FLT_MIN
from libc.math cimport INFINITY, NAN, expm1, isfinite, isnan
from libc.stdint cimport int64_t, uint8_t, uintptr_t

from block cimport (
    Lse, LseState, block_affine, block_contains, block_log_probability_dot,
    block_log_probability_sum, block_multiply, block_negative_entropy, block_scale, block_softcap,
    block_softcap_and_slope, block_softmax, block_subtract, block_sum, exp_nonpositive, finish,
    log_probability, update, zero_bytes,
)
from halves cimport bfloat16, narrow, narrow_block, widen, widen_block

cdef enum:
    FLOAT32 = 0
    FLOAT64 = 1
    BFLOAT16 = 2
    BLOCK = 2048
    LARGEST_CACHE = 64 << 20    # bytes

ctypedef fused real:
    float
    double


cdef struct Problem:
    int dtype
    Py_ssize_t rows, vocab
    const char* logits
    Py_ssize_t logits_stride
    const int64_t* target
    const char* probs
    Py_ssize_t probs_stride
    const void* weight
    int64_t ignore_index
    double label_smoothing, logit_scale, softcap, z_loss
    double weight_sum       # over the vocabulary; the vocabulary's size without weights
    int itemsize
    bint bfloat16_scores    # the scores are the logits themselves, read as bfloat16
    bint bypass_cache       # the gradient is larger than any cache
    Py_ssize_t blocks


cdef struct Span:           # columns start to start + n of a row
    Py_ssize_t start, n


cdef struct Output:
    void* loss
    void* lse
    void* lse_low
    uint8_t* correct
    void* entropy


# The gradient of a row's scores, with p its probabilities and t the index of its target, is
#
#     softmax_weight p_c + target_weight (p_c - [c = t]) - uniform_weight b_c
#
# where b_c = w_c; for a target of probabilities b_c = w_c q'_c and target_weight = 0.
cdef struct GradientWeights:
    Py_ssize_t target       # -1 if there is no index
    double target_weight, softmax_weight, uniform_weight


cdef struct Gradient:
    char* out
    Py_ssize_t stride


# Reading a block

cdef inline Span block_span(const Problem* p, Py_ssize_t block) noexcept nogil:
    return Span(block * BLOCK, min(<Py_ssize_t>BLOCK, p.vocab - block * BLOCK))


cdef inline const real* as_real(const Problem* p, const char* source, real* buffer,
                                Py_ssize_t n) noexcept nogil:
    """The block at `source` as real numbers: itself, or its conversion in `buffer`."""
    if p.itemsize == sizeof(real):
        return <const real*>source
    if real is float:
        widen_block(source, p.dtype, n, buffer)
    return buffer


cdef inline const real* scaled_logits(const Problem* p, Py_ssize_t row, Span span,
                                      real* buffer) noexcept nogil:
    """The block of logits after the scale. With a softcap they are in the buffer."""
    cdef const char* source = p.logits + (row * p.logits_stride + span.start) * p.itemsize
    cdef const real* z = as_real(p, source, buffer, span.n)
    cdef Py_ssize_t j
    if p.logit_scale == 1 and p.softcap == 0:
        return z
    for j in range(span.n):
        buffer[j] = z[j] * <real>p.logit_scale
    return buffer


cdef inline const real* scores(const Problem* p, Py_ssize_t row, Span span,
                               real* buffer) noexcept nogil:
    """The block of scores z: the logits after scale and cap."""
    cdef const real* z = scaled_logits(p, row, span, buffer)
    if p.softcap != 0:
        block_softcap(buffer, span.n, <real>p.softcap)
    return z


cdef inline const real* scores_and_slopes(const Problem* p, Py_ssize_t row, Span span,
                                          real* buffer, real* slope) noexcept nogil:
    """The same, and with a softcap its derivative."""
    cdef const real* z = scaled_logits(p, row, span, buffer)
    if p.softcap != 0:
        block_softcap_and_slope(buffer, span.n, <real>p.softcap, slope)
    return z


cdef inline const bfloat16* bfloat16_logits(const Problem* p, Py_ssize_t row,
                                            Span span) noexcept nogil:
    return <const bfloat16*>(p.logits + (row * p.logits_stride + span.start) * p.itemsize)


cdef inline const real* coefficients(const Problem* p, Py_ssize_t row, Span span,
                                     real* buffer) noexcept nogil:
    """The weights w_c q'_c of the log-probabilities, for a target of probabilities."""
    cdef const char* source = p.probs + (row * p.probs_stride + span.start) * p.itemsize
    cdef const real* q = as_real(p, source, buffer, span.n)
    cdef real kept = <real>(1 - p.label_smoothing)
    cdef real uniform = <real>(p.label_smoothing / p.vocab)
    cdef Py_ssize_t j
    if p.label_smoothing == 0 and p.weight == NULL:
        return q
    for j in range(span.n):
        buffer[j] = q[j] * kept + uniform
    if p.weight != NULL:
        block_multiply(buffer, <const real*>p.weight + span.start, span.n)
    return buffer


# One row

cdef inline bint ignored(const Problem* p, Py_ssize_t row) noexcept nogil:
    return p.target != NULL and p.target[row] == p.ignore_index


cdef inline double class_weight_of_target(const Problem* p, Py_ssize_t row,
                                          real tag) noexcept nogil:
    if p.weight == NULL:
        return 1
    return (<const real*>p.weight)[p.target[row]]


cdef inline real score_at(const Problem* p, Py_ssize_t row, Py_ssize_t column,
                          real tag) noexcept nogil:
    """The score of one column."""
    cdef real buffer[1]
    return scores(p, row, Span(column, 1), &buffer[0])[0]


cdef Lse[real] row_lse(const Problem* p, Py_ssize_t row, real* buffer,
                       real* maximum) noexcept nogil:
    """The row's log-sum-exp, and its maximum."""
    cdef LseState[real] state
    cdef Py_ssize_t block
    cdef Span span
    for block in range(p.blocks):
        span = block_span(p, block)
        if p.bfloat16_scores:
            if real is float:
                update(state, bfloat16_logits(p, row, span), span.n)
        else:
            update(state, scores(p, row, span, buffer), span.n)
    maximum[0] = state.maximum
    return finish(state)


cdef double row_loss_of_index(const Problem* p, Py_ssize_t row, Lse[real] lse,
                              real* buffer) noexcept nogil:
    cdef real zero = 0
    cdef double w = class_weight_of_target(p, row, zero)
    cdef double total = 0
    cdef Py_ssize_t block
    cdef Span span
    cdef const real* z
    cdef double loss = -(1 - p.label_smoothing) * w * log_probability(
        score_at(p, row, p.target[row], zero), lse)
    if p.label_smoothing != 0:
        for block in range(p.blocks):
            span = block_span(p, block)
            z = scores(p, row, span, buffer)
            if p.weight == NULL:
                total += block_log_probability_sum(z, span.n, lse)
            else:
                total += block_log_probability_dot(
                    z, <const real*>p.weight + span.start, span.n, lse)
        loss -= p.label_smoothing / p.vocab * total
    if p.z_loss != 0:
        loss += p.z_loss * w * (<double>lse.high * lse.high)
    return loss


cdef double row_loss_of_probs(const Problem* p, Py_ssize_t row, Lse[real] lse,
                              real* buffer, real* target_buffer) noexcept nogil:
    cdef double total = 0
    cdef Py_ssize_t block
    cdef Span span
    for block in range(p.blocks):
        span = block_span(p, block)
        total += block_log_probability_dot(
            scores(p, row, span, buffer), coefficients(p, row, span, target_buffer), span.n, lse)
    if p.z_loss != 0:
        return p.z_loss * (<double>lse.high * lse.high) - total
    return -total


cdef double row_entropy(const Problem* p, Py_ssize_t row, Lse[real] lse,
                        real* buffer) noexcept nogil:
    cdef double total = 0
    cdef Py_ssize_t block
    cdef Span span
    for block in range(p.blocks):
        span = block_span(p, block)
        total += block_negative_entropy(scores(p, row, span, buffer), span.n, lse)
    return -total


cdef bint row_correct(const Problem* p, Py_ssize_t row, real maximum, Lse[real] lse,
                      real* buffer) noexcept nogil:
    """Whether the target is what argmax returns: the first column that has the maximum."""
    cdef Py_ssize_t block, target
    cdef Span span
    cdef bint nan_among_finite = isnan(lse.high) and maximum < INFINITY
    if p.target == NULL or ignored(p, row) or nan_among_finite:
        return False
    target = p.target[row]
    if not score_at(p, row, target, maximum) == maximum:
        return False
    for block in range(target // BLOCK + 1):
        span = block_span(p, block)
        span.n = min(span.n, target - span.start)
        if block_contains(scores(p, row, span, buffer), span.n, maximum):
            return False
    return True


cdef Lse[real] row_forward(const Problem* p, const Output* o, Py_ssize_t row,
                           real tag) noexcept nogil:
    """Write the row's loss and statistics; return its log-sum-exp."""
    cdef real[BLOCK] buffer
    cdef real[BLOCK] target_buffer
    cdef real maximum = 0
    cdef double loss = 0
    cdef Lse[real] lse
    lse.high = 0
    lse.low = 0
    if not ignored(p, row) or o.correct != NULL or o.entropy != NULL:
        lse = row_lse(p, row, &buffer[0], &maximum)
    if p.probs != NULL:
        loss = row_loss_of_probs(p, row, lse, &buffer[0], &target_buffer[0])
    elif not ignored(p, row):
        loss = row_loss_of_index(p, row, lse, &buffer[0])
    (<real*>o.loss)[row] = <real>loss
    if o.lse != NULL:
        (<real*>o.lse)[row] = lse.high
    if o.lse_low != NULL:
        (<real*>o.lse_low)[row] = lse.low
    if o.correct != NULL:
        o.correct[row] = row_correct(p, row, maximum, lse, &buffer[0])
    if o.entropy != NULL:
        (<real*>o.entropy)[row] = <real>row_entropy(p, row, lse, &buffer[0])
    return lse


cdef double row_coefficient_sum(const Problem* p, Py_ssize_t row, real* buffer) noexcept nogil:
    cdef double total = 0
    cdef Py_ssize_t block
    cdef Span span
    for block in range(p.blocks):
        span = block_span(p, block)
        total += block_sum(coefficients(p, row, span, buffer), span.n)
    return total


cdef GradientWeights gradient_weights(const Problem* p, Py_ssize_t row, Lse[real] lse, double grad,
                                      double grad_lse, real* buffer) noexcept nogil:
    """For the gradients `grad` of the row's loss and `grad_lse` of its lse."""
    cdef double w = 1, eps = p.label_smoothing
    cdef GradientWeights weights = GradientWeights(-1, 0, grad_lse, 0)
    if ignored(p, row):
        return weights
    weights.uniform_weight = grad
    if p.probs != NULL:
        weights.softmax_weight += grad * row_coefficient_sum(p, row, buffer)
    else:
        w = class_weight_of_target(p, row, lse.high)
        weights.target = p.target[row]
        weights.target_weight = grad * (1 - eps) * w
        weights.uniform_weight = grad * eps / p.vocab if eps != 0 else 0
        weights.softmax_weight += weights.uniform_weight * p.weight_sum
    if p.z_loss != 0:
        weights.softmax_weight += grad * 2 * p.z_loss * w * lse.high
    return weights


cdef void subtract_uniform(const Problem* p, Py_ssize_t row, Span span, double uniform_weight,
                           real* grad, real* buffer) noexcept nogil:
    """Subtract uniform_weight b_c."""
    if p.probs != NULL:
        block_subtract(grad, coefficients(p, row, span, buffer), span.n, <real>uniform_weight)
    elif p.weight != NULL:
        block_subtract(grad, <const real*>p.weight + span.start, span.n, <real>uniform_weight)
    else:
        block_affine(grad, span.n, <real>1, <real>-uniform_weight)


cdef inline double target_gradient(const GradientWeights* weights, real log_p) noexcept nogil:
    """softmax_weight p + target_weight (p - 1) of the target."""
    return weights.softmax_weight * exp_nonpositive(log_p) + weights.target_weight * expm1(log_p)


cdef void block_backward(const Problem* p, Py_ssize_t row, Span span, Lse[real] lse,
                         const GradientWeights* weights, const real* z, const real* slope,
                         real* grad, real* buffer) noexcept nogil:
    cdef Py_ssize_t target = weights.target - span.start
    cdef bint target_in_block = 0 <= target < span.n
    cdef real log_p = 0
    if target_in_block:  # before the block is written: `grad` may be where `z` is
        log_p = log_probability(z[target], lse)
    block_softmax(z, span.n, lse, <real>(weights.target_weight + weights.softmax_weight), grad)
    if target_in_block:
        grad[target] = <real>target_gradient(weights, log_p)
    if weights.uniform_weight != 0:
        subtract_uniform(p, row, span, weights.uniform_weight, grad, buffer)
    if p.softcap != 0:
        block_multiply(grad, slope, span.n)
    if p.logit_scale != 1:
        block_scale(grad, span.n, <real>p.logit_scale)


cdef void row_backward_bfloat16(const Problem* p, bfloat16* out, Py_ssize_t row, Lse[float] lse,
                                const GradientWeights* weights) noexcept nogil:
    """A row whose scores are bfloat16, with no uniform_weight: it needs no block of floats."""
    cdef const bfloat16* z = bfloat16_logits(p, row, Span(0, p.vocab))
    cdef float log_p
    if weights.target < 0:
        block_softmax(z, p.vocab, lse, <float>weights.softmax_weight, out)
        return
    log_p = log_probability(widen(z[weights.target]), lse)
    block_softmax(z, p.vocab, lse, <float>(weights.target_weight + weights.softmax_weight), out)
    narrow(<float>target_gradient(weights, log_p), out[weights.target])


cdef void row_backward(const Problem* p, const Gradient* g, Py_ssize_t row, Lse[real] lse,
                       double grad, double grad_lse) noexcept nogil:
    """One row of the gradient, for upstream `grad` of the loss and `grad_lse` of the lse."""
    cdef real[BLOCK] buffer
    cdef real[BLOCK] target_buffer
    cdef real[BLOCK] grad_buffer
    cdef real[BLOCK] slope
    cdef bint direct = p.itemsize == sizeof(real)
    cdef Py_ssize_t block
    cdef Span span
    cdef char* out
    cdef const real* z
    cdef real* destination
    cdef GradientWeights weights = gradient_weights(p, row, lse, grad, grad_lse, &target_buffer[0])
    # Exactly zero, even where the logits are NaN.
    if ignored(p, row) and (grad_lse == 0 or not isfinite(lse.high)):
        zero_bytes(g.out + row * g.stride * p.itemsize, p.vocab * p.itemsize, p.bypass_cache)
        return
    if p.bfloat16_scores and p.probs == NULL and weights.uniform_weight == 0:
        if real is float:
            row_backward_bfloat16(
                p, <bfloat16*>(g.out + row * g.stride * p.itemsize), row, lse, &weights)
        return
    for block in range(p.blocks):
        span = block_span(p, block)
        out = g.out + (row * g.stride + span.start) * p.itemsize
        destination = <real*>out if direct else &grad_buffer[0]
        z = scores_and_slopes(p, row, span, &buffer[0], &slope[0])
        block_backward(p, row, span, lse, &weights, z, &slope[0], destination, &target_buffer[0])
        if real is float:
            if not direct:
                narrow_block(&grad_buffer[0], p.dtype, span.n, out)


# All rows

cdef Py_ssize_t rows_per_chunk(const Problem* p, int threads) noexcept nogil:
    """How many rows a thread takes at a time.

    Up to 4 MB: two threads that first write to one huge page at the same time both clear it. With
    256 KB a backward into new memory took 29 ms instead of 20. At most an eighth of the thread's
    share: otherwise a prompt of ignored rows would leave one thread with all the work.
    """
    cdef Py_ssize_t rows = (<Py_ssize_t>4 << 20) // (p.vocab * p.itemsize + 1)
    return max(<Py_ssize_t>1, min(rows, p.rows // (8 * threads)))


cdef double forward_rows(const Problem* p, const Output* o, int threads, real tag) noexcept nogil:
    cdef Py_ssize_t row
    cdef Py_ssize_t chunk = rows_per_chunk(p, threads)
    for row in prange(p.rows, num_threads=threads, schedule="dynamic", chunksize=chunk):
        row_forward(p, o, row, tag)
    return sum_rows(p, o, tag)


cdef double sum_rows(const Problem* p, const Output* o, real tag) noexcept nogil:
    cdef double total = 0
    cdef Py_ssize_t row
    for row in range(p.rows):
        total += (<const real*>o.loss)[row]
    return total


cdef void backward_rows(const Problem* p, const Gradient* g, const real* lse, const real* lse_low,
                        const real* grad, Py_ssize_t grad_stride, double grad_scale,
                        const real* grad_lse, int threads) noexcept nogil:
    cdef Py_ssize_t row
    cdef Py_ssize_t chunk = rows_per_chunk(p, threads)
    for row in prange(p.rows, num_threads=threads, schedule="dynamic", chunksize=chunk):
        row_backward_from_lse(
            p, g, row, lse, lse_low, grad[row * grad_stride] * grad_scale, grad_lse)


cdef void row_backward_from_lse(const Problem* p, const Gradient* g, Py_ssize_t row,
                                const real* lse, const real* lse_low, double grad,
                                const real* grad_lse) noexcept nogil:
    cdef Lse[real] saved
    saved.high = lse[row]
    saved.low = lse_low[row]
    row_backward(p, g, row, saved, grad, 0 if grad_lse == NULL else grad_lse[row])


cdef void row_forward_backward(const Problem* p, const Output* o, const Gradient* g,
                               Py_ssize_t row, double grad_scale, real tag) noexcept nogil:
    row_backward(p, g, row, row_forward(p, o, row, tag), grad_scale, 0)


cdef double forward_backward_rows(const Problem* p, const Output* o, const Gradient* g,
                                  double grad_scale, int threads, real tag) noexcept nogil:
    cdef Py_ssize_t row
    cdef Py_ssize_t chunk = rows_per_chunk(p, threads)
    for row in prange(p.rows, num_threads=threads, schedule="dynamic", chunksize=chunk):
        row_forward_backward(p, o, g, row, grad_scale, tag)
    return sum_rows(p, o, tag)


# From Python: addresses, 0 where an array is absent; strides in elements; dtype as in halves.hpp

cdef double softcap_of(int dtype, double softcap) noexcept:
    """0 for none. Beyond the range of what is computed in a cap is none: as inf it would make
    inf * 0. One that rounds to 0 would make 0 / 0, so the smallest normal number takes its place.
    """
    if softcap == 0 or softcap > (DBL_MAX if dtype == FLOAT64 else FLT_MAX):
        return 0
    return max(softcap, <double>(DBL_MIN if dtype == FLOAT64 else FLT_MIN))


cdef Problem make_problem(int dtype, Py_ssize_t rows, Py_ssize_t vocab, uintptr_t logits,
                          Py_ssize_t logits_stride, uintptr_t target, uintptr_t probs,
                          Py_ssize_t probs_stride, uintptr_t weight, int64_t ignore_index,
                          double label_smoothing, double logit_scale, double softcap,
                          double z_loss) noexcept:
    cdef Problem p
    p.dtype = dtype
    p.itemsize = 8 if dtype == FLOAT64 else 4 if dtype == FLOAT32 else 2
    p.blocks = (vocab + BLOCK - 1) // BLOCK
    p.rows = rows
    p.vocab = vocab
    p.logits = <const char*>logits
    p.logits_stride = logits_stride
    p.target = <const int64_t*>target
    p.probs = <const char*>probs
    p.probs_stride = probs_stride
    p.weight = <const void*>weight
    p.ignore_index = ignore_index
    p.label_smoothing = label_smoothing
    p.logit_scale = logit_scale
    p.softcap = softcap_of(dtype, softcap)
    p.z_loss = z_loss
    p.bfloat16_scores = dtype == BFLOAT16 and logit_scale == 1 and p.softcap == 0
    p.bypass_cache = <double>rows * vocab * p.itemsize > LARGEST_CACHE
    p.weight_sum = vocab
    if weight != 0 and label_smoothing != 0:
        if dtype == FLOAT64:
            p.weight_sum = block_sum(<const double*>weight, vocab)
        else:
            p.weight_sum = block_sum(<const float*>weight, vocab)
    return p


def total_weight(Py_ssize_t rows, Py_ssize_t vocab, uintptr_t target, uintptr_t probs,
                 uintptr_t weight, int64_t ignore_index, int dtype):
    """The divisor of the mean: the sum of the counted rows' weights, or the rows for probabilities.

    Raises IndexError for the first target that is neither ignored nor in [0, vocab).
    """
    cdef const int64_t* targets = <const int64_t*>target
    cdef Py_ssize_t row
    cdef int64_t t
    cdef double total = 0
    if probs != 0:
        return float(rows) if vocab else NAN  # as torch, whose rows are numbers / classes
    for row in range(rows):
        t = targets[row]
        if t == ignore_index:
            continue
        if t < 0 or t >= vocab:
            raise IndexError(
                f"target {t} at row {row} is out of range: expected 0 <= target < {vocab}")
        if weight == 0:
            total += 1
        elif dtype == FLOAT64:
            total += (<const double*>weight)[t]
        else:
            total += (<const float*>weight)[t]
    return total


def forward(int dtype, Py_ssize_t rows, Py_ssize_t vocab, uintptr_t logits,
            Py_ssize_t logits_stride, uintptr_t target, uintptr_t probs, Py_ssize_t probs_stride,
            uintptr_t weight, int64_t ignore_index, double label_smoothing, double logit_scale,
            double softcap, double z_loss, uintptr_t loss, uintptr_t lse, uintptr_t lse_low,
            uintptr_t correct, uintptr_t entropy, int threads):
    """Write each row's loss and statistics; return the sum of the losses."""
    cdef Problem p = make_problem(dtype, rows, vocab, logits, logits_stride, target, probs,
                                  probs_stride, weight, ignore_index, label_smoothing, logit_scale,
                                  softcap, z_loss)
    cdef Output o = Output(<void*>loss, <void*>lse, <void*>lse_low, <uint8_t*>correct,
                           <void*>entropy)
    cdef double total
    with nogil:
        if dtype == FLOAT64:
            total = forward_rows(&p, &o, threads, <double>0)
        else:
            total = forward_rows(&p, &o, threads, <float>0)
    return total


def backward(int dtype, Py_ssize_t rows, Py_ssize_t vocab, uintptr_t logits,
             Py_ssize_t logits_stride, uintptr_t target, uintptr_t probs, Py_ssize_t probs_stride,
             uintptr_t weight, int64_t ignore_index, double label_smoothing, double logit_scale,
             double softcap, double z_loss, uintptr_t lse, uintptr_t lse_low, uintptr_t grad,
             Py_ssize_t grad_stride, double grad_scale, uintptr_t grad_lse, uintptr_t out,
             Py_ssize_t out_stride, int threads):
    """Write the gradient of the logits for upstream `grad * grad_scale` and `grad_lse`."""
    cdef Problem p = make_problem(dtype, rows, vocab, logits, logits_stride, target, probs,
                                  probs_stride, weight, ignore_index, label_smoothing, logit_scale,
                                  softcap, z_loss)
    cdef Gradient g = Gradient(<char*>out, out_stride)
    with nogil:
        if dtype == FLOAT64:
            backward_rows(&p, &g, <const double*>lse, <const double*>lse_low, <const double*>grad,
                          grad_stride, grad_scale, <const double*>grad_lse, threads)
        else:
            backward_rows(&p, &g, <const float*>lse, <const float*>lse_low, <const float*>grad,
                          grad_stride, grad_scale, <const float*>grad_lse, threads)


def forward_backward(int dtype, Py_ssize_t rows, Py_ssize_t vocab, uintptr_t logits,
                     Py_ssize_t logits_stride, uintptr_t target, uintptr_t probs,
                     Py_ssize_t probs_stride, uintptr_t weight, int64_t ignore_index,
                     double label_smoothing, double logit_scale, double softcap, double z_loss,
                     uintptr_t loss, uintptr_t lse, uintptr_t lse_low, uintptr_t correct,
                     uintptr_t entropy, double grad_scale, uintptr_t out,
                     Py_ssize_t out_stride, int threads):
    """forward, and while each row is in cache its gradient, for upstream `grad_scale`.

    `out` may be the address of the logits.
    """
    cdef Problem p = make_problem(dtype, rows, vocab, logits, logits_stride, target, probs,
                                  probs_stride, weight, ignore_index, label_smoothing, logit_scale,
                                  softcap, z_loss)
    cdef Output o = Output(<void*>loss, <void*>lse, <void*>lse_low, <uint8_t*>correct,
                           <void*>entropy)
    cdef Gradient g = Gradient(<char*>out, out_stride)
    cdef double total
    with nogil:
        if dtype == FLOAT64:
            total = forward_backward_rows(&p, &o, &g, grad_scale, threads, <double>0)
        else:
            total = forward_backward_rows(&p, &o, &g, grad_scale, threads, <float>0)
    return total
