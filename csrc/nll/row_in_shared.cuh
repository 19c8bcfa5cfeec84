// A row of logits kept in shared memory, so that its gradient is written after a single read of
// global memory. The row lies in the shared memory of one block, or in slices in that of the blocks
// of a cluster (sm_90 and later).

#pragma once

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

// Copies the slice's vectors to shared memory, `held`, and returns this thread's softmax state.
// Each thread later reads only the vectors that it has copied itself, so no barrier is needed.
template <class S, Scoring scoring>
__device__ SoftmaxState<compute_t<S>> load_slice(const Problem<S, scoring>& p, const S* row,
                                                 const RowSlice& slice, uint4* held) {
    using T = compute_t<S>;
    auto state = empty_state<T>();
    const auto vectors = reinterpret_cast<const uint4*>(row + slice.first_column);
    for_each_vector<kLoadsInFlight<S>>(vectors, slice.vectors, [&](int64_t v, const uint4& bits) {
        held[v] = bits;
        T z[kVectorSize<S>];
        to_scores(p.to_score, unpack<S>(bits), z);
        accumulate<S>(state, z);
    });
    if (slice.edge < p.vocab) {
        T z[1];
        to_scores(p.to_score, load<S, 1>(row + slice.edge, true), z);
        accumulate<S>(state, z);
    }
    return state;
}

// Writes the gradient of the slice. Vectors of the row `out` lie as those of the logits do; it may
// be the row of logits itself.
template <class S, Scoring scoring>
__device__ void write_slice_gradient(const Problem<S, scoring>& p, int64_t row,
                                     const RowSlice& slice, const uint4* held,
                                     Lse<compute_t<S>> lse, const GradientFactors<compute_t<S>>& f,
                                     S* out) {
    constexpr int n = kVectorSize<S>;
    for (int64_t v = threadIdx.x; v < slice.vectors; v += blockDim.x) {
        const int64_t column = slice.first_column + v * n;
        store(out + column, gradient_at<false>(p, row, column, unpack<S>(held[v]), lse, f), true);
        write_target_gradient<S, n>(f, column, out);
    }
    if (slice.edge < p.vocab) {
        const auto x = load<S, 1>(logits_row(p, row) + slice.edge, true);
        store(out + slice.edge, gradient_at<false>(p, row, slice.edge, x, lse, f), true);
        write_target_gradient<S, 1>(f, slice.edge, out);
    }
}

template <class S>
__device__ void zero_slice(const RowSlice& slice, int64_t vocab, S* out) {
    auto vectors = reinterpret_cast<uint4*>(out + slice.first_column);
    for (int64_t v = threadIdx.x; v < slice.vectors; v += blockDim.x) vectors[v] = uint4{};
    if (slice.edge < vocab) out[slice.edge] = S(0);
}

}  // namespace
}  // namespace neglog
