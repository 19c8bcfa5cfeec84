// Cells of which all scores are close together, so that one exp of each score serves both its row
// and its column.
//
// (a) A warp computes exp(z - shift) with one shift for the whole cell, where cell.cuh has a shift
//     for each row and each column. If the scores are too far apart, some sum comes out too small,
//     too large or NaN. That is known only afterwards, and the host cannot choose without waiting
//     for the device; so this kernel tries every cell, notes in cell_done which ones succeeded, and
//     the kernel of cell.cuh computes the others.
// (b) Not tried are cells that the tile's edge cuts within a vector or within four rows, unaligned
//     cells, cells with an excluded pair, and cells with a positive, whose row must be more exact.
//     Calls with biases or groups do not launch this kernel.
// (c) Four rows at a time: their loads overlap, and a column's sum is updated once for the four.

#pragma once

#include "pairs/cell.cuh"

namespace neglog {
namespace {

constexpr int kRowsPerStep = 4;
constexpr int kWarpsPerBlock = 4;  // each with a cell of its own (in sigmoid_rows, a row)

// A sum is used if it lies between 1 / kSumLimit and kSumLimit. The scores that matter are then so
// close to the shift that z - shift is rounded by at most 1e-6, less than the scaling had rounded
// z. For 16 bits the limit is wider: there the rounding of the similarity itself is far larger.
template <class S>
constexpr compute_t<S> kSumLimit = sizeof(S) == 2 ? 0x1p60 : 0x1p16;

// In the backward, how far each log-sum-exp may be from the shift, that of the cell's first row.
template <class S>
constexpr compute_t<S> kMaxLseGap = sizeof(S) == 2 ? 40 : 8;

__device__ inline int64_t cell_of_warp() {
    return int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
}

template <class S>
__device__ bool sum_in_range(compute_t<S> sum) {
    return sum >= 1 / kSumLimit<S> && sum <= kSumLimit<S>;  // false for NaN
}

// Whether a row of the cell has its index, the positive or the excluded one, among the cell's
// columns. All lanes of the warp call it.
template <class S>
__device__ bool contains_any(const Tile<S>& t, const CellBounds& cell, const int64_t* indices) {
    if (!indices) return false;
    bool any = false;
#pragma unroll
    for (int i = 0; i < kCellRows / kWarpSize; ++i) {
        const int64_t row = cell.first_row + i * kWarpSize + threadIdx.x % kWarpSize;
        if (row >= cell.end_row) continue;
        const int64_t column = indices[row] - t.first_column - cell.first_column;
        any |= column >= 0 && column < kCellColumns<S>;
    }
    return __any_sync(kFullMask, any);
}

template <class S>
__device__ bool rows_are_aligned(const S* first, int64_t stride) {
    return is_aligned(first) && stride % kVectorSize<S> == 0;
}

template <class S>
__device__ bool allows_one_exp(const Tile<S>& t, const CellBounds& cell) {
    const bool whole =
        (cell.end_row - cell.first_row) % kRowsPerStep == 0 &&
        (t.columns % kVectorSize<S> == 0 || cell.first_column + kCellColumns<S> <= t.columns);
    return whole && rows_are_aligned(t.similarity, t.stride) &&
           !contains_any(t, cell, t.positive) && !contains_any(t, cell, t.excluded);
}

// One vector of this lane in each of four rows.
template <class S>
struct VectorRows {
    uint4 bits[kRowsPerStep];
};

template <class S>
__device__ VectorRows<S> load_vector_rows(const Tile<S>& t, int64_t row, int64_t column) {
    VectorRows<S> vectors;
    const S* const from = t.similarity + row * t.stride + column;
#pragma unroll
    for (int r = 0; r < kRowsPerStep; ++r)
        vectors.bits[r] = load_vector(reinterpret_cast<const uint4*>(from + r * t.stride));
    return vectors;
}

template <class S>
__device__ void to_scores(const uint4& bits, compute_t<S> scale,
                          compute_t<S> (&z)[kVectorSize<S>]) {
    const auto x = unpack<S>(bits);
#pragma unroll
    for (int i = 0; i < kVectorSize<S>; ++i) z[i] = rounded_product(widen(x.value[i]), scale);
}

template <class S>
__device__ void load_scales(const Tile<S>& t, int64_t row, compute_t<S> (&scale)[kRowsPerStep]) {
#pragma unroll
    for (int r = 0; r < kRowsPerStep; ++r) scale[r] = t.scale[(row + r) * t.scale_stride];
}

// Which of this lane's vectors lie in the tile.
struct Inside {
    bool vector[kVectorsPerLane];
};

template <class S>
__device__ Inside vectors_inside(const Tile<S>& t, const CellBounds& cell) {
    Inside inside;
#pragma unroll
    for (int v = 0; v < kVectorsPerLane; ++v)
        inside.vector[v] = lane_column<S>(cell, v) < t.columns;
    return inside;
}

// The shift of the forward: the largest score of the cell's first four rows.
template <class S>
__device__ compute_t<S> cell_shift(const Tile<S>& t, const CellBounds& cell, const Inside& inside) {
    using T = compute_t<S>;
    T scale[kRowsPerStep], largest = -INFINITY;
    load_scales(t, cell.first_row, scale);
#pragma unroll
    for (int v = 0; v < kVectorsPerLane; ++v) {
        if (!inside.vector[v]) continue;
        const auto vectors = load_vector_rows(t, cell.first_row, lane_column<S>(cell, v));
#pragma unroll
        for (int r = 0; r < kRowsPerStep; ++r) {
            T z[kVectorSize<S>];
            to_scores<S>(vectors.bits[r], scale[r], z);
#pragma unroll
            for (int i = 0; i < kVectorSize<S>; ++i) largest = fmax(largest, z[i]);
        }
    }
    return warp_maximum(largest);
}

// Stores n numbers, a whole number of vectors.
template <class T, int n>
__device__ void store_vectors(T* to, const T (&x)[n]) {
    const bool aligned = is_aligned(to);
#pragma unroll
    for (int first = 0; first < n; first += kVectorSize<T>) {
        Elements<T, kVectorSize<T>> vector;
#pragma unroll
        for (int i = 0; i < kVectorSize<T>; ++i) vector.value[i] = x[first + i];
        store(to + first, vector, aligned);
    }
}

// A number for each column of this lane.
template <class S>
struct PerColumn {
    compute_t<S> value[kVectorsPerLane][kVectorSize<S>];
};

// Adds the exps of four rows to the sums of their columns. Every lane gets the rows' sums.
template <class S>
__device__ void accumulate_rows(const Tile<S>& t, const CellBounds& cell, int64_t row,
                                compute_t<S> shift, const Inside& inside, PerColumn<S>& columns,
                                compute_t<S> (&row_sum)[kRowsPerStep]) {
    using T = compute_t<S>;
    VectorRows<S> vectors[kVectorsPerLane];
#pragma unroll
    for (int v = 0; v < kVectorsPerLane; ++v)
        if (inside.vector[v]) vectors[v] = load_vector_rows(t, row, lane_column<S>(cell, v));
    T scale[kRowsPerStep];
    load_scales(t, row, scale);
#pragma unroll
    for (int r = 0; r < kRowsPerStep; ++r) row_sum[r] = 0;
#pragma unroll
    for (int v = 0; v < kVectorsPerLane; ++v) {
        if (!inside.vector[v]) continue;
        T part[kVectorSize<S>] = {};
#pragma unroll
        for (int r = 0; r < kRowsPerStep; ++r) {
            T z[kVectorSize<S>];
            to_scores<S>(vectors[v].bits[r], scale[r], z);
#pragma unroll
            for (int i = 0; i < kVectorSize<S>; ++i) {
                const T term = exp_of<S>(z[i] - shift);
                row_sum[r] += term;
                part[i] += term;
            }
        }
#pragma unroll
        for (int i = 0; i < kVectorSize<S>; ++i) columns.value[v][i] += part[i];
    }
#pragma unroll
    for (int r = 0; r < kRowsPerStep; ++r) row_sum[r] = warp_sum(row_sum[r]);
}

// Returns whether the cell's states are exact, and therefore final.
template <class S>
__device__ bool forward_one_cell(const Tile<S>& t, const CellStates<compute_t<S>>& c,
                                 const CellBounds& cell) {
    using T = compute_t<S>;
    if (!allows_one_exp(t, cell)) return false;
    const Inside inside = vectors_inside(t, cell);
    const T shift = cell_shift(t, cell, inside);
    const int lane = threadIdx.x % kWarpSize;
    PerColumn<S> columns = {};
    bool in_range = true;
    for (int64_t row = cell.first_row; row < cell.end_row; row += kRowsPerStep) {
        T row_sum[kRowsPerStep];
        accumulate_rows(t, cell, row, shift, inside, columns, row_sum);
#pragma unroll
        for (int r = 0; r < kRowsPerStep; ++r) {
            in_range &= sum_in_range<S>(row_sum[r]);
            if (lane != r) continue;
            c.row_maximum[cell.column_block * t.rows + row + r] = shift;
            c.row_sum[cell.column_block * t.rows + row + r] = row_sum[r];
        }
    }
#pragma unroll
    for (int v = 0; v < kVectorsPerLane; ++v) {
        if (!c.column_sum || !inside.vector[v]) continue;
        const int64_t to = cell.row_block * t.columns + lane_column<S>(cell, v);
        T maxima[kVectorSize<S>];
        double sums[kVectorSize<S>];
#pragma unroll
        for (int i = 0; i < kVectorSize<S>; ++i) {
            in_range &= sum_in_range<S>(columns.value[v][i]);
            maxima[i] = shift;
            sums[i] = columns.value[v][i];
        }
        store_vectors(c.column_maximum + to, maxima);
        store_vectors(c.column_sum + to, sums);
    }
    return __all_sync(kFullMask, in_range);
}

// Blocks that a multiprocessor's registers must hold. A 16-bit tile of 8192 x 8192 has 512, about 4
// for each of 132 multiprocessors. Doubles take more registers.
template <class S>
constexpr int kMinBlocksOneExp = sizeof(S) == 8 ? 3 : 4;

template <class S>
__global__ void __launch_bounds__(kWarpSize* kWarpsPerBlock, kMinBlocksOneExp<S>)
    forward_cells_one_exp(Tile<S> t, CellStates<compute_t<S>> c, bool* cell_done) {
    const int64_t index = cell_of_warp();
    if (index >= c.row_blocks * c.column_blocks) return;
    const bool in_range = forward_one_cell(t, c, cell_bounds(t, index, c.column_blocks));
    if (threadIdx.x % kWarpSize == 0) cell_done[index] = in_range;
}

// Backward: the gradient is exp(z - shift) (row coefficient + column coefficient), where a
// coefficient is the upstream gradient times exp(shift - lse)

// Returns whether the lse is close enough to the shift.
template <class S>
__device__ bool load_coefficient(const Marginal<compute_t<S>>& m, int64_t index, compute_t<S> shift,
                                 compute_t<S>& coefficient) {
    const compute_t<S> gap = shift - m.lse[index];
    coefficient = m.softmax_weight[index] * exp(gap - m.low[index]);
    return fabs(gap) <= kMaxLseGap<S>;  // false for NaN
}

// The coefficients of the cell's rows: each lane holds those of the rows `lane` and `lane + 32`.
template <class S>
struct RowCoefficients {
    compute_t<S> value[kCellRows / kWarpSize];

    // All lanes of the warp call it, with the same row.
    __device__ compute_t<S> operator[](int row) const {
        const compute_t<S> lower = __shfl_sync(kFullMask, value[0], row % kWarpSize);
        const compute_t<S> upper = __shfl_sync(kFullMask, value[1], row % kWarpSize);
        return row < kWarpSize ? lower : upper;
    }
};

template <class S>
__device__ bool load_coefficients(const Tile<S>& t, const Gradient<S>& g, const CellBounds& cell,
                                  const Inside& inside, compute_t<S> shift,
                                  RowCoefficients<S>& rows, PerColumn<S>& columns) {
    bool in_range = true;
#pragma unroll
    for (int i = 0; i < kCellRows / kWarpSize; ++i) {
        const int64_t row = cell.first_row + i * kWarpSize + threadIdx.x % kWarpSize;
        rows.value[i] = 0;
        if (row < cell.end_row) in_range &= load_coefficient<S>(g.row, row, shift, rows.value[i]);
    }
#pragma unroll
    for (int v = 0; v < kVectorsPerLane; ++v) {
        if (!g.column.lse || !inside.vector[v]) continue;
        const int64_t column = lane_column<S>(cell, v);
#pragma unroll
        for (int i = 0; i < kVectorSize<S>; ++i)
            in_range &= load_coefficient<S>(g.column, column + i, shift, columns.value[v][i]);
    }
    return __all_sync(kFullMask, in_range);
}

template <class S>
__device__ void write_gradient_rows(const Tile<S>& t, const Gradient<S>& g, const CellBounds& cell,
                                    int64_t row, compute_t<S> shift, const Inside& inside,
                                    const RowCoefficients<S>& rows, const PerColumn<S>& columns) {
    using T = compute_t<S>;
    VectorRows<S> vectors[kVectorsPerLane];
#pragma unroll
    for (int v = 0; v < kVectorsPerLane; ++v)
        if (inside.vector[v]) vectors[v] = load_vector_rows(t, row, lane_column<S>(cell, v));
    T scale[kRowsPerStep], row_coefficient[kRowsPerStep];
    load_scales(t, row, scale);
#pragma unroll
    for (int r = 0; r < kRowsPerStep; ++r) row_coefficient[r] = rows[int(row - cell.first_row) + r];
#pragma unroll
    for (int v = 0; v < kVectorsPerLane; ++v) {
        if (!inside.vector[v]) continue;
        S* const out = g.out + row * g.out_stride + lane_column<S>(cell, v);
#pragma unroll
        for (int r = 0; r < kRowsPerStep; ++r) {
            T z[kVectorSize<S>], grad[kVectorSize<S>];
            to_scores<S>(vectors[v].bits[r], scale[r], z);
#pragma unroll
            for (int i = 0; i < kVectorSize<S>; ++i)
                grad[i] = exp_of<S>(z[i] - shift) * (row_coefficient[r] + columns.value[v][i]);
            store(out + r * g.out_stride, narrowed<S>(grad), true);
        }
    }
}

// Returns whether the cell's gradient was written. A lane writes only vectors that it has read
// itself, because the gradient may lie over the similarities.
template <class S>
__device__ bool backward_one_cell(const Tile<S>& t, const Gradient<S>& g, const CellBounds& cell) {
    if (!allows_one_exp(t, cell) || !rows_are_aligned<S>(g.out, g.out_stride)) return false;
    const Inside inside = vectors_inside(t, cell);
    const compute_t<S> shift = g.row.lse[cell.first_row];
    RowCoefficients<S> rows;
    PerColumn<S> columns = {};
    if (!load_coefficients(t, g, cell, inside, shift, rows, columns)) return false;
    for (int64_t row = cell.first_row; row < cell.end_row; row += kRowsPerStep)
        write_gradient_rows(t, g, cell, row, shift, inside, rows, columns);
    return true;
}

template <class S>
__global__ void __launch_bounds__(kWarpSize* kWarpsPerBlock, kMinBlocksOneExp<S>)
    backward_cells_one_exp(Tile<S> t, Gradient<S> g, int64_t row_blocks, int64_t column_blocks,
                           bool* cell_done) {
    const int64_t index = cell_of_warp();
    if (index >= row_blocks * column_blocks) return;
    const bool in_range = backward_one_cell(t, g, cell_bounds(t, index, column_blocks));
    if (threadIdx.x % kWarpSize == 0) cell_done[index] = in_range;
}

}  // namespace
}  // namespace neglog
