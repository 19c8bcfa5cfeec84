// A row of logits kept in shared memory, so that its gradient is written after a single read of
// global memory. The row lies in the shared memory of one block, or in slices in that of the blocks
// of a cluster (sm_90 and later).

#pragma once

#include "common/async_copy.cuh"
#include "common/cluster.cuh"
#include "nll/row.cuh"

namespace neglog {
namespace {

// Dynamic shared memory begins with two softmax states, used in turn by consecutive rows: see
// cluster_reduce. They take a vector each, doubles being the largest. The slice follows.
constexpr int kStateVectors = 2;

// What a block has of a row. Head and tail of the row belong to the block of rank 0.
struct RowSlice {
    int64_t first_column, vectors;
    int64_t edge;  // this thread's column of head or tail, see edge_column; vocab or more for none
};

template <class S>
__device__ RowSlice slice_of(const S* row, int64_t vocab) {
    const VectorSplit<S> split = split_at_vectors(row, vocab);
    const int64_t rank = cluster_rank(), blocks = cluster_size();
    const int64_t first = split.vectors * rank / blocks, end = split.vectors * (rank + 1) / blocks;
    return {split.head + first * kVectorSize<S>, end - first,
            rank == 0 ? edge_column(split) : vocab};
}

// A slice is copied and read in groups of vectors: a thread computes with the first while the others
// are under way, and needs no registers for them. So all of the slice is in flight at once, where
// loads would have 16 KB of it, and the vectors of the next row follow as soon as those of this one
// are read for the last time. A thread reads only vectors that it has copied itself, so no barrier
// is needed.
constexpr int kCopyGroups = 4;

// Vectors of a group, a multiple of the block's threads and the same number for every row.
template <class S>
__device__ int vectors_of_group(int64_t vocab) {
    const int64_t of_slice = vocab / kVectorSize<S> / cluster_size() + 1;  // at most
    const int64_t one_each = kCopyGroups * blockDim.x;
    return int((of_slice + one_each - 1) / one_each * blockDim.x);
}

// Calls visit(v) for this thread's vectors of a group.
template <class Visit>
__device__ void for_each_in_group(int group, int group_vectors, const RowSlice& slice,
                                  Visit visit) {
    const int behind = (group + 1) * group_vectors, vectors = int(slice.vectors);
    const int end = vectors < behind ? vectors : behind;
    for (int v = group * group_vectors + int(threadIdx.x); v < end; v += int(blockDim.x)) visit(v);
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
    auto state = empty_state<T>();
#pragma unroll 1
    for (int group = 0; group < kCopyGroups; ++group) {
        wait_for_group(group);
        for_each_in_group(group, group_vectors, slice, [&](int v) {
            T z[kVectorSize<S>];
            to_scores(p.to_score, unpack<S>(held[v]), z);
            accumulate<S>(state, z);
        });
    }
    if (slice.edge < p.vocab) {
        T z[1];
        to_scores(p.to_score, load<S, 1>(row + slice.edge, true), z);
        accumulate<S>(state, z);
    }
    return state;
}

// Writes the gradient of a group of the slice. Vectors of the row `out` lie as those of the logits
// do; it may be the row of logits itself.
template <class S, Scoring scoring>
__device__ void write_group_gradient(int group, int group_vectors, const Problem<S, scoring>& p,
                                     int64_t row, const RowSlice& slice, const uint4* held,
                                     Lse<compute_t<S>> lse, const GradientFactors<compute_t<S>>& f,
                                     S* out) {
    constexpr int n = kVectorSize<S>;
    for_each_in_group(group, group_vectors, slice, [&](int v) {
        const int64_t column = slice.first_column + v * n;
        store(out + column, gradient_at<false>(p, row, column, unpack<S>(held[v]), lse, f), true);
        write_target_gradient<S, n>(f, column, out);
    });
}

template <class S, Scoring scoring>
__device__ void write_edge_gradient(const Problem<S, scoring>& p, int64_t row,
                                    const RowSlice& slice, Lse<compute_t<S>> lse,
                                    const GradientFactors<compute_t<S>>& f, S* out) {
    if (slice.edge >= p.vocab) return;
    const auto x = load<S, 1>(logits_row(p, row) + slice.edge, true);
    store(out + slice.edge, gradient_at<false>(p, row, slice.edge, x, lse, f), true);
    write_target_gradient<S, 1>(f, slice.edge, out);
}

template <class S>
__device__ void zero_slice(const RowSlice& slice, int64_t vocab, S* out) {
    auto vectors = reinterpret_cast<uint4*>(out + slice.first_column);
    for (int64_t v = threadIdx.x; v < slice.vectors; v += blockDim.x) vectors[v] = uint4{};
    if (slice.edge < vocab) out[slice.edge] = S(0);
}

}  // namespace
}  // namespace neglog
