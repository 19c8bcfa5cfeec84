// A tile of similarities, cell by cell: what a cell adds to the log-sum-exps of its rows and columns,
// and its gradient. Any cell, with every option; cell_one_exp.cuh has those that allow a shorter way.
//
// (a) A block walks a cell of 64 rows and two 16-byte vectors of each lane: it reads the cell once, a
//     warp to 8 rows, since few cells come here and one warp alone would be late. Of a row it finds
//     the maximum, then the sum, by shuffles; of its columns each lane keeps the online states to
//     itself, and the warps' are merged in their order.
// (b) What cells found is merged into the states of rows and columns by a second kernel, in one order
//     and in double. No atomics: a tile's bits depend on its shape, its dtype and its alignment alone.
// (c) A column's sum over 64 rows is kept as two numbers: in one float the loss of a sure positive
//     among 65 pairs, 1e-6, was off by as much on the CPU.
// (d) The gradient at a row's positive is formed by expm1: p - 1 would lose every digit as p nears 1.

#pragma once

#include "common/online_softmax.cuh"


namespace neglog {
namespace {

constexpr int kCellRows = 64;
constexpr int kVectors = 2;  // of a lane in a row
constexpr int kWarpsOfCell = 8, kRowsOfWarp = kCellRows / kWarpsOfCell;
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

struct Place {
    int64_t row_block, column_block;
    int64_t first_row, end_row;
    int64_t first_column;  // of the cell
};

template <class S>
__device__ Place place_of_cell(const Tile<S>& t, int64_t cell, int64_t column_blocks) {
    Place at;
    at.row_block = cell / column_blocks;
    at.column_block = cell % column_blocks;
    at.first_row = at.row_block * kCellRows;
    const int64_t end = at.first_row + kCellRows;
    at.end_row = end < t.rows ? end : t.rows;
    at.first_column = at.column_block * kCellColumns<S>;
    return at;
}

// Of the cell's rows, those of this warp.
struct Rows {
    int64_t first, end;
};

__device__ inline Rows rows_of_warp(const Place& at) {
    const int64_t first = at.first_row + threadIdx.x / kWarp * kRowsOfWarp;
    const int64_t end = first + kRowsOfWarp;
    return {first, end < at.end_row ? end : at.end_row};
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
        for (int i = 0; i < kLanes<S>; ++i) sum += exp_of<S>(s[v].z[i] - shift);
    return {maximum, warp_sum(sum)};
}

// The online state of a column, its sum as the unevaluated sum of two numbers.
template <class T>
struct LongState {
    T maximum, sum, low;
};

template <class S, class T>
__device__ void absorb_one(LongState<T>& state, T z) {
    if (z > state.maximum) {  // its own term is 1, the larger of the two
        const T factor = exp_of<S>(state.maximum - z);
        const T before = state.sum * factor;
        state.sum = 1 + before;
        state.low = state.low * factor + (before - (state.sum - 1));
        state.maximum = z;
        return;
    }
    const T term = exp_of<S>(z - shift_for(state.maximum));  // the sum holds a 1, or is 0 as the term is
    const T sum = state.sum + term;
    state.low += term - (sum - state.sum);
    state.sum = sum;
}

// What a warp found of the cell's columns, into what the warps before it did. By the whole block.
template <class S>
__device__ void merge_columns(const LongState<real_of<S>> (&states)[kVectors][kLanes<S>],
                              real_of<S>* maximum, double* sum) {
    using T = real_of<S>;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    for (int turn = 0; turn < kWarpsOfCell; ++turn) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v)
#pragma unroll
            for (int i = 0; i < kLanes<S>; ++i) {
                if (warp != turn) continue;
                const int at = (v * kWarp + lane) * kLanes<S> + i;
                const LongState<T>& own = states[v][i];
                const T before = turn == 0 ? T(-INFINITY) : maximum[at];
                const T largest = fmax(before, own.maximum), shift = shift_for(largest);
                const double total = (double(own.sum) + own.low) * exp(own.maximum - shift);
                sum[at] = turn == 0 ? total : total + sum[at] * exp(before - shift);
                maximum[at] = largest;
            }
        __syncthreads();
    }
}

template <class S>
__global__ void __launch_bounds__(kWarp* kWarpsOfCell, 1)
    forward_cells(Tile<S> t, Cells<real_of<S>> c, real_of<S>* score, const bool* done) {
    using T = real_of<S>;
    __shared__ T column_maximum[kCellColumns<S>];
    __shared__ double column_sum[kCellColumns<S>];
    const Place at = place_of_cell(t, blockIdx.x, c.column_blocks);
    if (done && done[blockIdx.x]) return;
    LongState<T> states[kVectors][kLanes<S>];
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
#pragma unroll
        for (int i = 0; i < kLanes<S>; ++i) states[v][i] = {T(-INFINITY), T(0), T(0)};
    const Rows rows = rows_of_warp(at);
    for (int64_t row = rows.first; row < rows.end; ++row) {
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
            for (int i = 0; i < kLanes<S>; ++i) absorb_one<S>(states[v][i], s[v].z[i]);
    }
    if (!c.column_sum) return;
    merge_columns<S>(states, column_maximum, column_sum);
    const int64_t to = at.row_block * t.columns + at.first_column;
    const int64_t count = t.columns - at.first_column;
    for (int i = threadIdx.x; i < kCellColumns<S> && i < count; i += blockDim.x) {
        c.column_maximum[to + i] = column_maximum[i];
        c.column_sum[to + i] = column_sum[i];
    }
}

// Into the states of `size` rows or columns, what `blocks` cells found of each. A warp takes 32 of them
// and every eighth block, as one thread alone would wait for hundreds of loads.
constexpr int kMergers = 8;

template <class T>
__global__ void __launch_bounds__(kWarp* kMergers)
    merge_cells(const T* maximum, const double* sum, int64_t blocks, int64_t size,
                T* state_maximum, double* state_sum) {
    __shared__ T maxima[kMergers][kWarp];
    __shared__ double sums[kMergers][kWarp];
    const int lane = threadIdx.x % kWarp, part = threadIdx.x / kWarp;
    const int64_t index = int64_t(blockIdx.x) * kWarp + lane;
    const bool inside = index < size;
    T largest = inside ? state_maximum[index] : T(-INFINITY);
    for (int64_t block = part; inside && block < blocks; block += kMergers)
        largest = fmax(largest, maximum[block * size + index]);
    maxima[part][lane] = largest;
    __syncthreads();
    for (int other = 0; other < kMergers; ++other) largest = fmax(largest, maxima[other][lane]);
    const double shift = shift_for(largest);
    double total = 0;
    for (int64_t block = part; inside && block < blocks; block += kMergers)
        total += sum[block * size + index] * exp(double(maximum[block * size + index]) - shift);
    sums[part][lane] = total;
    __syncthreads();
    if (part != 0 || !inside) return;
    total = state_sum[index] * exp(double(state_maximum[index]) - shift);
    for (int other = 0; other < kMergers; ++other) total += sums[other][lane];
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
    const T log_p =
        high == T(-INFINITY) ? T(-INFINITY) : log_probability(z, Lse<T>{high, m.low[index]});
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
__global__ void __launch_bounds__(kWarp* kWarpsOfCell, 1)
    backward_cells(Tile<S> t, Gradient<S> g, int64_t column_blocks, const bool* done) {
    using T = real_of<S>;
    const Place at = place_of_cell(t, blockIdx.x, column_blocks);
    if (done && done[blockIdx.x]) return;
    Factor<T> columns[kVectors][kLanes<S>];
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
#pragma unroll
        for (int i = 0; i < kLanes<S>; ++i) {
            const int64_t column = column_of<S>(at, v) + i;
            columns[v][i] = factor_of(g.column, column, column < t.columns);
        }
    const Rows rows = rows_of_warp(at);
    for (int64_t row = rows.first; row < rows.end; ++row) {
        const Factor<T> own = factor_of(g.row, row, true);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            const int64_t column = column_of<S>(at, v);
            const auto s = scores_at(t, row, column);
            T grad[kLanes<S>];
#pragma unroll
            for (int i = 0; i < kLanes<S>; ++i) {
                grad[i] = own.factor * exp_of<S>(s.z[i] - own.shift);
                if (g.column.lse)
                    grad[i] += columns[v][i].factor * exp_of<S>(s.z[i] - columns[v][i].shift);
            }
            S* const out = g.out + row * g.out_stride + column;
            store_some(out, narrowed<S>(grad), columns_from(t.columns, column, kLanes<S>));
            if (s.positive >= 0)
                narrow(positive_gradient(g, row, column + s.positive, s.kept), out[s.positive]);
        }
    }
}

}  // namespace
}  // namespace neglog
