# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""pairs: row and column log-sum-exps of one tile of similarities, and its gradient.

A tile is some queries (rows) against some keys (columns); score = scale * similarity + bias. What
it adds to the states (maximum, sum) of its rows and columns is merged into them, tile after tile.
The Numba twin, numba/pairs.py, has the same names and signatures.

(a) Cells of 64 rows and 1024 columns are worked on independently and merged in one order, so the
    bits do not depend on the number of threads.
(b) `bounded` promises that no score is farther from 0 than 40 (float) or 300 (double). Then e^score
    serves row and column without a maximum: one exp an element, forward and backward. Otherwise
    each row and each column of a cell has its own maximum: a row whose best score is far below
    another's would else vanish.
(c) An excluded pair's score is -inf. A row or column with no other has lse -inf, gradient 0.
(d) A column's exps are added up as real for 8 rows, then in double. With all 64 rows in one float,
    the loss of a sure positive among 65 pairs, 1.0e-6, was off by 1.3e-6.
(e) The gradient at a row's positive is formed by expm1 of its log-probabilities: p - 1 would lose
    every digit as p nears 1.
"""

from cython.parallel cimport prange
from libc.math cimport INFINITY, exp, expm1
from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport free, malloc

from block cimport (
    LogSumExp, Lse, absorb, block_exclude, block_exp_sum_both, block_exp_sum_of_columns,
    block_maximum_of_columns, block_pair_gradient, block_pair_gradient_bounded, block_pair_scores,
    block_pour, block_softmax, block_softplus, block_sum, exp_nonpositive, log_probability, narrow_block,
    softplus, widen_block,
)

cdef enum:
    FLOAT64 = 1
    CELL_ROWS = 64
    CELL_COLUMNS = 1024
    ROWS_IN_REAL = 8

ctypedef fused real:
    float
    double


cdef struct Tile:
    int dtype, itemsize
    Py_ssize_t rows, columns, first_column
    const char* similarity
    Py_ssize_t stride
    const void* scale
    Py_ssize_t scale_stride
    const void* bias
    Py_ssize_t bias_stride
    const int64_t* positive         # column of each row, counted from the first tile's first
    const int64_t* excluded
    const int64_t* row_group
    const int64_t* column_group
    bint bounded


cdef struct Span:
    Py_ssize_t start, n


cdef struct States:
    void* maximum                   # not used if bounded
    double* sum


# What each cell found: of its rows by column block, of its columns by row block.
cdef struct Cells:
    Py_ssize_t row_blocks, column_blocks
    double* row_maximum
    double* row_sum
    double* column_maximum
    double* column_sum


# The gradient that flows in by the log-sum-exps of the rows, or of the columns.
cdef struct Marginal:
    const void* lse
    const void* lse_low
    const void* grad                # of all that holds the lse
    const void* hard                # by row: the part of it that holds lse - score of the positive


cdef struct Gradient:
    Marginal row, column
    const void* positive            # by row: gradient of the positive's score itself
    char* out
    Py_ssize_t out_stride


# Reading

cdef inline Py_ssize_t place(const int64_t* columns, const Tile* t, Py_ssize_t row,
                             Span at) noexcept nogil:
    """Where in the block the column is that a row names, or -1."""
    cdef Py_ssize_t j
    if columns == NULL:
        return -1
    j = columns[row] - t.first_column - at.start
    return j if 0 <= j < at.n else -1


cdef inline real scale_of(const Tile* t, Py_ssize_t row, real tag) noexcept nogil:
    return (<const real*>t.scale)[row * t.scale_stride]


cdef real pair_scores(const Tile* t, Py_ssize_t row, Span at, real* z) noexcept nogil:
    """Fill z with the block's scores; return the positive's before any exclusion, if it is here."""
    cdef const char* source = t.similarity + (row * t.stride + at.start) * t.itemsize
    cdef const real* x = <const real*>source
    cdef const real* bias = NULL
    cdef real scale = scale_of(t, row, <real>0)
    cdef Py_ssize_t j, positive = place(t.positive, t, row, at)
    cdef real score = 0
    if t.itemsize != sizeof(real):
        if real is float:
            widen_block(source, t.dtype, at.n, z)
        x = z
    if t.bias != NULL and t.bias_stride == 1:
        bias = <const real*>t.bias + at.start
    block_pair_scores(x, at.n, scale, bias, z)
    if t.bias != NULL and t.bias_stride == 0:
        for j in range(at.n):
            z[j] += (<const real*>t.bias)[0]
    if positive >= 0:
        score = z[positive]
    if t.row_group != NULL:
        block_exclude(z, at.n, t.row_group[row], t.column_group + at.start)
        if positive >= 0:
            z[positive] = score
    j = place(t.excluded, t, row, at)
    if j >= 0:
        z[j] = -INFINITY
    return score


# Forward

cdef inline Span cut(Py_ssize_t block, Py_ssize_t size, Py_ssize_t whole) noexcept nogil:
    return Span(block * size, min(size, whole - block * size))


cdef inline void row_state(const real* z, Py_ssize_t n, double* maximum,
                           double* total) noexcept nogil:
    cdef LogSumExp[real] state
    absorb(state, z, n)
    maximum[0] = state.maximum
    total[0] = state.sum


cdef inline void pour(Py_ssize_t row, Span down, Span at, real* total, double* to) noexcept nogil:
    """After every 8th row of a cell and its last."""
    cdef Py_ssize_t done = row - down.start + 1
    if done % ROWS_IN_REAL == 0 or done == down.n:
        block_pour(total, at.n, to)


cdef void cell_forward(const Tile* t, const Cells* c, Py_ssize_t row_block, Py_ssize_t column_block,
                       bint columns, real* positive) noexcept nogil:
    cdef real[CELL_COLUMNS] z
    cdef real[CELL_COLUMNS] maximum
    cdef real[CELL_COLUMNS] total
    cdef Span down = cut(row_block, CELL_ROWS, t.rows)
    cdef Span at = cut(column_block, CELL_COLUMNS, t.columns)
    cdef Py_ssize_t row, j
    cdef Py_ssize_t in_rows = column_block * t.rows
    cdef Py_ssize_t in_columns = row_block * t.columns + at.start
    cdef double* column_sum = c.column_sum + in_columns
    cdef real score
    for j in range(at.n):
        maximum[j] = -INFINITY
        total[j] = 0
        column_sum[j] = 0
    for row in range(down.start, down.start + down.n):
        score = pair_scores(t, row, at, &z[0])
        if positive != NULL and place(t.positive, t, row, at) >= 0:
            positive[row] = score
        if t.bounded:
            c.row_sum[in_rows + row] = block_exp_sum_both(&z[0], at.n, &total[0])
            pour(row, down, at, &total[0], column_sum)
            continue
        row_state(&z[0], at.n, c.row_maximum + in_rows + row, c.row_sum + in_rows + row)
        if columns:
            block_maximum_of_columns(&z[0], at.n, &maximum[0])
    if t.bounded or not columns:
        return
    for j in range(at.n):
        c.column_maximum[in_columns + j] = maximum[j]
        if maximum[j] == -INFINITY:
            maximum[j] = 0
    for row in range(down.start, down.start + down.n):
        pair_scores(t, row, at, &z[0])
        block_exp_sum_of_columns(&z[0], at.n, &maximum[0], &total[0])
        pour(row, down, at, &total[0], column_sum)


cdef inline void merge(bint bounded, real* maximum, double* total, real of_cell,
                       double sum_of_cell) noexcept nogil:
    cdef real larger, shift
    if bounded:
        total[0] += sum_of_cell
        return
    larger = of_cell if of_cell > maximum[0] else maximum[0]
    shift = 0 if larger == -INFINITY else larger
    total[0] = (total[0] * exp_nonpositive(<real>(maximum[0] - shift))
                + sum_of_cell * exp_nonpositive(<real>(of_cell - shift)))
    maximum[0] = larger


cdef void merge_all(bint bounded, const States* s, Py_ssize_t index, const double* maximum,
                    const double* total, Py_ssize_t blocks, Py_ssize_t stride,
                    real tag) noexcept nogil:
    """Into the state of one row or column, what its cells found."""
    cdef Py_ssize_t block
    cdef real none = 0
    for block in range(blocks):
        if bounded:
            merge(True, &none, s.sum + index, none, total[block * stride + index])
        else:
            merge(False, <real*>s.maximum + index, s.sum + index,
                  <real>maximum[block * stride + index], total[block * stride + index])


cdef void tile_forward(const Tile* t, const Cells* c, const States* rows, const States* columns,
                       void* positive, int threads, real tag) noexcept nogil:
    cdef Py_ssize_t cell, index
    cdef bint both = columns.sum != NULL
    for cell in prange(c.row_blocks * c.column_blocks, num_threads=threads, schedule="dynamic"):
        cell_forward[real](t, c, cell // c.column_blocks, cell % c.column_blocks, both,
                           <real*>positive)
    for index in prange(t.rows, num_threads=threads, schedule="static"):
        merge_all(t.bounded, rows, index, c.row_maximum, c.row_sum, c.column_blocks, t.rows, tag)
    if both:
        for index in prange(t.columns, num_threads=threads, schedule="static"):
            merge_all(t.bounded, columns, index, c.column_maximum, c.column_sum, c.row_blocks,
                      t.columns, tag)


# Backward

# What a row or a column multiplies its exps by, and what it takes from the scores first.
cdef struct Factor:
    double factor, shift


cdef Factor factor_of(const Marginal* m, Py_ssize_t index, bint bounded, real tag) noexcept nogil:
    cdef double high = (<const real*>m.lse)[index], low = (<const real*>m.lse_low)[index]
    cdef double grad = (<const real*>m.grad)[index]
    if high == -INFINITY:  # no pair counts: -inf - -inf would be NaN
        return Factor(0, 0 if bounded else INFINITY)
    if bounded:
        return Factor(grad * exp(-high - low), 0)
    return Factor(grad * exp(-low), high)


cdef double at_positive(const Marginal* m, Py_ssize_t index, Py_ssize_t row, real z) noexcept nogil:
    """The gradient of the positive's score by way of one log-sum-exp."""
    cdef Lse[real] lse
    cdef real log_p
    cdef double hard = 0
    lse.high = (<const real*>m.lse)[index]
    lse.low = (<const real*>m.lse_low)[index]
    log_p = -INFINITY if lse.high == -INFINITY else log_probability(z, lse)
    if m.hard != NULL:
        hard = (<const real*>m.hard)[row]
    return ((<const real*>m.grad)[index] - hard) * exp_nonpositive(log_p) + hard * expm1(log_p)


cdef void row_backward(const Tile* t, const Gradient* g, Py_ssize_t row, const real* factors,
                       const real* shifts) noexcept nogil:
    cdef real[CELL_COLUMNS] z
    cdef real[CELL_COLUMNS] result
    cdef Py_ssize_t block, j
    cdef Span at
    cdef char* out
    cdef real* written
    cdef Lse[real] lse
    cdef double value
    cdef Factor f = factor_of(&g.row, row, t.bounded, <real>0)
    for block in range((t.columns + CELL_COLUMNS - 1) // CELL_COLUMNS):
        at = cut(block, CELL_COLUMNS, t.columns)
        out = g.out + (row * g.out_stride + at.start) * t.itemsize
        written = <real*>out if t.itemsize == sizeof(real) else &result[0]
        pair_scores(t, row, at, &z[0])
        if t.bounded:
            block_pair_gradient_bounded(&z[0], at.n, <real>f.factor, factors + at.start, written)
        elif g.column.lse == NULL:
            lse.high = <real>f.shift
            lse.low = 0
            block_softmax(<const real*>&z[0], at.n, lse, <real>f.factor, written)
        else:
            block_pair_gradient(&z[0], at.n, <real>f.factor, <real>f.shift, factors + at.start,
                                shifts + at.start, written)
        j = place(t.positive, t, row, at)
        if j >= 0:
            value = at_positive(&g.row, row, row, z[j])
            if g.column.lse != NULL:
                value += at_positive(&g.column, at.start + j, row, z[j])
            if g.positive != NULL:
                value += (<const real*>g.positive)[row]
            written[j] = <real>value
        if real is float:
            if t.itemsize != sizeof(real):
                narrow_block(&result[0], t.dtype, at.n, out)


cdef void tile_backward(const Tile* t, const Gradient* g, real* factors, real* shifts,
                        int threads) noexcept nogil:
    cdef Py_ssize_t index
    cdef Factor f
    for index in range(t.columns):
        f = Factor(0, 0)
        if g.column.lse != NULL:
            f = factor_of(&g.column, index, t.bounded, <real>0)
        factors[index] = <real>f.factor
        shifts[index] = <real>f.shift
    for index in prange(t.rows, num_threads=threads, schedule="dynamic", chunksize=8):
        row_backward(t, g, index, <const real*>factors, <const real*>shifts)


# The loss by sigmoids

cdef void row_sigmoid(const Tile* t, Py_ssize_t row, real grad_scale, double* loss, double* grad,
                      char* row_out) noexcept nogil:
    """softplus(-z) of the positive and softplus(z) of the others, and their derivatives."""
    cdef real[CELL_COLUMNS] z
    cdef real[CELL_COLUMNS] result
    cdef Py_ssize_t block, j
    cdef Span at
    cdef real score, derivative
    cdef char* out
    cdef real* written
    for block in range((t.columns + CELL_COLUMNS - 1) // CELL_COLUMNS):
        at = cut(block, CELL_COLUMNS, t.columns)
        out = row_out + at.start * t.itemsize
        written = <real*>out if t.itemsize == sizeof(real) else &result[0]
        score = pair_scores(t, row, at, &z[0])
        j = place(t.positive, t, row, at)
        if j >= 0:
            z[j] = -INFINITY  # adds nothing
        loss[row] += block_softplus(<const real*>&z[0], at.n, grad_scale, written)
        if j >= 0:
            derivative = 0
            loss[row] += softplus(<real>-score, derivative)
            written[j] = -grad_scale * derivative
        grad[row] += block_sum(<const real*>written, at.n)
        if real is float:
            if t.itemsize != sizeof(real):
                narrow_block(&result[0], t.dtype, at.n, out)


cdef void tile_sigmoid(const Tile* t, real grad_scale, double* loss, double* grad, char* out,
                       Py_ssize_t out_stride, int threads) noexcept nogil:
    cdef Py_ssize_t row, step = out_stride * t.itemsize
    for row in prange(t.rows, num_threads=threads, schedule="dynamic", chunksize=8):
        row_sigmoid(t, row, grad_scale, loss, grad, out + row * step)


# From Python

cdef Tile tile_of(tuple given) except *:
    cdef Tile t
    t.dtype, t.rows, t.columns, t.first_column = given[:4]
    t.itemsize = 8 if t.dtype == FLOAT64 else 4 if t.dtype == 0 else 2
    t.similarity = <const char*><uintptr_t>given[4]
    t.stride = given[5]
    t.scale = <const void*><uintptr_t>given[6]
    t.scale_stride = given[7]
    t.bias = <const void*><uintptr_t>given[8]
    t.bias_stride = given[9]
    t.positive = <const int64_t*><uintptr_t>given[10]
    t.excluded = <const int64_t*><uintptr_t>given[11]
    t.row_group = <const int64_t*><uintptr_t>given[12]
    t.column_group = <const int64_t*><uintptr_t>given[13]
    t.bounded = given[14]
    return t


cdef Marginal marginal_of(tuple given) except *:
    cdef Marginal m
    m.lse = <const void*><uintptr_t>given[0]
    m.lse_low = <const void*><uintptr_t>given[1]
    m.grad = <const void*><uintptr_t>given[2]
    m.hard = <const void*><uintptr_t>given[3]
    return m


def forward(tuple tile, uintptr_t row_maximum, uintptr_t row_sum, uintptr_t column_maximum,
            uintptr_t column_sum, uintptr_t positive, int threads):
    """Merge a tile into the states of its rows and, unless column_sum is 0, of its columns.

    tile: (dtype, rows, columns, first_column, similarity, stride, scale, scale_stride, bias,
    bias_stride, positive, excluded, row_group, column_group, bounded); 0 for an absent address.
    Sums are doubles; maxima, absent if bounded, and the positives' scores are real.
    """
    cdef Tile t = tile_of(tile)
    cdef States rows = States(<void*>row_maximum, <double*>row_sum)
    cdef States columns = States(<void*>column_maximum, <double*>column_sum)
    cdef Cells c
    c.row_blocks = (t.rows + CELL_ROWS - 1) // CELL_ROWS
    c.column_blocks = (t.columns + CELL_COLUMNS - 1) // CELL_COLUMNS
    cdef Py_ssize_t of_rows = c.column_blocks * t.rows, of_columns = c.row_blocks * t.columns
    cdef double* memory = <double*>malloc((2 * (of_rows + of_columns) + 1) * sizeof(double))
    if memory == NULL:
        raise MemoryError
    c.row_maximum, c.row_sum = memory, memory + of_rows
    c.column_maximum, c.column_sum = memory + 2 * of_rows, memory + 2 * of_rows + of_columns
    with nogil:
        if t.dtype == FLOAT64:
            tile_forward(&t, &c, &rows, &columns, <void*>positive, threads, <double>0)
        else:
            tile_forward(&t, &c, &rows, &columns, <void*>positive, threads, <float>0)
        free(memory)


def backward(tuple tile, tuple row, tuple column, uintptr_t positive, uintptr_t out,
             Py_ssize_t out_stride, int threads):
    """Write the gradient of a tile's scores, over its similarities if `out` is where they lie.

    row, column: (lse, lse_low, grad, hard), as in Marginal; column all 0 where only rows count.
    positive: the gradient of the positives' scores, by row, or 0.
    """
    cdef Tile t = tile_of(tile)
    cdef Gradient g = Gradient(marginal_of(row), marginal_of(column), <const void*>positive,
                               <char*>out, out_stride)
    cdef void* factors = malloc(2 * max(t.columns, 1) * sizeof(double))
    if factors == NULL:
        raise MemoryError
    with nogil:
        if t.dtype == FLOAT64:
            tile_backward(&t, &g, <double*>factors, <double*>factors + t.columns, threads)
        else:
            tile_backward(&t, &g, <float*>factors, <float*>factors + t.columns, threads)
        free(factors)


def sigmoid(tuple tile, double grad_scale, uintptr_t loss, uintptr_t grad, uintptr_t out,
            Py_ssize_t out_stride, int threads):
    """Add each row's loss by sigmoids, and its gradient's sum, to doubles; write the gradient.

    The gradient is that of grad_scale times the loss; `out` as in backward.
    """
    cdef Tile t = tile_of(tile)
    with nogil:
        if t.dtype == FLOAT64:
            tile_sigmoid(&t, <double>grad_scale, <double*>loss, <double*>grad, <char*>out,
                         out_stride, threads)
        else:
            tile_sigmoid(&t, <float>grad_scale, <double*>loss, <double*>grad, <char*>out,
                         out_stride, threads)
