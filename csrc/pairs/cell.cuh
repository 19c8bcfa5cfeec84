// A tile of similarities in cells: what a cell contributes to the log-sum-exps of its rows and
// columns, and its gradient. These kernels take every cell, with every option. Those of
// cell_one_exp.cuh are faster and take only some cells; they run first.
//
//   z_ij = similarity_ij * scale_i + bias_j, or -inf where the pair (i, j) is excluded
//
// (a) A cell has 64 rows, and in each two 16-byte vectors for each lane of a warp: 256 columns of
//     float. A block of 8 warps reads it once, 8 rows to a warp: few cells come here, and with one
//     warp to a cell the device would be nearly idle. Warps reduce their rows by shuffles. Each
//     lane keeps the states of its columns in registers, and the warps' states are merged in their
//     order.
// (b) A second kernel merges the cells' states, in one order and in double. No atomics: a tile's
//     bits depend on its shape, its dtype and its alignment alone.
// (c) A column's sum over 64 rows is kept as two numbers. With one float the loss of a nearly
//     certain positive among 65 pairs, 1e-6, was wrong by as much (measured with the CPU kernels).
// (d) The gradient at the positive is formed from expm1(log p): p - 1 would lose all digits as p
//     nears 1.

#pragma once

#include "common/online_softmax.cuh"
#include "common/vector_io.cuh"

namespace neglog {
namespace {

constexpr int kCellRows = 64;
constexpr int kVectorsPerLane = 2;  // in a row of the cell
constexpr int kWarpsPerCell = 8, kRowsPerWarp = kCellRows / kWarpsPerCell;

template <class S>
constexpr int kCellColumns = kWarpSize * kVectorsPerLane * kVectorSize<S>;

template <class S>
struct Tile {
    int64_t rows, columns;
    int64_t first_column;  // of the tile, among all keys
    const S* similarity;
    int64_t stride;
    const compute_t<S>* scale;  // (rows), or one number and scale_stride 0
    int64_t scale_stride;
    const compute_t<S>* bias;  // (columns), or one number and bias_stride 0, or null
    int64_t bias_stride;
    const int64_t *positive, *excluded;  // (rows): columns among all keys; or null
    // (rows) and (columns), or null. Pairs of equal groups are excluded, except positives.
    const int64_t *row_group, *column_group;
};

// The softmax states that the cells found: of rows, (column_blocks, rows), and of columns,
// (row_blocks, columns).
template <class T>
struct CellStates {
    int64_t row_blocks, column_blocks;
    T* row_maximum;
    double* row_sum;
    T* column_maximum;  // null, and column_sum too, where only rows have a loss
    double* column_sum;
};

// The weights in the gradient of a loss through the log-sum-exps of rows, or of columns. By the
// score of the pair of row i and column j it is
//
//   dz_ij = softmax_weight p_ij - target_weight_i [j = positive_i]
//
// where p = exp(z - lse), with the softmax_weight and the lse of i for rows, of j for columns. The
// target_weight is that part of the softmax_weight which comes from terms lse - z_positive.
template <class T>
struct Marginal {
    const T *lse, *low;       // lse + low is the log-sum-exp; lse is null for no gradient
    const T* softmax_weight;  // by row, or by column
    const T* target_weight;   // (rows), or null for zeros
};

template <class S>
struct Gradient {
    Marginal<compute_t<S>> row, column;
    const compute_t<S>* positive;  // (rows), or null: upstream gradient of the positives' scores
    S* out;
    int64_t out_stride;
};

struct CellBounds {
    int64_t row_block, column_block;
    int64_t first_row, end_row;
    int64_t first_column;  // of the cell
};

template <class S>
__device__ CellBounds cell_bounds(const Tile<S>& t, int64_t index, int64_t column_blocks) {
    CellBounds cell;
    cell.row_block = index / column_blocks;
    cell.column_block = index % column_blocks;
    cell.first_row = cell.row_block * kCellRows;
    const int64_t end = cell.first_row + kCellRows;
    cell.end_row = end < t.rows ? end : t.rows;
    cell.first_column = cell.column_block * kCellColumns<S>;
    return cell;
}

// The rows of a cell that this warp reads.
struct RowRange {
    int64_t first, end;
};

__device__ inline RowRange rows_of_warp(const CellBounds& cell) {
    const int64_t first = cell.first_row + threadIdx.x / kWarpSize * kRowsPerWarp;
    const int64_t end = first + kRowsPerWarp;
    return {first, end < cell.end_row ? end : cell.end_row};
}

// The first column of a vector of this lane, in the tile.
template <class S>
__device__ int64_t lane_column(const CellBounds& cell, int vector) {
    const int lane = threadIdx.x % kWarpSize;
    return cell.first_column + (int64_t(vector) * kWarpSize + lane) * kVectorSize<S>;
}

// How many of the n columns from `column` on lie in the tile.
__device__ inline int columns_left(int64_t columns, int64_t column, int n) {
    const int64_t left = columns - column;
    return left <= 0 ? 0 : left < n ? int(left) : n;
}

// Where the column that indices[row] names lies among the n columns from `column` on, or -1.
template <class S>
__device__ int position_in_vector(const int64_t* indices, const Tile<S>& t, int64_t row,
                                  int64_t column, int n) {
    if (!indices) return -1;
    const int64_t position = indices[row] - t.first_column - column;
    return position >= 0 && position < n ? int(position) : -1;
}

// The scores of a vector.
template <class S>
struct Scores {
    compute_t<S> z[kVectorSize<S>];  // -inf for excluded pairs and outside the tile
    int positive;                    // position of the row's positive, or -1
    compute_t<S> positive_score;     // its score, were it not excluded
    compute_t<S> positive_z;         // its z
};

template <class S>
__device__ Scores<S> scores_at(const Tile<S>& t, int64_t row, int64_t column) {
    using T = compute_t<S>;
    constexpr int n = kVectorSize<S>;
    const int count = columns_left(t.columns, column, n);
    const auto x = load_partial(t.similarity + row * t.stride + column, count);
    const T scale = t.scale[row * t.scale_stride];
    Scores<S> s;
    s.positive = position_in_vector(t.positive, t, row, column, count);
    s.positive_score = s.positive_z = 0;
    const int excluded = position_in_vector(t.excluded, t, row, column, count);
    const int64_t group = t.row_group ? t.row_group[row] : 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
        const bool inside = i < count;
        T z = rounded_product(widen(x.value[i]), scale);
        if (t.bias && inside) z += t.bias[(column + i) * t.bias_stride];
        const bool same_group =
            t.row_group && inside && i != s.positive && t.column_group[column + i] == group;
        s.z[i] = !inside || same_group || i == excluded ? T(-INFINITY) : z;
        if (i == s.positive) {
            s.positive_score = z;
            s.positive_z = s.z[i];
        }
    }
    return s;
}

// Forward

// The state of a row of the cell. All lanes of the warp call it and get it.
template <class S>
__device__ SoftmaxState<compute_t<S>> row_state_of_cell(const Scores<S> (&s)[kVectorsPerLane]) {
    using T = compute_t<S>;
    T maximum = -INFINITY;
#pragma unroll
    for (int v = 0; v < kVectorsPerLane; ++v)
#pragma unroll
        for (int i = 0; i < kVectorSize<S>; ++i) maximum = fmax(maximum, s[v].z[i]);
    maximum = warp_maximum(maximum);
    const T shift = shift_for(maximum);
    T sum = 0;
#pragma unroll
    for (int v = 0; v < kVectorsPerLane; ++v)
#pragma unroll
        for (int i = 0; i < kVectorSize<S>; ++i) sum += exp_of<S>(s[v].z[i] - shift);
    return {maximum, warp_sum(sum)};
}

// The softmax state of a column, with sum + low for the sum.
template <class T>
struct CompensatedState {
    T maximum, sum, low;
};

template <class S, class T>
__device__ void accumulate_compensated(CompensatedState<T>& state, T z) {
    if (z > state.maximum) {  // its term is 1, the larger of the two summands
        const T factor = exp_of<S>(state.maximum - z);
        const T before = state.sum * factor;
        state.sum = 1 + before;
        state.low = state.low * factor + (before - (state.sum - 1));
        state.maximum = z;
        return;
    }
    // The sum contains the maximum's 1 and is the larger summand, or it is 0 and so is the term.
    const T term = exp_of<S>(z - shift_for(state.maximum));
    const T sum = state.sum + term;
    state.low += term - (sum - state.sum);
    state.sum = sum;
}

// Merges the warps' states of the cell's columns, one warp after the other, in shared memory. All
// threads of the block call it.
template <class S>
__device__ void merge_warp_states(
    const CompensatedState<compute_t<S>> (&states)[kVectorsPerLane][kVectorSize<S>],
    compute_t<S>* maximum, double* sum) {
    using T = compute_t<S>;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    for (int turn = 0; turn < kWarpsPerCell; ++turn) {
#pragma unroll
        for (int v = 0; v < kVectorsPerLane; ++v)
#pragma unroll
            for (int i = 0; i < kVectorSize<S>; ++i) {
                if (warp != turn) continue;
                const int column = (v * kWarpSize + lane) * kVectorSize<S> + i;
                const CompensatedState<T>& own = states[v][i];
                const T before = turn == 0 ? T(-INFINITY) : maximum[column];
                const T largest = fmax(before, own.maximum), shift = shift_for(largest);
                const double total = (double(own.sum) + own.low) * exp(own.maximum - shift);
                sum[column] = turn == 0 ? total : total + sum[column] * exp(before - shift);
                maximum[column] = largest;
            }
        __syncthreads();
    }
}

template <class S>
__global__ void __launch_bounds__(kWarpSize* kWarpsPerCell, 1)
    forward_cells(Tile<S> t, CellStates<compute_t<S>> c, compute_t<S>* positive_score,
                  const bool* cell_done) {
    using T = compute_t<S>;
    __shared__ T column_maximum[kCellColumns<S>];
    __shared__ double column_sum[kCellColumns<S>];
    const CellBounds cell = cell_bounds(t, blockIdx.x, c.column_blocks);
    if (cell_done && cell_done[blockIdx.x]) return;
    CompensatedState<T> states[kVectorsPerLane][kVectorSize<S>];
#pragma unroll
    for (int v = 0; v < kVectorsPerLane; ++v)
#pragma unroll
        for (int i = 0; i < kVectorSize<S>; ++i) states[v][i] = {T(-INFINITY), T(0), T(0)};
    const RowRange rows = rows_of_warp(cell);
    for (int64_t row = rows.first; row < rows.end; ++row) {
        Scores<S> s[kVectorsPerLane];
#pragma unroll
        for (int v = 0; v < kVectorsPerLane; ++v) {
            s[v] = scores_at(t, row, lane_column<S>(cell, v));
            if (positive_score && s[v].positive >= 0) positive_score[row] = s[v].positive_score;
        }
        const auto state = row_state_of_cell(s);
        if (threadIdx.x % kWarpSize == 0) {
            c.row_maximum[cell.column_block * t.rows + row] = state.maximum;
            c.row_sum[cell.column_block * t.rows + row] = state.sum;
        }
        if (!c.column_sum) continue;
#pragma unroll
        for (int v = 0; v < kVectorsPerLane; ++v)
#pragma unroll
            for (int i = 0; i < kVectorSize<S>; ++i)
                accumulate_compensated<S>(states[v][i], s[v].z[i]);
    }
    if (!c.column_sum) return;
    merge_warp_states<S>(states, column_maximum, column_sum);
    const int64_t to = cell.row_block * t.columns + cell.first_column;
    const int64_t count = t.columns - cell.first_column;
    for (int i = threadIdx.x; i < kCellColumns<S> && i < count; i += blockDim.x) {
        c.column_maximum[to + i] = column_maximum[i];
        c.column_sum[to + i] = column_sum[i];
    }
}

// Warps that share the merge of 32 rows or columns: with one, each thread would wait for hundreds
// of loads, one after the other.
constexpr int kMergeWarps = 8;

// Merges into the states of `size` rows or columns what `blocks` cells found of each.

template <class T>
__global__ void __launch_bounds__(kWarpSize* kMergeWarps)
    merge_cells(const T* maximum, const double* sum, int64_t blocks, int64_t size, T* state_maximum,
                double* state_sum) {
    __shared__ T maxima[kMergeWarps][kWarpSize];
    __shared__ double sums[kMergeWarps][kWarpSize];
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int64_t index = int64_t(blockIdx.x) * kWarpSize + lane;
    const bool inside = index < size;
    T largest = inside ? state_maximum[index] : T(-INFINITY);
    for (int64_t block = warp; inside && block < blocks; block += kMergeWarps)
        largest = fmax(largest, maximum[block * size + index]);
    maxima[warp][lane] = largest;
    __syncthreads();
    for (int other = 0; other < kMergeWarps; ++other) largest = fmax(largest, maxima[other][lane]);
    const double shift = shift_for(largest);
    double total = 0;
    for (int64_t block = warp; inside && block < blocks; block += kMergeWarps)
        total += sum[block * size + index] * exp(double(maximum[block * size + index]) - shift);
    sums[warp][lane] = total;
    __syncthreads();
    if (warp != 0 || !inside) return;
    total = state_sum[index] * exp(double(state_maximum[index]) - shift);
    for (int other = 0; other < kMergeWarps; ++other) total += sums[other][lane];
    state_maximum[index] = largest;
    state_sum[index] = total;
}

// Backward

// A row or a column contributes factor * exp(z - shift) to the gradient.
template <class T>
struct ExpFactor {
    T factor, shift;
};

template <class T>
__device__ ExpFactor<T> exp_factor(const Marginal<T>& m, int64_t index, bool inside) {
    // An lse of -inf means that all pairs are excluded; -inf - -inf would be NaN.
    if (!m.lse || !inside || m.lse[index] == T(-INFINITY)) return {T(0), T(INFINITY)};
    return {m.softmax_weight[index] * exp(-m.low[index]), m.lse[index]};
}

// The gradient of the positive's score through the log-sum-exp of its row or column.
template <class T>
__device__ double positive_gradient_by_lse(const Marginal<T>& m, int64_t index, int64_t row, T z) {
    const T high = m.lse[index];
    const T log_p =
        high == T(-INFINITY) ? T(-INFINITY) : log_probability(z, Lse<T>{high, m.low[index]});
    const double target_weight = m.target_weight ? m.target_weight[row] : 0;
    return (double(m.softmax_weight[index]) - target_weight) * exp(log_p) +
           target_weight * expm1(log_p);
}

template <class S>
__device__ compute_t<S> positive_gradient(const Gradient<S>& g, int64_t row, int64_t column,
                                          compute_t<S> z) {
    double value = positive_gradient_by_lse(g.row, row, row, z);
    if (g.column.lse) value += positive_gradient_by_lse(g.column, column, row, z);
    if (g.positive) value += g.positive[row];
    return compute_t<S>(value);
}

template <class S>
__global__ void __launch_bounds__(kWarpSize* kWarpsPerCell, 1)
    backward_cells(Tile<S> t, Gradient<S> g, int64_t column_blocks, const bool* cell_done) {
    using T = compute_t<S>;
    const CellBounds cell = cell_bounds(t, blockIdx.x, column_blocks);
    if (cell_done && cell_done[blockIdx.x]) return;
    ExpFactor<T> columns[kVectorsPerLane][kVectorSize<S>];
#pragma unroll
    for (int v = 0; v < kVectorsPerLane; ++v)
#pragma unroll
        for (int i = 0; i < kVectorSize<S>; ++i) {
            const int64_t column = lane_column<S>(cell, v) + i;
            columns[v][i] = exp_factor(g.column, column, column < t.columns);
        }
    const RowRange rows = rows_of_warp(cell);
    for (int64_t row = rows.first; row < rows.end; ++row) {
        const ExpFactor<T> own = exp_factor(g.row, row, true);
#pragma unroll
        for (int v = 0; v < kVectorsPerLane; ++v) {
            const int64_t column = lane_column<S>(cell, v);
            const auto s = scores_at(t, row, column);
            T grad[kVectorSize<S>];
#pragma unroll
            for (int i = 0; i < kVectorSize<S>; ++i) {
                grad[i] = own.factor * exp_of<S>(s.z[i] - own.shift);
                if (g.column.lse)
                    grad[i] += columns[v][i].factor * exp_of<S>(s.z[i] - columns[v][i].shift);
            }
            S* const out = g.out + row * g.out_stride + column;
            store_partial(out, narrowed<S>(grad), columns_left(t.columns, column, kVectorSize<S>));
            if (s.positive >= 0)
                narrow(positive_gradient(g, row, column + s.positive, s.positive_z),
                       out[s.positive]);
        }
    }
}

}  // namespace
}  // namespace neglog
