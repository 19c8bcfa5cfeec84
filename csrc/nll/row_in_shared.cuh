// A row of logits on chip, turned into its gradient in place: read once, written once. It lies in the
// shared memory of one block, or shared out over that of a cluster's (sm_90 and later).

#pragma once

#include "nll/row.cuh"

namespace neglog {
namespace {

// Before it, two states, one for each of two rows that follow one another.
constexpr int kSlotVectors = 2;

// This block's part of a row's vectors, and the column of the one element outside them that this
// thread takes, or beyond the vocabulary.
struct Slice {
    int64_t first_column, vectors, edge;
};

template <class S>
__device__ Slice slice_of(const S* row, int64_t vocab) {
    const Cut<S> cut = cut_at_vectors(row, vocab);
    const int64_t part = cluster_rank(), parts = cluster_size();
    const int64_t first = cut.vectors * part / parts, end = cut.vectors * (part + 1) / parts;
    return {cut.head + first * kLanes<S>, end - first, part == 0 ? edge_column(cut) : vocab};
}

// Reads the slice into `held`, where each thread finds what it has put there itself.
template <class S, bool capped>
__device__ LogSumExp<real_of<S>> take(const Problem<S, capped>& p, const S* row, const Slice& own,
                                      uint4* held) {
    using T = real_of<S>;
    auto state = empty_log_sum_exp<T>();
    const auto vectors = reinterpret_cast<const uint4*>(row + own.first_column);
    walk_vectors<kInFlight<S>>(vectors, own.vectors, [&](int64_t v, const uint4& bits) {
        held[v] = bits;
        T z[kLanes<S>];
        scores(p.cap, unpacked<S>(bits), z);
        absorb<S>(state, z);
    });
    if (own.edge < p.vocab) {
        T z[1];
        scores(p.cap, load<S, 1>(row + own.edge, true), z);
        absorb<S>(state, z);
    }
    return state;
}

// Writes the gradient over the slice.
template <class S, bool capped>
__device__ void give(const Problem<S, capped>& p, int64_t row, const Slice& own, const uint4* held,
                     Lse<real_of<S>> lse, const Factors<real_of<S>>& f, S* out) {
    constexpr int n = kLanes<S>;
    for (int64_t v = threadIdx.x; v < own.vectors; v += blockDim.x) {
        const int64_t column = own.first_column + v * n;
        store(out + column, gradient_at<false>(p, row, column, unpacked<S>(held[v]), lse, f), true);
        write_at_target<S, n>(f, column, out);
    }
    if (own.edge < p.vocab) {
        const auto x = load<S, 1>(out + own.edge, true);
        store(out + own.edge, gradient_at<false>(p, row, own.edge, x, lse, f), true);
        write_at_target<S, 1>(f, own.edge, out);
    }
}

template <class S>
__device__ void zero(const Slice& own, int64_t vocab, S* out) {
    auto vectors = reinterpret_cast<uint4*>(out + own.first_column);
    for (int64_t v = threadIdx.x; v < own.vectors; v += blockDim.x) vectors[v] = uint4{};
    if (own.edge < vocab) out[own.edge] = S(0);
}

}  // namespace
}  // namespace neglog
