// A row of logits kept in shared memory, so that its gradient is written after a single read of
// global memory. The row lies in the shared memory of one block, or in slices in that of the blocks
// of a cluster (sm_90 and later).

#pragma once

#include "common/async_copy.cuh"
#include "common/cluster.cuh"
#include "nll/row.cuh"

namespace neglog {
namespace {

// Dynamic shared memory begins with what the blocks of a cluster tell each other, see ClusterMerge.
// A state takes a vector at most. The slice follows.
constexpr int kStateVectors = 2 * kStatesOfCluster;

// What a block has of a row. Head and tail of the row belong to the block of rank 0.
struct RowSlice {
    int first_column, vectors;
    int edge;  // this thread's column of head or tail, see edge_column; vocab or more for none
};

// In 32 bits and by shifts: a row of a cluster is short, and blocks are a power of two. Divisions of
// 64 bits took a quarter of a row's instructions.
template <class S>
__device__ RowSlice slice_of(const S* row, int64_t vocab, const Cluster& cluster) {
    const VectorSplit<S> split = split_at_vectors(row, vocab);
    const unsigned vectors = unsigned(split.vectors), shift = unsigned(__ffs(cluster.blocks) - 1);
    const unsigned first = vectors * cluster.rank >> shift;
    const unsigned end = vectors * (cluster.rank + 1) >> shift;
    return {int(split.head + first * kVectorSize<S>), int(end - first),
            int(cluster.rank == 0 ? edge_column(split) : vocab)};
}

// Whether this thread writes the column's gradient.
template <class S>
__device__ bool is_own_of_slice(const RowSlice& slice, int column) {
    const int inside = column - slice.first_column;
    if (inside < 0 || inside >= slice.vectors * kVectorSize<S>) return column == slice.edge;
    return threadIdx.x == unsigned(inside) / kVectorSize<S> % blockDim.x;
}

// One of the thread's own logits, from where the slice is held or, of head and tail, the row.
template <class S>
__device__ compute_t<S> own_logit(const RowSlice& slice, const uint4* held, const S* row,
                                  int column) {
    const bool is_edge = column == slice.edge;
    return widen(is_edge ? row[column]
                         : reinterpret_cast<const S*>(held)[column - slice.first_column]);
}

// The targets of the next rows that this block has, one in each lane, -1 for a row that does not
// count. Loaded when it is needed, a row's would hold up all warps for some 800 cycles.
class UpcomingTargets {
    int of_lane = -1, place = kWarpSize - 1;

public:
    // Once for each row, in order, by all threads.
    template <class S, Scoring scoring>
    __device__ void advance_to(const Problem<S, scoring>& p, int64_t row, int64_t step) {
        if (++place < kWarpSize - 1) return;
        const int64_t own = row + int64_t(threadIdx.x % kWarpSize) * step;
        of_lane = own < p.rows && !is_ignored(p, own) ? int(target_of(p, own)) : -1;
        place = 0;
    }

    __device__ int of_row() const { return __shfl_sync(kFullMask, of_lane, place); }
    __device__ int of_next_row() const { return __shfl_sync(kFullMask, of_lane, place + 1); }
};

// A slice is copied and read in groups of vectors: a thread computes with the first while the others
// are under way, and needs no registers for them. So all of the slice is in flight at once, where
// loads would have 16 KB of it, and the vectors of the next row follow as soon as those of this one
// are read for the last time. A thread reads only vectors that it has copied itself, so no barrier
// is needed. Two slices of half the size, the next row's copied while this one is read, took longer:
// 1.52 ms where this took 1.31, for 8192 x 131072 bfloat16 on an H200. The blocks of a row then
// merge twice as often for their bytes.
constexpr int kCopyGroups = 4;

// Vectors of a group, a multiple of the block's threads and the same number for every row.
template <class S>
__device__ int vectors_of_group(int64_t vocab, const Cluster& cluster) {
    const int of_slice = int(vocab / kVectorSize<S>) / int(cluster.blocks) + 1;  // at most
    const int one_each = kCopyGroups * int(blockDim.x);
    return (of_slice + one_each - 1) / one_each * int(blockDim.x);
}

// Calls visit(v) for this thread's vectors of a group.
template <class Visit>
__device__ void for_each_in_group(int group, int group_vectors, const RowSlice& slice,
                                  Visit visit) {
    const int first = group * group_vectors, vectors = slice.vectors;
    const int behind = first + group_vectors, end = vectors < behind ? vectors : behind;
    for (int v = first + int(threadIdx.x); v < end; v += int(blockDim.x)) visit(v);
}

// Copies a group of the slice's vectors to shared memory, `held`.
template <class S>
__device__ void copy_group(int group, int group_vectors, const RowSlice& slice, const S* row,
                           uint4* held) {
    const auto vectors = reinterpret_cast<const uint4*>(row + slice.first_column);
    for_each_in_group(group, group_vectors, slice,
                      [&](int v) { copy_async(held + v, vectors + v); });
    end_copy_group();
}

// Until the group has come; those after it may be under way.
__device__ inline void wait_for_group(int group) {
    static_assert(kCopyGroups == 4);
    if (group == 0) wait_for_copies<3>();
    else if (group == 1) wait_for_copies<2>();
    else if (group == 2) wait_for_copies<1>();
    else wait_for_copies<0>();
}

// This thread's softmax state of the slice that is being copied to `held`.
template <class S, Scoring scoring>
__device__ SoftmaxState<compute_t<S>> read_slice(const Problem<S, scoring>& p, const S* row,
                                                 const RowSlice& slice, int group_vectors,
                                                 const uint4* held) {
    using T = compute_t<S>;
    RunningSoftmax<S> running;
#pragma unroll 1
    for (int group = 0; group < kCopyGroups; ++group) {
        wait_for_group(group);
        for_each_in_group(group, group_vectors, slice, [&](int v) {
            T z[kVectorSize<S>];
            to_scores(p.to_score, unpack<S>(load_vector(held + v)), z);
            running.add(z);
        });
    }
    if (slice.edge < p.vocab) {
        T z[1];
        to_scores(p.to_score, load<S, 1>(row + slice.edge, true), z);
        running.add(z);
    }
    return running.state();
}

// Writes the gradient of a group of the slice. Vectors of the row `out` lie as those of the logits
// do; it may be the row of logits itself.
template <class S, Scoring scoring>
__device__ void write_group_gradient(int group, int group_vectors, const Problem<S, scoring>& p,
                                     int64_t row, const RowSlice& slice, const uint4* held,
                                     Lse<compute_t<S>> lse, const GradientFactors<S>& f, S* out) {
    for_each_in_group(group, group_vectors, slice, [&](int v) {
        const int64_t column = slice.first_column + v * kVectorSize<S>;
        store(out + column,
              gradient_at<false>(p, row, column, unpack<S>(load_vector(held + v)), lse, f), true);
    });
}

template <class S, Scoring scoring>
__device__ void write_edge_gradient(const Problem<S, scoring>& p, int64_t row,
                                    const RowSlice& slice, Lse<compute_t<S>> lse,
                                    const GradientFactors<S>& f, S* out) {
    if (slice.edge >= p.vocab) return;
    const auto x = load<S, 1>(logits_row(p, row) + slice.edge, true);
    store(out + slice.edge, gradient_at<false>(p, row, slice.edge, x, lse, f), true);
}

template <class S>
__device__ void zero_slice(const RowSlice& slice, int64_t vocab, S* out) {
    auto vectors = reinterpret_cast<uint4*>(out + slice.first_column);
    for (int64_t v = threadIdx.x; v < slice.vectors; v += blockDim.x) vectors[v] = uint4{};
    if (slice.edge < vocab) out[slice.edge] = S(0);
}

}  // namespace
}  // namespace neglog
