// How the kernels of nll are launched: grids, clusters, and which rows are held in shared memory.

#pragma once

#include "common/torch_stable.cuh"
#include "nll/kernels.cuh"

#include <algorithm>

namespace neglog {
namespace {

constexpr int64_t kReductionNone = 0, kReductionMean = 1;  // as in aten; 2 is the sum

template <class S, Scoring scoring, class... Parameters, class... Arguments>
void launch_row_blocks(void (*kernel)(Problem<S, scoring>, Parameters...),
                       const DeviceContext& context, int64_t blocks, const Problem<S, scoring>& p,
                       Arguments... arguments) {
    if (p.rows == 0) return;
    launch(kernel, context, std::min(p.rows, blocks), block_size_for<S>(p.vocab), p, arguments...);
}

template <class S, Scoring scoring, class... Parameters, class... Arguments>
void launch_rows(void (*kernel)(Problem<S, scoring>, Parameters...), const DeviceContext& context,
                 const Problem<S, scoring>& p, Arguments... arguments) {
    const int64_t blocks = blocks_for_rows(context, p.rows, block_size_for<S>(p.vocab));
    launch_row_blocks(kernel, context, blocks, p, arguments...);
}

// Rows in shared memory

constexpr int64_t kMinSharedRowBytes = 32 << 10;  // shorter rows stay in a cache
// Shared memory of a block, at most: with the first number two blocks fit on a multiprocessor, and
// one loads while the other stores; with the second one block fits.
constexpr int64_t kSliceBytesOfTwoBlocks = 72 << 10, kSliceBytesOfOneBlock = 200 << 10;
constexpr int kMaxClusterSize = 8;  // the largest that every device with clusters supports

inline int64_t slice_bytes(int64_t row_bytes, int blocks_per_row) {
    return (row_bytes / kVectorBytes / blocks_per_row + 1 + kStateVectors) * kVectorBytes;
}

// Whether the vectors of every row lie as they do in new memory, which begins at a vector and has
// no gaps between its rows.
template <class S, Scoring scoring>
bool lies_as_new_memory(const Problem<S, scoring>& p) {
    return reinterpret_cast<uintptr_t>(p.logits) % kVectorBytes == 0 &&
           (p.logits_stride - p.vocab) % kVectorSize<S> == 0;
}

// The size of the cluster that holds a row in shared memory, or 0 where the row is not held.
template <class S, Scoring scoring>
int blocks_per_row_in_shared(const Problem<S, scoring>& p, const Output<compute_t<S>>& o,
                             const DeviceContext& context) {
    const int64_t bytes = p.vocab * int64_t(sizeof(S));
    if (!p.target || p.label_smoothing != 0 || o.correct || bytes < kMinSharedRowBytes) return 0;
    const int64_t limit = max_dynamic_shared(context);
    const int largest = has_clusters(context) ? kMaxClusterSize : 1;
    for (int blocks = 1; blocks <= largest; blocks *= 2)
        if (slice_bytes(bytes, blocks) <= std::min(kSliceBytesOfTwoBlocks, limit)) return blocks;
    const bool fits = slice_bytes(bytes, kMaxClusterSize) <= std::min(kSliceBytesOfOneBlock, limit);
    return largest == kMaxClusterSize && fits ? kMaxClusterSize : 0;
}

// Loss and gradient in one pass. Where g.first is null, the loss alone: with the same bits, which
// forward_rows has not where it takes the sums of a cluster's row in another order.
template <class S, Scoring scoring>
void launch_forward_backward(const DeviceContext& context, const Problem<S, scoring>& p,
                             const Output<compute_t<S>>& o, const Gradient<S>& g,
                             bool vectors_match) {
    const bool may_hold = p.rows != 0 && vectors_match;
    const int blocks_per_row = may_hold ? blocks_per_row_in_shared(p, o, context) : 0;
    if (blocks_per_row == 0) {
        launch_rows(forward_backward_rows<S, scoring>, context, p, o, g);
        return;
    }
    const int64_t clusters = std::min(p.rows, max_blocks(context, kRowThreads) / blocks_per_row);
    const int64_t shared_bytes = slice_bytes(p.vocab * int64_t(sizeof(S)), blocks_per_row);
    launch_clusters(forward_backward_rows_in_shared<S, scoring>, context, clusters * blocks_per_row,
                    kRowThreads, blocks_per_row, shared_bytes, p, o, g);
}

template <class... Parameters, class... Arguments>
void launch_one_block(void (*kernel)(Parameters...), const DeviceContext& context,
                      Arguments... arguments) {
    launch(kernel, context, 1, kMaxThreads, arguments...);
}

}  // namespace
}  // namespace neglog
