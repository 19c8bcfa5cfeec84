# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""nll: fused log-softmax and negative log-likelihood, forward, backward and both at once.

Works on addresses, not arrays, so that torch's bfloat16 comes in without a copy and the caller may
be torch or NumPy. The Numba twin, numba/nll.py, has the same names and signatures.

(a) A row is walked in blocks of 2048 numbers that stay in L1: their maximum, then their exp-sum,
    merged by the online rule. One read of memory gives the row's log-sum-exp.
(b) What needs the finished lse (label smoothing, probability targets, entropy) walks the row again
    from L2. Accumulating it online would cancel at large logits, and the second walk is hidden
    behind the first one's memory time.
(c) The target's own gradient is formed by expm1 of its log-probability: p - 1 would lose every
    digit as p nears 1.
(d) Rows are independent and each is walked by one thread in one order, so the bits do not depend
    on the number of threads. The one sum over rows is serial.
"""

from cython.parallel cimport prange
from libc.math cimport INFINITY, NAN, expm1, isnan
from libc.stdint cimport int64_t, uint8_t, uintptr_t

from block cimport (
    LogSumExp, Lse, absorb, bfloat16, block_affine, block_contains, block_log_probability_dot,
    block_log_probability_sum, block_multiply, block_negative_entropy, block_scale, block_softcap,
    block_softcap_backward, block_softmax, block_subtract, block_sum, exp_nonpositive, finish,
    log_probability, narrow, narrow_block, widen, widen_block, zero_bytes,
)

cdef enum:
    FLOAT64 = 1
    BFLOAT16 = 2
    BLOCK = 2048
    LARGEST_CACHE = 64 << 20

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
    bint plain_bfloat16     # scores are the logits as they lie
    bint past_caches        # the gradient is larger than any cache
    Py_ssize_t blocks


cdef struct Span:
    Py_ssize_t start, n


cdef struct Output:
    void* loss
    void* lse
    void* lse_low
    uint8_t* correct
    void* entropy


cdef struct Factors:
    Py_ssize_t target
    double hard, soft, spread


cdef struct Gradient:
    char* out
    Py_ssize_t stride


# Reading a block

cdef inline Span span(const Problem* p, Py_ssize_t block) noexcept nogil:
    return Span(block * BLOCK, min(<Py_ssize_t>BLOCK, p.vocab - block * BLOCK))


cdef inline const real* widened(const Problem* p, const char* source, real* buffer,
                                Py_ssize_t n) noexcept nogil:
    """The block at `source` as real numbers: in place if they are, else through `buffer`."""
    if p.itemsize == sizeof(real):
        return <const real*>source
    if real is float:
        widen_block(source, p.dtype, n, buffer)
    return buffer


cdef inline const real* scores(const Problem* p, Py_ssize_t row, Span at,
                               real* buffer) noexcept nogil:
    """The block of logits after scale and cap: the z of the formulas."""
    cdef const char* source = p.logits + (row * p.logits_stride + at.start) * p.itemsize
    cdef const real* z = widened(p, source, buffer, at.n)
    cdef Py_ssize_t j
    if p.logit_scale == 1 and p.softcap == 0:
        return z
    for j in range(at.n):
        buffer[j] = z[j] * <real>p.logit_scale
    if p.softcap != 0:
        block_softcap(buffer, at.n, <real>p.softcap)
    return buffer


cdef inline const bfloat16* bfloat16_logits(const Problem* p, Py_ssize_t row,
                                            Span at) noexcept nogil:
    return <const bfloat16*>(p.logits + (row * p.logits_stride + at.start) * p.itemsize)


cdef inline const real* coefficients(const Problem* p, Py_ssize_t row, Span at,
                                     real* buffer) noexcept nogil:
    """The weight of each log-probability in a row with a probability target, w_c q'_c."""
    cdef const char* source = p.probs + (row * p.probs_stride + at.start) * p.itemsize
    cdef const real* q = widened(p, source, buffer, at.n)
    cdef real keep = <real>(1 - p.label_smoothing)
    cdef real spread = <real>(p.label_smoothing / p.vocab)
    cdef Py_ssize_t j
    if p.label_smoothing == 0 and p.weight == NULL:
        return q
    for j in range(at.n):
        buffer[j] = q[j] * keep + spread
    if p.weight != NULL:
        block_multiply(buffer, <const real*>p.weight + at.start, at.n)
    return buffer


# One row

cdef inline bint ignored(const Problem* p, Py_ssize_t row) noexcept nogil:
    return p.target != NULL and p.target[row] == p.ignore_index


cdef inline double target_weight(const Problem* p, Py_ssize_t row, real tag) noexcept nogil:
    if p.weight == NULL:
        return 1
    return (<const real*>p.weight)[p.target[row]]


cdef inline real score_at(const Problem* p, Py_ssize_t row, Py_ssize_t column,
                          real tag) noexcept nogil:
    cdef real buffer[1]
    return scores(p, row, Span(column, 1), &buffer[0])[0]


cdef Lse[real] row_lse(const Problem* p, Py_ssize_t row, real* buffer,
                       real* maximum) noexcept nogil:
    cdef LogSumExp[real] state
    cdef Py_ssize_t block
    cdef Span at
    for block in range(p.blocks):
        at = span(p, block)
        if p.plain_bfloat16:
            if real is float:
                absorb(state, bfloat16_logits(p, row, at), at.n)
        else:
            absorb(state, scores(p, row, at, buffer), at.n)
    maximum[0] = state.maximum
    return finish(state)


cdef double row_loss_of_index(const Problem* p, Py_ssize_t row, Lse[real] lse,
                              real* buffer) noexcept nogil:
    cdef real zero = 0
    cdef double w = target_weight(p, row, zero)
    cdef double total = 0
    cdef Py_ssize_t block
    cdef Span at
    cdef const real* z
    cdef double loss = -(1 - p.label_smoothing) * w * log_probability(
        score_at(p, row, p.target[row], zero), lse)
    if p.label_smoothing != 0:
        for block in range(p.blocks):
            at = span(p, block)
            z = scores(p, row, at, buffer)
            if p.weight == NULL:
                total += block_log_probability_sum(z, at.n, lse)
            else:
                total += block_log_probability_dot(z, <const real*>p.weight + at.start, at.n, lse)
        loss -= p.label_smoothing / p.vocab * total
    if p.z_loss != 0:
        loss += p.z_loss * w * (<double>lse.high * lse.high)
    return loss


cdef double row_loss_of_probs(const Problem* p, Py_ssize_t row, Lse[real] lse,
                              real* buffer, real* second) noexcept nogil:
    cdef double total = 0
    cdef Py_ssize_t block
    cdef Span at
    for block in range(p.blocks):
        at = span(p, block)
        total += block_log_probability_dot(
            scores(p, row, at, buffer), coefficients(p, row, at, second), at.n, lse)
    if p.z_loss != 0:
        return p.z_loss * (<double>lse.high * lse.high) - total
    return -total


cdef double row_entropy(const Problem* p, Py_ssize_t row, Lse[real] lse,
                        real* buffer) noexcept nogil:
    cdef double total = 0
    cdef Py_ssize_t block
    cdef Span at
    for block in range(p.blocks):
        at = span(p, block)
        total += block_negative_entropy(scores(p, row, at, buffer), at.n, lse)
    return -total


cdef bint row_correct(const Problem* p, Py_ssize_t row, real maximum, Lse[real] lse,
                      real* buffer) noexcept nogil:
    """Whether the target is where argmax would look: the first of the maxima."""
    cdef Py_ssize_t block, target
    cdef Span at
    cdef bint nan_among_finite = isnan(lse.high) and maximum < INFINITY
    if p.target == NULL or ignored(p, row) or nan_among_finite:
        return False
    target = p.target[row]
    if not score_at(p, row, target, maximum) == maximum:
        return False
    for block in range(target // BLOCK + 1):
        at = span(p, block)
        at.n = min(at.n, target - at.start)
        if block_contains(scores(p, row, at, buffer), at.n, maximum):
            return False
    return True


cdef Lse[real] row_forward(const Problem* p, const Output* o, Py_ssize_t row,
                           real tag) noexcept nogil:
    cdef real[BLOCK] buffer
    cdef real[BLOCK] second
    cdef real maximum = 0
    cdef double loss = 0
    cdef Lse[real] lse
    lse.high = 0
    lse.low = 0
    if not ignored(p, row) or o.correct != NULL or o.entropy != NULL:
        lse = row_lse(p, row, &buffer[0], &maximum)
    if p.probs != NULL:
        loss = row_loss_of_probs(p, row, lse, &buffer[0], &second[0])
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
    cdef Span at
    for block in range(p.blocks):
        at = span(p, block)
        total += block_sum(coefficients(p, row, at, buffer), at.n)
    return total


cdef Factors row_factors(const Problem* p, Py_ssize_t row, Lse[real] lse, double grad,
                         double grad_lse, real* buffer) noexcept nogil:
    """The row's gradient is soft * p, plus hard * (p - 1) at the target, less grad * w_c q'_c."""
    cdef double w = 1, eps = p.label_smoothing
    cdef Factors f = Factors(-1, 0, grad_lse, 0)
    if ignored(p, row):
        return f
    f.spread = grad
    if p.probs != NULL:
        f.soft += grad * row_coefficient_sum(p, row, buffer)
    else:
        w = target_weight(p, row, lse.high)
        f.target = p.target[row]
        f.hard = grad * (1 - eps) * w
        f.spread = grad * eps / p.vocab if eps != 0 else 0
        f.soft += f.spread * p.weight_sum
    if p.z_loss != 0:
        f.soft += grad * 2 * p.z_loss * w * lse.high
    return f


cdef void subtract_target(const Problem* p, Py_ssize_t row, Span at, const Factors* f,
                          real* grad, real* buffer) noexcept nogil:
    """Take off the part of the target that is spread over the vocabulary."""
    if p.probs != NULL:
        block_subtract(grad, coefficients(p, row, at, buffer), at.n, <real>f.spread)
    elif p.weight != NULL:
        block_subtract(grad, <const real*>p.weight + at.start, at.n, <real>f.spread)
    else:
        block_affine(grad, at.n, <real>1, <real>-f.spread)


cdef void block_backward(const Problem* p, Py_ssize_t row, Span at, Lse[real] lse,
                         const Factors* f, const real* z, real* grad,
                         real* buffer) noexcept nogil:
    cdef Py_ssize_t target = f.target - at.start
    cdef bint here = 0 <= target < at.n
    cdef real log_p = 0
    if here:  # read before the block is written: grad may lie where z does
        log_p = log_probability(z[target], lse)
    block_softmax(z, at.n, lse, <real>(f.hard + f.soft), grad)
    if here:
        grad[target] = <real>target_gradient(f, log_p)
    if f.spread != 0:
        subtract_target(p, row, at, f, grad, buffer)
    if p.softcap != 0:
        block_softcap_backward(grad, z, at.n, <real>p.softcap)
    if p.logit_scale != 1:
        block_scale(grad, at.n, <real>p.logit_scale)


cdef void plain_backward(const Problem* p, bfloat16* out, Py_ssize_t row, Lse[float] lse,
                         const Factors* f) noexcept nogil:
    """A row of bfloat16 with an index target and no option that needs a block of floats."""
    cdef const bfloat16* z = bfloat16_logits(p, row, Span(0, p.vocab))
    cdef float log_p
    if f.target < 0:
        block_softmax(z, p.vocab, lse, <float>f.soft, out)
        return
    log_p = log_probability(widen(z[f.target]), lse)
    block_softmax(z, p.vocab, lse, <float>(f.hard + f.soft), out)
    narrow(<float>target_gradient(f, log_p), out[f.target])


cdef inline double target_gradient(const Factors* f, real log_p) noexcept nogil:
    return f.soft * exp_nonpositive(log_p) + f.hard * expm1(log_p)


cdef void row_backward(const Problem* p, const Gradient* g, Py_ssize_t row, Lse[real] lse,
                       double grad, double grad_lse) noexcept nogil:
    """One row of the gradient, for upstream `grad` of the loss and `grad_lse` of the lse."""
    cdef real[BLOCK] buffer
    cdef real[BLOCK] second
    cdef real[BLOCK] result
    cdef bint direct = p.itemsize == sizeof(real)
    cdef Py_ssize_t block
    cdef Span at
    cdef char* out
    cdef real* written
    cdef Factors f = row_factors(p, row, lse, grad, grad_lse, &second[0])
    if ignored(p, row) and grad_lse == 0:  # exactly zero, even where the logits are NaN
        zero_bytes(g.out + row * g.stride * p.itemsize, p.vocab * p.itemsize, p.past_caches)
        return
    if p.plain_bfloat16 and p.probs == NULL and f.spread == 0:
        if real is float:
            plain_backward(p, <bfloat16*>(g.out + row * g.stride * p.itemsize), row, lse, &f)
        return
    for block in range(p.blocks):
        at = span(p, block)
        out = g.out + (row * g.stride + at.start) * p.itemsize
        written = <real*>out if direct else &result[0]
        block_backward(p, row, at, lse, &f, scores(p, row, at, &buffer[0]), written, &second[0])
        if real is float:
            if not direct:
                narrow_block(&result[0], p.dtype, at.n, out)


# All rows

cdef Py_ssize_t rows_at_once(const Problem* p, int threads) noexcept nogil:
    """How many rows a thread takes at a time: up to 4 MB, so that two threads seldom fault on one
    new huge page (both clear it, and one clears in vain: with 256 KB a backward into new memory
    took 29 ms for 20), and at most an eighth of its share, so that a prompt of ignored rows does
    not leave one thread with all the work."""
    cdef Py_ssize_t rows = (<Py_ssize_t>4 << 20) // (p.vocab * p.itemsize + 1)
    return max(<Py_ssize_t>1, min(rows, p.rows // (8 * threads)))


cdef double forward_rows(const Problem* p, const Output* o, int threads, real tag) noexcept nogil:
    cdef Py_ssize_t row
    for row in prange(p.rows, num_threads=threads, schedule="dynamic", chunksize=rows_at_once(p, threads)):
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
    cdef Py_ssize_t chunk = rows_at_once(p, threads)
    for row in prange(p.rows, num_threads=threads, schedule="dynamic", chunksize=chunk):
        backward_one(p, g, row, lse, lse_low, grad[row * grad_stride] * grad_scale, grad_lse)


cdef void backward_one(const Problem* p, const Gradient* g, Py_ssize_t row, const real* lse,
                       const real* lse_low, double grad, const real* grad_lse) noexcept nogil:
    cdef Lse[real] saved
    saved.high = lse[row]
    saved.low = lse_low[row]
    row_backward(p, g, row, saved, grad, 0 if grad_lse == NULL else grad_lse[row])


cdef void forward_backward_one(const Problem* p, const Output* o, const Gradient* g, Py_ssize_t row,
                    double grad_scale, real tag) noexcept nogil:
    row_backward(p, g, row, row_forward(p, o, row, tag), grad_scale, 0)


cdef double forward_backward_rows(const Problem* p, const Output* o, const Gradient* g, double grad_scale,
                       int threads, real tag) noexcept nogil:
    cdef Py_ssize_t row
    cdef Py_ssize_t chunk = rows_at_once(p, threads)
    for row in prange(p.rows, num_threads=threads, schedule="dynamic", chunksize=chunk):
        forward_backward_one(p, o, g, row, grad_scale, tag)
    return sum_rows(p, o, tag)


# From Python

cdef Problem problem(int dtype, Py_ssize_t rows, Py_ssize_t vocab, uintptr_t logits,
                     Py_ssize_t logits_stride, uintptr_t target, uintptr_t probs,
                     Py_ssize_t probs_stride, uintptr_t weight, int64_t ignore_index,
                     double label_smoothing, double logit_scale, double softcap,
                     double z_loss) noexcept:
    cdef Problem p
    p.dtype = dtype
    p.itemsize = 8 if dtype == FLOAT64 else 4 if dtype == 0 else 2
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
    p.softcap = softcap
    p.z_loss = z_loss
    p.plain_bfloat16 = dtype == BFLOAT16 and logit_scale == 1 and softcap == 0
    p.past_caches = <double>rows * vocab * p.itemsize > LARGEST_CACHE
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
    cdef Problem p = problem(dtype, rows, vocab, logits, logits_stride, target, probs,
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
    cdef Problem p = problem(dtype, rows, vocab, logits, logits_stride, target, probs,
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
          Py_ssize_t logits_stride, uintptr_t target, uintptr_t probs, Py_ssize_t probs_stride,
          uintptr_t weight, int64_t ignore_index, double label_smoothing, double logit_scale,
          double softcap, double z_loss, uintptr_t loss, uintptr_t lse, uintptr_t correct,
          uintptr_t entropy, double grad_scale, uintptr_t out, Py_ssize_t out_stride, int threads):
    """Forward, and while each row is in cache its gradient for upstream `grad_scale`.

    `out` may be the logits themselves.
    """
    cdef Problem p = problem(dtype, rows, vocab, logits, logits_stride, target, probs,
                             probs_stride, weight, ignore_index, label_smoothing, logit_scale,
                             softcap, z_loss)
    cdef Output o = Output(<void*>loss, <void*>lse, NULL, <uint8_t*>correct, <void*>entropy)
    cdef Gradient g = Gradient(<char*>out, out_stride)
    cdef double total
    with nogil:
        if dtype == FLOAT64:
            total = forward_backward_rows(&p, &o, &g, grad_scale, threads, <double>0)
        else:
            total = forward_backward_rows(&p, &o, &g, grad_scale, threads, <float>0)
    return total
