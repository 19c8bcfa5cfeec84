# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""pairs: row and column log-sum-exps of one tile of similarities, and the gradient of its scores.

A tile is some queries (rows) against some keys (columns), with scores

    z_ij = scale_i * similarity_ij + bias_j,    -inf for an excluded pair

forward   merges the tile into the states (maximum, sum) of its rows and its columns
backward  writes the gradient of z for upstream gradients g of the row and column log-sum-exps,
          g_i e^(z_ij - row_lse_i) + g_j e^(z_ij - column_lse_j), and more at a row's positive
sigmoid   adds up softplus(-z) of each row's positive and softplus(z) of its others (SigLIP)

The functions take addresses. The Numba version, numba/pairs.py, has the same functions.

(a) Cells of 64 rows and 1024 columns are computed independently and merged in one order, so the
    bits do not depend on the number of threads.
(b) `bounded` promises that no score is farther from 0 than 40 (float) or 300 (double). Then e^score
    serves row and column without a maximum: one exp an element, forward and backward. Otherwise
    each row and each column of a cell has its own maximum: with one for the cell, a row whose best
    score is far below another's would vanish.
(c) A row or column whose every pair is excluded has lse -inf and gradient 0.
(d) A column's exps are added up as real for 8 rows, then in double. With all 64 rows in one float,
    the loss of a confident positive among 65 pairs, 1.0e-6, was off by 1.3e-6.
(e) The gradient at a row's positive is formed by expm1 of its log-probabilities: p - 1 would lose
    every digit as p nears 1.
(f) An argument `tag` is not read: its type tells Cython whether to compute in float or in double.
"""

from cython.parallel cimport prange
from libc.math cimport INFINITY, exp, expm1
from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport free, malloc

from block cimport (
    Lse, LseState, block_softmax, block_sum, exp_nonpositive, log_probability, narrow_block, update,
    widen_block,
)
from block_pairs cimport (
    block_exclude, block_exp_sum_of_columns, block_exp_sum_of_row_and_columns, block_flush_sums,
    block_maximum_of_columns, block_pair_gradient, block_pair_gradient_bounded, block_pair_scores,
    block_softplus, softplus,
)

cdef enum:
    FLOAT32 = 0
    FLOAT64 = 1
    CELL_ROWS = 64
    CELL_COLUMNS = 1024
    ROWS_PER_FLUSH = 8

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
    const int64_t* positive         # the column of each row's positive, counted over all tiles
    const int64_t* excluded         # a column that each row leaves out, counted so; -1 for none
    const int64_t* row_group
    const int64_t* column_group
    bint bounded


cdef struct Span:                   # rows or columns start to start + n of the tile
    Py_ssize_t start, n


cdef struct States:
    void* maximum                   # not used if bounded
    double* sum


# The states of each cell: those of its rows by column block, those of its columns by row block.
cdef struct Cells:
    Py_ssize_t row_blocks, column_blocks
    double* row_maximum
    double* row_sum
    double* column_maximum
    double* column_sum


# One margin of the tile, its rows or its columns: log-sum-exps and the gradients that come to them.
cdef struct Marginal:
    const void* lse
    const void* lse_low
    const void* grad                # of the lse, by whatever uses it
    const void* grad_loss           # by row: the part of grad by the loss lse - positive_score


cdef struct Gradient:
    Marginal row, column
    const void* grad_positive_score # by row: of the positive's score, without the losses' part
    char* out
    Py_ssize_t out_stride


# Reading

cdef inline Py_ssize_t index_in_block(const int64_t* columns, const Tile* t, Py_ssize_t row,
                             Span span) noexcept nogil:
    """The index within the block of the column that `columns` names for a row, or -1."""
    cdef Py_ssize_t j
    if columns == NULL:
        return -1
    j = columns[row] - t.first_column - span.start
    return j if 0 <= j < span.n else -1


cdef inline real row_scale(const Tile* t, Py_ssize_t row, real tag) noexcept nogil:
    return (<const real*>t.scale)[row * t.scale_stride]


cdef real pair_scores(const Tile* t, Py_ssize_t row, Span span, real* z) noexcept nogil:
    """Write the block's scores to z; return the positive's before any exclusion, if it is here."""
    cdef const char* source = t.similarity + (row * t.stride + span.start) * t.itemsize
    cdef const real* x = <const real*>source
    cdef const real* bias = NULL
    cdef real scale = row_scale(t, row, <real>0)
    cdef Py_ssize_t j, positive = index_in_block(t.positive, t, row, span)
    cdef real positive_score = 0
    if t.itemsize != sizeof(real):
        if real is float:
            widen_block(source, t.dtype, span.n, z)
        x = z
    if t.bias != NULL and t.bias_stride == 1:
        bias = <const real*>t.bias + span.start
    block_pair_scores(x, span.n, scale, bias, z)
    if t.bias != NULL and t.bias_stride == 0:
        for j in range(span.n):
            z[j] += (<const real*>t.bias)[0]
    if positive >= 0:
        positive_score = z[positive]
    if t.row_group != NULL:
        block_exclude(z, span.n, t.row_group[row], t.column_group + span.start)
        if positive >= 0:
            z[positive] = positive_score
    j = index_in_block(t.excluded, t, row, span)
    if j >= 0:
        z[j] = -INFINITY
    return positive_score


# Forward

cdef inline Span block_span(Py_ssize_t block, Py_ssize_t size, Py_ssize_t whole) noexcept nogil:
    return Span(block * size, min(size, whole - block * size))


cdef inline void row_state(const real* z, Py_ssize_t n, double* maximum,
                           double* total) noexcept nogil:
    cdef LseState[real] state
    update(state, z, n)
    maximum[0] = state.maximum
    total[0] = state.sum


cdef inline void flush_if_due(Py_ssize_t row, Span row_span, Py_ssize_t n, real* partial,
                              double* total) noexcept nogil:
    """Flush the partial sums of n columns after every 8th row of a cell, and after its last."""
    cdef Py_ssize_t done = row - row_span.start + 1
    if done % ROWS_PER_FLUSH == 0 or done == row_span.n:
        block_flush_sums(partial, n, total)


cdef void cell_forward(const Tile* t, const Cells* c, Py_ssize_t row_block, Py_ssize_t column_block,
                       bint with_columns, real* positive_score) noexcept nogil:
    """The states of a cell's rows and columns; without a bound the columns take a second pass."""
    cdef real[CELL_COLUMNS] z
    cdef real[CELL_COLUMNS] maximum
    cdef real[CELL_COLUMNS] partial
    cdef Span row_span = block_span(row_block, CELL_ROWS, t.rows)
    cdef Span span = block_span(column_block, CELL_COLUMNS, t.columns)
    cdef Py_ssize_t row, j
    cdef Py_ssize_t row_offset = column_block * t.rows
    cdef Py_ssize_t column_offset = row_block * t.columns + span.start
    cdef double* column_sum = c.column_sum + column_offset
    cdef real score
    for j in range(span.n):
        maximum[j] = -INFINITY
        partial[j] = 0
        column_sum[j] = 0
    for row in range(row_span.start, row_span.start + row_span.n):
        score = pair_scores(t, row, span, &z[0])
        if positive_score != NULL and index_in_block(t.positive, t, row, span) >= 0:
            positive_score[row] = score
        if t.bounded:
            c.row_sum[row_offset + row] = block_exp_sum_of_row_and_columns(
                &z[0], span.n, &partial[0])
            flush_if_due(row, row_span, span.n, &partial[0], column_sum)
            continue
        row_state(&z[0], span.n, c.row_maximum + row_offset + row, c.row_sum + row_offset + row)
        if with_columns:
            block_maximum_of_columns(&z[0], span.n, &maximum[0])
    if t.bounded or not with_columns:
        return
    for j in range(span.n):
        c.column_maximum[column_offset + j] = maximum[j]
        if maximum[j] == -INFINITY:  # as a shift it would give -inf - -inf = NaN
            maximum[j] = 0
    for row in range(row_span.start, row_span.start + row_span.n):
        pair_scores(t, row, span, &z[0])
        block_exp_sum_of_columns(&z[0], span.n, &maximum[0], &partial[0])
        flush_if_due(row, row_span, span.n, &partial[0], column_sum)


cdef inline void merge_cell(bint bounded, real* maximum, double* total, real cell_maximum,
                            double cell_sum) noexcept nogil:
    """Add one cell's (cell_maximum, cell_sum) to the state (maximum, total)."""
    cdef real larger, shift
    if bounded:
        total[0] += cell_sum
        return
    larger = cell_maximum if cell_maximum > maximum[0] else maximum[0]
    shift = 0 if larger == -INFINITY else larger
    total[0] = (total[0] * exp_nonpositive(<real>(maximum[0] - shift))
                + cell_sum * exp_nonpositive(<real>(cell_maximum - shift)))
    maximum[0] = larger


cdef void merge_cells(bint bounded, const States* s, Py_ssize_t index, const double* maximum,
                      const double* total, Py_ssize_t blocks, Py_ssize_t stride,
                      real tag) noexcept nogil:
    """Add to the state of one row or column what its cells found."""
    cdef Py_ssize_t block
    cdef real none = 0
    for block in range(blocks):
        if bounded:
            merge_cell(True, &none, s.sum + index, none, total[block * stride + index])
        else:
            merge_cell(False, <real*>s.maximum + index, s.sum + index,
                       <real>maximum[block * stride + index], total[block * stride + index])


cdef void tile_forward(const Tile* t, const Cells* c, const States* rows, const States* columns,
                       void* positive_score, int threads, real tag) noexcept nogil:
    cdef Py_ssize_t cell, index
    cdef bint with_columns = columns.sum != NULL
    for cell in prange(c.row_blocks * c.column_blocks, num_threads=threads, schedule="dynamic"):
        cell_forward[real](t, c, cell // c.column_blocks, cell % c.column_blocks, with_columns,
                           <real*>positive_score)
    for index in prange(t.rows, num_threads=threads, schedule="static"):
        merge_cells(t.bounded, rows, index, c.row_maximum, c.row_sum, c.column_blocks, t.rows, tag)
    if with_columns:
        for index in prange(t.columns, num_threads=threads, schedule="static"):
            merge_cells(t.bounded, columns, index, c.column_maximum, c.column_sum, c.row_blocks,
                      t.columns, tag)


# Backward

# What a row or a column adds to the gradient of a score z: factor * e^(z - shift).
cdef struct ScaledExp:
    double factor, shift


cdef ScaledExp scaled_exp_of(const Marginal* m, Py_ssize_t index, bint bounded,
                             real tag) noexcept nogil:
    cdef double high = (<const real*>m.lse)[index], low = (<const real*>m.lse_low)[index]
    cdef double grad = (<const real*>m.grad)[index]
    if high == -INFINITY:  # every pair is excluded: z - lse would be -inf - -inf = NaN
        return ScaledExp(0, 0 if bounded else INFINITY)
    if bounded:
        return ScaledExp(grad * exp(-high - low), 0)
    return ScaledExp(grad * exp(-low), high)


cdef double positive_gradient(const Marginal* m, Py_ssize_t index, Py_ssize_t row,
                              real z) noexcept nogil:
    """What one log-sum-exp adds to the gradient of the positive's score z.

    softmax_weight p + target_weight (p - 1), as in nll.
    """
    cdef Lse[real] lse
    cdef real log_p
    cdef double softmax_weight, target_weight = 0
    lse.high = (<const real*>m.lse)[index]
    lse.low = (<const real*>m.lse_low)[index]
    log_p = -INFINITY if lse.high == -INFINITY else log_probability(z, lse)
    if m.grad_loss != NULL:
        target_weight = (<const real*>m.grad_loss)[row]
    softmax_weight = (<const real*>m.grad)[index] - target_weight
    return softmax_weight * exp_nonpositive(log_p) + target_weight * expm1(log_p)


cdef void row_backward(const Tile* t, const Gradient* g, Py_ssize_t row, const real* factors,
                       const real* shifts) noexcept nogil:
    cdef real[CELL_COLUMNS] z
    cdef real[CELL_COLUMNS] grad_buffer
    cdef Py_ssize_t block, j
    cdef Span span
    cdef char* out
    cdef real* destination
    cdef Lse[real] lse
    cdef double value
    cdef ScaledExp of_row = scaled_exp_of(&g.row, row, t.bounded, <real>0)
    for block in range((t.columns + CELL_COLUMNS - 1) // CELL_COLUMNS):
        span = block_span(block, CELL_COLUMNS, t.columns)
        out = g.out + (row * g.out_stride + span.start) * t.itemsize
        destination = <real*>out if t.itemsize == sizeof(real) else &grad_buffer[0]
        pair_scores(t, row, span, &z[0])
        if t.bounded:
            block_pair_gradient_bounded(&z[0], span.n, <real>of_row.factor, factors + span.start,
                                        destination)
        elif g.column.lse == NULL:
            lse.high = <real>of_row.shift
            lse.low = 0
            block_softmax(<const real*>&z[0], span.n, lse, <real>of_row.factor, destination)
        else:
            block_pair_gradient(&z[0], span.n, <real>of_row.factor, <real>of_row.shift,
                                factors + span.start, shifts + span.start, destination)
        j = index_in_block(t.positive, t, row, span)
        if j >= 0:
            value = positive_gradient(&g.row, row, row, z[j])
            if g.column.lse != NULL:
                value += positive_gradient(&g.column, span.start + j, row, z[j])
            if g.grad_positive_score != NULL:
                value += (<const real*>g.grad_positive_score)[row]
            destination[j] = <real>value
        if real is float:
            if t.itemsize != sizeof(real):
                narrow_block(&grad_buffer[0], t.dtype, span.n, out)


cdef void tile_backward(const Tile* t, const Gradient* g, real* factors, real* shifts,
                        int threads) noexcept nogil:
    cdef Py_ssize_t index
    cdef ScaledExp of_column
    for index in range(t.columns):
        of_column = ScaledExp(0, 0)
        if g.column.lse != NULL:
            of_column = scaled_exp_of(&g.column, index, t.bounded, <real>0)
        factors[index] = <real>of_column.factor
        shifts[index] = <real>of_column.shift
    for index in prange(t.rows, num_threads=threads, schedule="dynamic", chunksize=8):
        row_backward(t, g, index, <const real*>factors, <const real*>shifts)


# The loss by sigmoids

cdef void row_sigmoid(const Tile* t, Py_ssize_t row, real grad_scale, double* loss,
                      double* grad_sum, char* row_out) noexcept nogil:
    """softplus(-z) of the positive and softplus(z) of the others, and their derivatives."""
    cdef real[CELL_COLUMNS] z
    cdef real[CELL_COLUMNS] grad_buffer
    cdef Py_ssize_t block, j
    cdef Span span
    cdef real positive_score, derivative
    cdef char* out
    cdef real* destination
    for block in range((t.columns + CELL_COLUMNS - 1) // CELL_COLUMNS):
        span = block_span(block, CELL_COLUMNS, t.columns)
        out = row_out + span.start * t.itemsize
        destination = <real*>out if t.itemsize == sizeof(real) else &grad_buffer[0]
        positive_score = pair_scores(t, row, span, &z[0])
        j = index_in_block(t.positive, t, row, span)
        if j >= 0:
            z[j] = -INFINITY  # softplus(-inf) = 0
        loss[row] += block_softplus(<const real*>&z[0], span.n, grad_scale, destination)
        if j >= 0:
            derivative = 0
            loss[row] += softplus(<real>-positive_score, derivative)
            destination[j] = -grad_scale * derivative
        grad_sum[row] += block_sum(<const real*>destination, span.n)
        if real is float:
            if t.itemsize != sizeof(real):
                narrow_block(&grad_buffer[0], t.dtype, span.n, out)


cdef void tile_sigmoid(const Tile* t, real grad_scale, double* loss, double* grad_sum,
                       char* out, Py_ssize_t out_stride, int threads) noexcept nogil:
    cdef Py_ssize_t row, step = out_stride * t.itemsize
    for row in prange(t.rows, num_threads=threads, schedule="dynamic", chunksize=8):
        row_sigmoid(t, row, grad_scale, loss, grad_sum, out + row * step)


# From Python: addresses, 0 where an array is absent; strides in elements; dtype as in halves.hpp

cdef Tile make_tile(tuple tile) except *:
    cdef Tile t
    t.dtype, t.rows, t.columns, t.first_column = tile[:4]
    t.itemsize = 8 if t.dtype == FLOAT64 else 4 if t.dtype == FLOAT32 else 2
    t.similarity = <const char*><uintptr_t>tile[4]
    t.stride = tile[5]
    t.scale = <const void*><uintptr_t>tile[6]
    t.scale_stride = tile[7]
    t.bias = <const void*><uintptr_t>tile[8]
    t.bias_stride = tile[9]
    t.positive = <const int64_t*><uintptr_t>tile[10]
    t.excluded = <const int64_t*><uintptr_t>tile[11]
    t.row_group = <const int64_t*><uintptr_t>tile[12]
    t.column_group = <const int64_t*><uintptr_t>tile[13]
    t.bounded = tile[14]
    return t


cdef Marginal make_marginal(tuple marginal) except *:
    cdef Marginal m
    m.lse = <const void*><uintptr_t>marginal[0]
    m.lse_low = <const void*><uintptr_t>marginal[1]
    m.grad = <const void*><uintptr_t>marginal[2]
    m.grad_loss = <const void*><uintptr_t>marginal[3]
    return m


def forward(tuple tile, uintptr_t row_maximum, uintptr_t row_sum, uintptr_t column_maximum,
            uintptr_t column_sum, uintptr_t positive_score, int threads):
    """Merge a tile into the states of its rows and, unless column_sum is 0, of its columns.

    tile: (dtype, rows, columns, first_column, similarity, stride, scale, scale_stride, bias,
    bias_stride, positive, excluded, row_group, column_group, bounded).
    The sums are doubles. The maxima, 0 if bounded, and the positives' scores are of the type that
    is computed in.
    """
    cdef Tile t = make_tile(tile)
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
            tile_forward(&t, &c, &rows, &columns, <void*>positive_score, threads, <double>0)
        else:
            tile_forward(&t, &c, &rows, &columns, <void*>positive_score, threads, <float>0)
        free(memory)


def backward(tuple tile, tuple row, tuple column, uintptr_t grad_positive_score, uintptr_t out,
             Py_ssize_t out_stride, int threads):
    """Write the gradient of a tile's scores; `out` may be the address of its similarities.

    row, column: (lse, lse_low, grad, grad_loss), as in Marginal; column is all 0 where columns do
    not count.
    grad_positive_score: by row, or 0.
    """
    cdef Tile t = make_tile(tile)
    cdef Gradient g = Gradient(make_marginal(row), make_marginal(column),
                               <const void*>grad_positive_score, <char*>out, out_stride)
    cdef void* factors = malloc(2 * max(t.columns, 1) * sizeof(double))
    if factors == NULL:
        raise MemoryError
    with nogil:
        if t.dtype == FLOAT64:
            tile_backward(&t, &g, <double*>factors, <double*>factors + t.columns, threads)
        else:
            tile_backward(&t, &g, <float*>factors, <float*>factors + t.columns, threads)
        free(factors)


def sigmoid(tuple tile, double grad_scale, uintptr_t loss, uintptr_t grad_sum, uintptr_t out,
            Py_ssize_t out_stride, int threads):
    """Add each row's loss and the sum of its gradient to doubles; write the gradient.

    The gradient is that of grad_scale times the loss; `out` as in backward.
    """
    cdef Tile t = make_tile(tile)
    with nogil:
        if t.dtype == FLOAT64:
            tile_sigmoid(&t, <double>grad_scale, <double*>loss, <double*>grad_sum,
                         <char*>out, out_stride, threads)
        else:
            tile_sigmoid(&t, <float>grad_scale, <double*>loss, <double*>grad_sum,
                         <char*>out, out_stride, threads)
