// infonce on CUDA: what one tile of similarities adds to the log-sum-exps of its rows and columns,
// and its gradient; and the loss by sigmoids. The schedules over tiles and the matmuls are those of
// python/neglog/ops/infonce.py and siglip.py.
//
// Compiled for sm_80, sm_90a and sm_100, run on the CPU by emulated.hpp, not yet on a GPU; no speed
// is claimed. The formulas and the edge cases are those of kernels/infonce.pyx.
//
// (a) A warp walks a cell of 64 rows and two 16-byte vectors of each lane: it reads the cell once and
//     needs no shared memory and no barrier. Of a row it finds the maximum, then the sum, by
//     shuffles; of its columns each lane keeps the online states to itself.
// (b) What cells found is merged into the states of rows and columns by a second kernel, in one order
//     and in double. No atomics: a tile's bits depend on its shape, its dtype and its alignment alone.
// (c) A column's sum over 64 rows is kept as two numbers: in one float the loss of a sure positive
//     among 65 pairs, 1e-6, was off by as much on the CPU.
// (d) The gradient at a row's positive is formed by expm1: p - 1 would lose every digit as p nears 1.
// (e) The host never waits, so a whole loss can be captured in a CUDA graph.

#include "tensors.cuh"

namespace neglog {
namespace {

constexpr int kCellRows = 64;
constexpr int kVectors = 2;  // of a lane in a row
constexpr int kWarpsOfBlock = 4;
constexpr unsigned kWholeWarp = 0xffffffffu;

template <class S>
constexpr int kCellColumns = kWarp * kVectors * kLanes<S>;

// Problem

template <class S>
struct Tile {
    int64_t rows, columns, first_column;
    const S* similarity;
    int64_t stride;
    const real_of<S>* scale;  // by row, or scale_stride 0
    int64_t scale_stride;
    const real_of<S>* bias;  // by column, or bias_stride 0, or null
    int64_t bias_stride;
    const int64_t *positive, *excluded;  // columns counted from the first tile's first, or null
    const int64_t *row_group, *column_group;
};

// By column block and row, and by row block and column.
template <class T>
struct Cells {
    int64_t row_blocks, column_blocks;
    T* row_maximum;
    double* row_sum;
    T* column_maximum;  // null where only rows count
    double* column_sum;
};

// The gradient that flows in by the log-sum-exps of the rows, or of the columns.
template <class T>
struct Marginal {
    const T *lse, *low;  // lse null for none
    const T* grad;       // of all that holds the lse
    const T* hard;       // by row, or null: the part of it that holds lse - score of the positive
};

template <class S>
struct Gradient {
    Marginal<real_of<S>> row, column;
    const real_of<S>* positive;  // by row, or null: gradient of the positive's score itself
    S* out;
    int64_t out_stride;
};

// A warp's cell, and what of it this lane holds.
struct Place {
    int64_t row_block, column_block;
    int64_t first_row, end_row;
    int64_t first_column;  // of the cell
};

template <class S>
__device__ bool find_cell(const Tile<S>& t, int64_t row_blocks, int64_t column_blocks, Place& at) {
    const int64_t cell = int64_t(blockIdx.x) * kWarpsOfBlock + threadIdx.x / kWarp;
    if (cell >= row_blocks * column_blocks) return false;
    at.row_block = cell / column_blocks;
    at.column_block = cell % column_blocks;
    at.first_row = at.row_block * kCellRows;
    const int64_t end = at.first_row + kCellRows;
    at.end_row = end < t.rows ? end : t.rows;
    at.first_column = at.column_block * kCellColumns<S>;
    return true;
}

// The column of this lane's vector, in the tile.
template <class S>
__device__ int64_t column_of(const Place& at, int vector) {
    const int lane = threadIdx.x % kWarp;
    return at.first_column + (int64_t(vector) * kWarp + lane) * kLanes<S>;
}

// How many of the n columns from here the tile has.
__device__ inline int columns_from(int64_t columns, int64_t column, int n) {
    const int64_t left = columns - column;
    return left <= 0 ? 0 : left < n ? int(left) : n;
}

// Reading

template <class S>
__device__ bool aligned_at(const S* address) {
    return reinterpret_cast<uintptr_t>(address) % kVectorBytes == 0;
}

template <class S>
__device__ Lanes<S, kLanes<S>> load_some(const S* from, int count) {
    constexpr int n = kLanes<S>;
    if (count == n) return load<S, n>(from, aligned_at(from));
    Lanes<S, n> x;
#pragma unroll
    for (int i = 0; i < n; ++i) x.at[i] = i < count ? from[i] : S(0);
    return x;
}

template <class S>
__device__ void store_some(S* to, const Lanes<S, kLanes<S>>& x, int count) {
    constexpr int n = kLanes<S>;
    if (count == n) {
        store(to, x, aligned_at(to));
        return;
    }
#pragma unroll
    for (int i = 0; i < n; ++i)
        if (i < count) to[i] = x.at[i];
}

// Where among n columns the one is that a row names, or -1.
template <class S>
__device__ int place_of(const int64_t* named, const Tile<S>& t, int64_t row, int64_t column, int n) {
    if (!named) return -1;
    const int64_t place = named[row] - t.first_column - column;
    return place >= 0 && place < n ? int(place) : -1;
}

// A vector's scores; -inf where a pair is left out and beyond the tile. The positive's place, or -1,
// and its score before any exclusion and after.
template <class S>
struct Scores {
    real_of<S> z[kLanes<S>];
    int positive;
    real_of<S> score, kept;
};

template <class S>
__device__ Scores<S> scores_at(const Tile<S>& t, int64_t row, int64_t column) {
    using T = real_of<S>;
    constexpr int n = kLanes<S>;
    const int count = columns_from(t.columns, column, n);
    const auto x = load_some(t.similarity + row * t.stride + column, count);
    const T scale = t.scale[row * t.scale_stride];
    Scores<S> s;
    s.positive = place_of(t.positive, t, row, column, count);
    s.score = s.kept = 0;
    const int excluded = place_of(t.excluded, t, row, column, count);
    const int64_t group = t.row_group ? t.row_group[row] : 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
        const bool inside = i < count;
        T z = rounded_product(widen(x.at[i]), scale);
        if (t.bias && inside) z += t.bias[(column + i) * t.bias_stride];
        const bool of_group =
            t.row_group && inside && i != s.positive && t.column_group[column + i] == group;
        s.z[i] = !inside || of_group || i == excluded ? T(-INFINITY) : z;
        if (i == s.positive) {
            s.score = z;
            s.kept = s.z[i];
        }
    }
    return s;
}

// Forward

template <class T>
__device__ T warp_maximum(T x) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
        x = fmax(x, __shfl_xor_sync(kWholeWarp, x, offset));
    return x;
}

template <class T>
__device__ T warp_sum(T x) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
        x += __shfl_xor_sync(kWholeWarp, x, offset);
    return x;
}

template <class S>
__device__ LogSumExp<real_of<S>> cell_row(const Scores<S> (&s)[kVectors]) {
    using T = real_of<S>;
    T maximum = -INFINITY;
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
#pragma unroll
        for (int i = 0; i < kLanes<S>; ++i) maximum = fmax(maximum, s[v].z[i]);
    maximum = warp_maximum(maximum);
    const T shift = shift_for(maximum);
    T sum = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
#pragma unroll
        for (int i = 0; i < kLanes<S>; ++i) sum += exp(s[v].z[i] - shift);
    return {maximum, warp_sum(sum)};
}

// The online state of a column, its sum as the unevaluated sum of two numbers.
template <class T>
struct LongState {
    T maximum, sum, low;
};

template <class T>
__device__ void absorb_one(LongState<T>& state, T z) {
    if (z > state.maximum) {  // its own term is 1, the larger of the two
        const T factor = exp(state.maximum - z);
        const T before = state.sum * factor;
        state.sum = 1 + before;
        state.low = state.low * factor + (before - (state.sum - 1));
        state.maximum = z;
        return;
    }
    const T term = exp(z - shift_for(state.maximum));  // the sum holds a 1, or is 0 as the term is
    const T sum = state.sum + term;
    state.low += term - (sum - state.sum);
    state.sum = sum;
}

template <class S>
__global__ void __launch_bounds__(kWarp* kWarpsOfBlock, 1)
    forward_cells(Tile<S> t, Cells<real_of<S>> c, real_of<S>* score) {
    using T = real_of<S>;
    Place at;
    if (!find_cell(t, c.row_blocks, c.column_blocks, at)) return;
    LongState<T> states[kVectors][kLanes<S>];
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
#pragma unroll
        for (int i = 0; i < kLanes<S>; ++i) states[v][i] = {T(-INFINITY), T(0), T(0)};
    for (int64_t row = at.first_row; row < at.end_row; ++row) {
        Scores<S> s[kVectors];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            s[v] = scores_at(t, row, column_of<S>(at, v));
            if (score && s[v].positive >= 0) score[row] = s[v].score;
        }
        const auto state = cell_row(s);
        if (threadIdx.x % kWarp == 0) {
            c.row_maximum[at.column_block * t.rows + row] = state.maximum;
            c.row_sum[at.column_block * t.rows + row] = state.sum;
        }
        if (!c.column_sum) continue;
#pragma unroll
        for (int v = 0; v < kVectors; ++v)
#pragma unroll
            for (int i = 0; i < kLanes<S>; ++i) absorb_one(states[v][i], s[v].z[i]);
    }
    if (!c.column_sum) return;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        const int64_t column = column_of<S>(at, v);
        const int count = columns_from(t.columns, column, kLanes<S>);
#pragma unroll
        for (int i = 0; i < kLanes<S>; ++i) {
            if (i >= count) continue;
            const int64_t to = at.row_block * t.columns + column + i;
            c.column_maximum[to] = states[v][i].maximum;
            c.column_sum[to] = double(states[v][i].sum) + states[v][i].low;
        }
    }
}

// Into the states of `size` rows or columns, what `blocks` cells found of each.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    merge_cells(const T* maximum, const double* sum, int64_t blocks, int64_t size,
                T* state_maximum, double* state_sum) {
    const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= size) return;
    T largest = state_maximum[index];
    for (int64_t block = 0; block < blocks; ++block)
        largest = fmax(largest, maximum[block * size + index]);
    const double shift = shift_for(largest);
    double total = state_sum[index] * exp(double(state_maximum[index]) - shift);
    for (int64_t block = 0; block < blocks; ++block)
        total += sum[block * size + index] * exp(double(maximum[block * size + index]) - shift);
    state_maximum[index] = largest;
    state_sum[index] = total;
}

// Backward

// What a row or a column multiplies its exps by, and what it takes from the scores first.
template <class T>
struct Factor {
    T factor, shift;
};

template <class T>
__device__ Factor<T> factor_of(const Marginal<T>& m, int64_t index, bool inside) {
    // No pair counts where the lse is -inf, and -inf - -inf would be NaN.
    if (!m.lse || !inside || m.lse[index] == T(-INFINITY)) return {T(0), T(INFINITY)};
    return {m.grad[index] * exp(-m.low[index]), m.lse[index]};
}

// The gradient of the positive's score by way of one log-sum-exp.
template <class T>
__device__ double by_marginal(const Marginal<T>& m, int64_t index, int64_t row, T z) {
    const T high = m.lse[index];
    const double log_p =
        high == T(-INFINITY) ? -INFINITY : log_probability(z, Lse<T>{high, m.low[index]});
    const double hard = m.hard ? m.hard[row] : 0;
    return (double(m.grad[index]) - hard) * exp(log_p) + hard * expm1(log_p);
}

template <class S>
__device__ real_of<S> positive_gradient(const Gradient<S>& g, int64_t row, int64_t column,
                                        real_of<S> z) {
    double value = by_marginal(g.row, row, row, z);
    if (g.column.lse) value += by_marginal(g.column, column, row, z);
    if (g.positive) value += g.positive[row];
    return real_of<S>(value);
}

template <class S>
__global__ void __launch_bounds__(kWarp* kWarpsOfBlock, 1)
    backward_cells(Tile<S> t, Gradient<S> g, int64_t row_blocks, int64_t column_blocks) {
    using T = real_of<S>;
    Place at;
    if (!find_cell(t, row_blocks, column_blocks, at)) return;
    Factor<T> columns[kVectors][kLanes<S>];
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
#pragma unroll
        for (int i = 0; i < kLanes<S>; ++i) {
            const int64_t column = column_of<S>(at, v) + i;
            columns[v][i] = factor_of(g.column, column, column < t.columns);
        }
    for (int64_t row = at.first_row; row < at.end_row; ++row) {
        const Factor<T> own = factor_of(g.row, row, true);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            const int64_t column = column_of<S>(at, v);
            const auto s = scores_at(t, row, column);
            T grad[kLanes<S>];
            T at_positive = 0;
            if (s.positive >= 0)
                at_positive = positive_gradient(g, row, column + s.positive, s.kept);
#pragma unroll
            for (int i = 0; i < kLanes<S>; ++i) {
                grad[i] = own.factor * exp(s.z[i] - own.shift);
                if (g.column.lse)
                    grad[i] += columns[v][i].factor * exp(s.z[i] - columns[v][i].shift);
                if (i == s.positive) grad[i] = at_positive;
            }
            const int count = columns_from(t.columns, column, kLanes<S>);
            store_some(g.out + row * g.out_stride + column, narrowed<S>(grad), count);
        }
    }
}

// The loss by sigmoids

template <class T>
struct Softplus {
    T value, slope;
};

template <class T>
__device__ Softplus<T> softplus(T z) {
    const T e = exp(-fabs(z));
    return {fmax(z, T(0)) + log1p(e), (z >= 0 ? T(1) : e) / (1 + e)};
}

// A warp to a row: adds softplus(-z) of the positive and softplus(z) of the others to the row's loss,
// their derivatives to its sum of them, and writes these. Sums of one vector in real, then in double.
template <class S>
__global__ void __launch_bounds__(kWarp* kWarpsOfBlock, 1)
    sigmoid_rows(Tile<S> t, double* loss, double* slopes, S* out, int64_t out_stride) {
    using T = real_of<S>;
    constexpr int n = kLanes<S>;
    const int64_t row = int64_t(blockIdx.x) * kWarpsOfBlock + threadIdx.x / kWarp;
    if (row >= t.rows) return;
    double row_loss = 0, row_slopes = 0;
    for (int64_t column = threadIdx.x % kWarp * n; column < t.columns; column += kWarp * n) {
        const auto s = scores_at(t, row, column);
        T grad[n], sum = 0, slope = 0;
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const bool positive = i == s.positive;
            const auto term = softplus(positive ? -s.score : s.z[i]);
            grad[i] = positive ? -term.slope : term.slope;
            sum += term.value;
            slope += grad[i];
        }
        row_loss += sum;
        row_slopes += slope;
        const int count = columns_from(t.columns, column, n);
        store_some(out + row * out_stride + column, narrowed<S>(grad), count);
    }
    row_loss = warp_sum(row_loss);
    row_slopes = warp_sum(row_slopes);
    if (threadIdx.x % kWarp == 0) {
        loss[row] += row_loss;
        slopes[row] += row_slopes;
    }
}

// The ops

constexpr int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What both ops are given.
struct Inputs {
    Tensor similarity, scale;
    MaybeTensor bias, positive, excluded, query_group, key_group;
    int64_t first_column;
};

void check_vector(const char* name, const MaybeTensor& tensor, const Tensor& similarity,
                  int64_t size, ScalarType dtype) {
    if (!tensor) return;
    check_device(name, *tensor, similarity);
    STD_TORCH_CHECK(tensor->scalar_type() == dtype, name, ": unexpected dtype");
    STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == size, name, ": expected ", size,
                    " numbers");
    STD_TORCH_CHECK(size < 2 || tensor->stride(0) == 1, name, ": expected them adjacent");
}

// As check_vector, or one number in all.
void check_numbers(const char* name, const MaybeTensor& tensor, const Tensor& similarity,
                   int64_t size) {
    const auto real = real_dtype(similarity);
    if (!tensor || tensor->dim() != 0) return check_vector(name, tensor, similarity, size, real);
    check_device(name, *tensor, similarity);
    STD_TORCH_CHECK(tensor->scalar_type() == real, name, ": unexpected dtype");
}

void check_matrix(const char* name, const Tensor& x, const Tensor& similarity) {
    check_device(name, x, similarity);
    STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == similarity.scalar_type(), name,
                    ": expected (rows, columns) of the similarities' dtype");
    const bool same = x.size(0) == similarity.size(0) && x.size(1) == similarity.size(1);
    STD_TORCH_CHECK(same, name, ": expected the similarities' shape");
    STD_TORCH_CHECK(x.stride(1) == 1 || x.size(1) < 2, name, ": expected columns adjacent");
}

void check(const Inputs& in) {
    const Tensor& x = in.similarity;
    check_matrix("similarity", x, x);
    const int64_t rows = x.size(0), columns = x.size(1);
    check_numbers("scale", in.scale, x, rows);
    check_numbers("bias", in.bias, x, columns);
    check_vector("positive", in.positive, x, rows, ScalarType::Long);
    check_vector("excluded", in.excluded, x, rows, ScalarType::Long);
    check_vector("query_group", in.query_group, x, rows, ScalarType::Long);
    check_vector("key_group", in.key_group, x, columns, ScalarType::Long);
    STD_TORCH_CHECK(bool(in.query_group) == bool(in.key_group), "key_group: expected both or none");
}

template <class S>
Tile<S> tile(const Inputs& in) {
    using T = real_of<S>;
    return {
        .rows = in.similarity.size(0),
        .columns = in.similarity.size(1),
        .first_column = in.first_column,
        .similarity = pointer<const S>(in.similarity),
        .stride = in.similarity.stride(0),
        .scale = pointer<const T>(in.scale),
        .scale_stride = in.scale.dim(),
        .bias = pointer<const T>(in.bias),
        .bias_stride = in.bias ? in.bias->dim() : 0,
        .positive = pointer<const int64_t>(in.positive),
        .excluded = pointer<const int64_t>(in.excluded),
        .row_group = pointer<const int64_t>(in.query_group),
        .column_group = pointer<const int64_t>(in.key_group),
    };
}

int64_t row_blocks(const Tensor& x) { return ceiling(x.size(0), kCellRows); }

template <class S>
int64_t column_blocks(const Tensor& x) {
    return ceiling(x.size(1), kCellColumns<S>);
}

template <class T>
void merge(const Call& call, const T* maximum, const double* sum, int64_t blocks, int64_t size,
           const Tensor& state_maximum, const Tensor& state_sum) {
    launch(merge_cells<T>, call, ceiling(size, kMaxThreads), kMaxThreads, maximum, sum, blocks,
           size, pointer<T>(state_maximum), pointer<double>(state_sum));
}

template <class S>
void run_forward(const Call& call, const Inputs& in, const Tensor& row_maximum,
                 const Tensor& row_sum, const MaybeTensor& column_maximum,
                 const MaybeTensor& column_sum, const MaybeTensor& score) {
    using T = real_of<S>;
    const Tensor& x = in.similarity;
    const int64_t down = row_blocks(x), across = column_blocks<S>(x);
    const int64_t of_rows = across * x.size(0), of_columns = column_sum ? down * x.size(1) : 0;
    const Tensor maxima = new_real(x, {of_rows + of_columns});
    const Tensor sums = torch::stable::new_empty(x, {of_rows + of_columns}, ScalarType::Double);
    T* const maximum = pointer<T>(maxima);
    double* const sum = pointer<double>(sums);
    const bool both = bool(column_sum);
    const Cells<T> cells = {down, across, maximum, sum, both ? maximum + of_rows : nullptr,
                            both ? sum + of_rows : nullptr};
    launch(forward_cells<S>, call, ceiling(down * across, kWarpsOfBlock), kWarp * kWarpsOfBlock,
           tile<S>(in), cells, pointer<T>(score));
    merge(call, cells.row_maximum, cells.row_sum, across, x.size(0), row_maximum, row_sum);
    if (both)
        merge(call, cells.column_maximum, cells.column_sum, down, x.size(1), *column_maximum,
              *column_sum);
}

void infonce_tile(const Tensor& similarity, const Tensor& scale, const MaybeTensor& bias,
                  const MaybeTensor& positive, const MaybeTensor& excluded,
                  const MaybeTensor& query_group, const MaybeTensor& key_group,
                  int64_t first_column, const Tensor& row_maximum, const Tensor& row_sum,
                  const MaybeTensor& column_maximum, const MaybeTensor& column_sum,
                  const MaybeTensor& score) {
    const Inputs in = {similarity, scale,       bias,      positive,
                       excluded,   query_group, key_group, first_column};
    check(in);
    const int64_t rows = similarity.size(0), columns = similarity.size(1);
    const auto real = real_dtype(similarity);
    check_vector("row_maximum", row_maximum, similarity, rows, real);
    check_vector("row_sum", row_sum, similarity, rows, ScalarType::Double);
    check_vector("column_maximum", column_maximum, similarity, columns, real);
    check_vector("column_sum", column_sum, similarity, columns, ScalarType::Double);
    check_vector("score", score, similarity, rows, real);
    STD_TORCH_CHECK(bool(column_maximum) == bool(column_sum),
                    "column_sum: expected it and column_maximum, or neither");
    if (rows == 0 || columns == 0) return;
    const Call call(similarity);
    with_storage(similarity, [&](auto storage) {
        run_forward<decltype(storage)>(call, in, row_maximum, row_sum, column_maximum, column_sum,
                                       score);
    });
}

template <class T>
Marginal<T> marginal(const MaybeTensor& lse, const MaybeTensor& low, const MaybeTensor& grad,
                     const MaybeTensor& hard) {
    return {pointer<const T>(lse), pointer<const T>(low), pointer<const T>(grad),
            pointer<const T>(hard)};
}

void infonce_tile_backward(const Tensor& similarity, const Tensor& scale, const MaybeTensor& bias,
                           const MaybeTensor& positive, const MaybeTensor& excluded,
                           const MaybeTensor& query_group, const MaybeTensor& key_group,
                           int64_t first_column, const Tensor& row_lse, const Tensor& row_low,
                           const Tensor& row_grad, const MaybeTensor& row_hard,
                           const MaybeTensor& column_lse, const MaybeTensor& column_low,
                           const MaybeTensor& column_grad, const MaybeTensor& column_hard,
                           const MaybeTensor& grad_score, const Tensor& out) {
    const Inputs in = {similarity, scale,       bias,      positive,
                       excluded,   query_group, key_group, first_column};
    check(in);
    check_matrix("out", out, similarity);
    const int64_t rows = similarity.size(0), columns = similarity.size(1);
    const auto of_rows = [&](const char* name, const MaybeTensor& x) {
        check_vector(name, x, similarity, rows, real_dtype(similarity));
    };
    const auto of_columns = [&](const char* name, const MaybeTensor& x) {
        check_vector(name, x, similarity, columns, real_dtype(similarity));
        STD_TORCH_CHECK(bool(x) == bool(column_lse), name, ": expected all of the columns or none");
    };
    of_rows("row_lse", row_lse);
    of_rows("row_low", row_low);
    of_rows("row_grad", row_grad);
    of_rows("row_hard", row_hard);
    of_columns("column_lse", column_lse);
    of_columns("column_low", column_low);
    of_columns("column_grad", column_grad);
    of_rows("column_hard", column_hard);
    of_rows("grad_score", grad_score);
    if (rows == 0 || columns == 0) return;
    const Call call(similarity);
    with_storage(similarity, [&](auto storage) {
        using S = decltype(storage);
        using T = real_of<S>;
        const Gradient<S> g = {
            marginal<T>(row_lse, row_low, row_grad, row_hard),
            marginal<T>(column_lse, column_low, column_grad, column_hard),
            pointer<const T>(grad_score), pointer<S>(out), out.stride(0)};
        const int64_t down = row_blocks(similarity), across = column_blocks<S>(similarity);
        launch(backward_cells<S>, call, ceiling(down * across, kWarpsOfBlock),
               kWarp * kWarpsOfBlock, tile<S>(in), g, down, across);
    });
}

void infonce_tile_sigmoid(const Tensor& similarity, const Tensor& scale, const MaybeTensor& bias,
                          const MaybeTensor& positive, const MaybeTensor& excluded,
                          const MaybeTensor& query_group, const MaybeTensor& key_group,
                          int64_t first_column, const Tensor& loss, const Tensor& slopes,
                          const Tensor& out) {
    const Inputs in = {similarity, scale,       bias,      positive,
                       excluded,   query_group, key_group, first_column};
    check(in);
    check_matrix("out", out, similarity);
    const int64_t rows = similarity.size(0), columns = similarity.size(1);
    check_vector("loss", loss, similarity, rows, ScalarType::Double);
    check_vector("slopes", slopes, similarity, rows, ScalarType::Double);
    if (rows == 0 || columns == 0) return;
    const Call call(similarity);
    with_storage(similarity, [&](auto storage) {
        using S = decltype(storage);
        launch(sigmoid_rows<S>, call, ceiling(rows, kWarpsOfBlock), kWarp * kWarpsOfBlock,
               tile<S>(in), pointer<double>(loss), pointer<double>(slopes), pointer<S>(out),
               out.stride(0));
    });
}

}  // namespace
}  // namespace neglog

NEGLOG_IMPL(m) {
    m.impl("infonce_tile", TORCH_BOX(&neglog::infonce_tile));
    m.impl("infonce_tile_backward", TORCH_BOX(&neglog::infonce_tile_backward));
    m.impl("infonce_tile_sigmoid", TORCH_BOX(&neglog::infonce_tile_sigmoid));
}
