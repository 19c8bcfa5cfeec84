// Cells whose scores lie close together: one exp a score serves its row and its column.
//
// (a) Each exp is taken of the score less one number for the whole cell. What is out of range shows in
//     the sums: they are too small or too large for their terms to be exact, or NaN. Nobody can know
//     beforehand, and to ask the device would be to wait; so the cell is tried, and left to
//     cell.cuh if it failed.
// (b) It is left to that too if it is cut off at the tile's edge within a vector or four rows, if it is
//     not aligned, and if it holds a positive, whose row needs more care, or an excluded pair. Biases
//     and groups have no such cells.
// (c) Four rows at a time: their loads are under way together, and a column's sum grows by theirs.

#pragma once

#include "pairs/cell.cuh"

namespace neglog {
namespace {

constexpr int kRowsAtOnce = 4;
constexpr int kWarpsOfBlock = 4;  // each with a cell of its own

// Sums between 1 / kFar and kFar are exact enough: a score is then rounded to 1e-6 at most, which is
// less than it was rounded when it was scaled; in 16 bits, to much less than the similarity was.
template <class S>
constexpr real_of<S> kFar = sizeof(S) == 2 ? 0x1p60 : 0x1p16;

// How far a log-sum-exp may be from that of the cell's first row.
template <class S>
constexpr real_of<S> kSpread = sizeof(S) == 2 ? 40 : 8;

__device__ inline int64_t cell_of_warp() {
    return int64_t(blockIdx.x) * kWarpsOfBlock + threadIdx.x / kWarp;
}

template <class S>
__device__ bool in_range(real_of<S> sum) {
    return sum >= 1 / kFar<S> && sum <= kFar<S>;  // not NaN
}

// Whether any of the cell's rows names a column of the cell. By the whole warp.
template <class S>
__device__ bool names_a_column(const Tile<S>& t, const Place& at, const int64_t* named) {
    if (!named) return false;
    bool any = false;
#pragma unroll
    for (int i = 0; i < kCellRows / kWarp; ++i) {
        const int64_t row = at.first_row + i * kWarp + threadIdx.x % kWarp;
        if (row >= at.end_row) continue;
        const int64_t place = named[row] - t.first_column - at.first_column;
        any |= place >= 0 && place < kCellColumns<S>;
    }
    return __any_sync(kWholeWarp, any);
}

template <class S>
__device__ bool in_vectors(const S* first, int64_t stride) {
    return aligned_at(first) && stride % kLanes<S> == 0;
}

template <class S>
__device__ bool may_be_close(const Tile<S>& t, const Place& at) {
    const bool whole = (at.end_row - at.first_row) % kRowsAtOnce == 0 &&
                       (t.columns % kLanes<S> == 0 || at.first_column + kCellColumns<S> <= t.columns);
    return whole && in_vectors(t.similarity, t.stride) && !names_a_column(t, at, t.positive) &&
           !names_a_column(t, at, t.excluded);
}

// Four rows of one vector of this lane.
template <class S>
struct Group {
    uint4 bits[kRowsAtOnce];
};

template <class S>
__device__ Group<S> load_group(const Tile<S>& t, int64_t row, int64_t column) {
    Group<S> group;
    const S* const from = t.similarity + row * t.stride + column;
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r)
        group.bits[r] = load_vector(reinterpret_cast<const uint4*>(from + r * t.stride));
    return group;
}

template <class S>
__device__ void group_scores(const uint4& bits, real_of<S> scale, real_of<S> (&z)[kLanes<S>]) {
    const auto x = unpacked<S>(bits);
#pragma unroll
    for (int i = 0; i < kLanes<S>; ++i) z[i] = rounded_product(widen(x.at[i]), scale);
}

template <class S>
__device__ void scales_of(const Tile<S>& t, int64_t row, real_of<S> (&scale)[kRowsAtOnce]) {
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) scale[r] = t.scale[(row + r) * t.scale_stride];
}

// Which of this lane's vectors the tile has.
struct Inside {
    bool vector[kVectors];
};

template <class S>
__device__ Inside inside_of(const Tile<S>& t, const Place& at) {
    Inside inside;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) inside.vector[v] = column_of<S>(at, v) < t.columns;
    return inside;
}

// The largest score of the cell's first rows.
template <class S>
__device__ real_of<S> shift_of(const Tile<S>& t, const Place& at, const Inside& inside) {
    using T = real_of<S>;
    T scale[kRowsAtOnce], largest = -INFINITY;
    scales_of(t, at.first_row, scale);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        if (!inside.vector[v]) continue;
        const auto group = load_group(t, at.first_row, column_of<S>(at, v));
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
            T z[kLanes<S>];
            group_scores<S>(group.bits[r], scale[r], z);
#pragma unroll
            for (int i = 0; i < kLanes<S>; ++i) largest = fmax(largest, z[i]);
        }
    }
    return warp_maximum(largest);
}

// A whole number of vectors.
template <class T, int n>
__device__ void store_numbers(T* to, const T (&x)[n]) {
    const bool aligned = aligned_at(to);
#pragma unroll
    for (int first = 0; first < n; first += kLanes<T>) {
        Lanes<T, kLanes<T>> vector;
#pragma unroll
        for (int i = 0; i < kLanes<T>; ++i) vector.at[i] = x[first + i];
        store(to + first, vector, aligned);
    }
}

// Sums of the cell's columns, this lane's.
template <class S>
struct ColumnSums {
    real_of<S> of[kVectors][kLanes<S>];
};

// Adds four rows to their columns' sums; returns each row's own sum, which every lane gets.
template <class S>
__device__ void add_rows(const Tile<S>& t, const Place& at, int64_t row, real_of<S> shift,
                         const Inside& inside, ColumnSums<S>& columns,
                         real_of<S> (&of_row)[kRowsAtOnce]) {
    using T = real_of<S>;
    Group<S> groups[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
        if (inside.vector[v]) groups[v] = load_group(t, row, column_of<S>(at, v));
    T scale[kRowsAtOnce];
    scales_of(t, row, scale);
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) of_row[r] = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        if (!inside.vector[v]) continue;
        T part[kLanes<S>] = {};
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
            T z[kLanes<S>];
            group_scores<S>(groups[v].bits[r], scale[r], z);
#pragma unroll
            for (int i = 0; i < kLanes<S>; ++i) {
                const T term = exp_of<S>(z[i] - shift);
                of_row[r] += term;
                part[i] += term;
            }
        }
#pragma unroll
        for (int i = 0; i < kLanes<S>; ++i) columns.of[v][i] += part[i];
    }
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) of_row[r] = warp_sum(of_row[r]);
}

template <class S>
__device__ bool forward_cell(const Tile<S>& t, const Cells<real_of<S>>& c, const Place& at) {
    using T = real_of<S>;
    if (!may_be_close(t, at)) return false;
    const Inside inside = inside_of(t, at);
    const T shift = shift_of(t, at, inside);
    const int lane = threadIdx.x % kWarp;
    ColumnSums<S> columns = {};
    bool close = true;
    for (int64_t row = at.first_row; row < at.end_row; row += kRowsAtOnce) {
        T of_row[kRowsAtOnce];
        add_rows(t, at, row, shift, inside, columns, of_row);
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
            close &= in_range<S>(of_row[r]);
            if (lane != r) continue;
            c.row_maximum[at.column_block * t.rows + row + r] = shift;
            c.row_sum[at.column_block * t.rows + row + r] = of_row[r];
        }
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        if (!c.column_sum || !inside.vector[v]) continue;
        const int64_t to = at.row_block * t.columns + column_of<S>(at, v);
        T maxima[kLanes<S>];
        double sums[kLanes<S>];
#pragma unroll
        for (int i = 0; i < kLanes<S>; ++i) {
            close &= in_range<S>(columns.of[v][i]);
            maxima[i] = shift;
            sums[i] = columns.of[v][i];
        }
        store_numbers(c.column_maximum + to, maxima);
        store_numbers(c.column_sum + to, sums);
    }
    return __all_sync(kWholeWarp, close);
}

// Of a multiprocessor: as many as a tile of 8192 x 8192 has for it. Doubles want more registers.
template <class S>
constexpr int kCloseBlocks = sizeof(S) == 8 ? 3 : 4;

template <class S>
__global__ void __launch_bounds__(kWarp* kWarpsOfBlock, kCloseBlocks<S>)
    forward_close_cells(Tile<S> t, Cells<real_of<S>> c, bool* done) {
    const int64_t cell = cell_of_warp();
    if (cell >= c.row_blocks * c.column_blocks) return;
    const bool close = forward_cell(t, c, place_of_cell(t, cell, c.column_blocks));
    if (threadIdx.x % kWarp == 0) done[cell] = close;
}

// Backward: exp(z - shift) times the sum of what its row and its column make of it

// exp(shift - lse) times the gradient, where the two are close.
template <class S>
__device__ bool coefficient(const Marginal<real_of<S>>& m, int64_t index, real_of<S> shift,
                            real_of<S>& to) {
    const real_of<S> apart = shift - m.lse[index];
    to = m.grad[index] * exp(apart - m.low[index]);
    return fabs(apart) <= kSpread<S>;  // not NaN
}

// Of the rows `lane` and `lane + 32`.
template <class S>
struct RowCoefficients {
    real_of<S> of[kCellRows / kWarp];

    // By the whole warp, each of whose lanes asks for the same row.
    __device__ real_of<S> operator[](int row) const {
        const real_of<S> near = __shfl_sync(kWholeWarp, of[0], row % kWarp);
        const real_of<S> beyond = __shfl_sync(kWholeWarp, of[1], row % kWarp);
        return row < kWarp ? near : beyond;
    }
};

template <class S>
__device__ bool coefficients(const Tile<S>& t, const Gradient<S>& g, const Place& at,
                             const Inside& inside, real_of<S> shift, RowCoefficients<S>& rows,
                             ColumnSums<S>& columns) {
    bool close = true;
#pragma unroll
    for (int i = 0; i < kCellRows / kWarp; ++i) {
        const int64_t row = at.first_row + i * kWarp + threadIdx.x % kWarp;
        rows.of[i] = 0;
        if (row < at.end_row) close &= coefficient<S>(g.row, row, shift, rows.of[i]);
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        if (!g.column.lse || !inside.vector[v]) continue;
        const int64_t column = column_of<S>(at, v);
#pragma unroll
        for (int i = 0; i < kLanes<S>; ++i)
            close &= coefficient<S>(g.column, column + i, shift, columns.of[v][i]);
    }
    return __all_sync(kWholeWarp, close);
}

template <class S>
__device__ void give_rows(const Tile<S>& t, const Gradient<S>& g, const Place& at, int64_t row,
                          real_of<S> shift, const Inside& inside, const RowCoefficients<S>& rows,
                          const ColumnSums<S>& columns) {
    using T = real_of<S>;
    Group<S> groups[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
        if (inside.vector[v]) groups[v] = load_group(t, row, column_of<S>(at, v));
    T scale[kRowsAtOnce], of_row[kRowsAtOnce];
    scales_of(t, row, scale);
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) of_row[r] = rows[int(row - at.first_row) + r];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        if (!inside.vector[v]) continue;
        S* const out = g.out + row * g.out_stride + column_of<S>(at, v);
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
            T z[kLanes<S>], grad[kLanes<S>];
            group_scores<S>(groups[v].bits[r], scale[r], z);
#pragma unroll
            for (int i = 0; i < kLanes<S>; ++i)
                grad[i] = exp_of<S>(z[i] - shift) * (of_row[r] + columns.of[v][i]);
            store(out + r * g.out_stride, narrowed<S>(grad), true);
        }
    }
}

// A lane writes only vectors that it has read before: the gradient may lie where the similarities do.
template <class S>
__device__ bool backward_cell(const Tile<S>& t, const Gradient<S>& g, const Place& at) {
    if (!may_be_close(t, at) || !in_vectors<S>(g.out, g.out_stride)) return false;
    const Inside inside = inside_of(t, at);
    const real_of<S> shift = g.row.lse[at.first_row];
    RowCoefficients<S> rows;
    ColumnSums<S> columns = {};
    if (!coefficients(t, g, at, inside, shift, rows, columns)) return false;
    for (int64_t row = at.first_row; row < at.end_row; row += kRowsAtOnce)
        give_rows(t, g, at, row, shift, inside, rows, columns);
    return true;
}

template <class S>
__global__ void __launch_bounds__(kWarp* kWarpsOfBlock, kCloseBlocks<S>)
    backward_close_cells(Tile<S> t, Gradient<S> g, int64_t row_blocks, int64_t column_blocks,
                         bool* done) {
    const int64_t cell = cell_of_warp();
    if (cell >= row_blocks * column_blocks) return;
    const bool close = backward_cell(t, g, place_of_cell(t, cell, column_blocks));
    if (threadIdx.x % kWarp == 0) done[cell] = close;
}

}  // namespace
}  // namespace neglog
