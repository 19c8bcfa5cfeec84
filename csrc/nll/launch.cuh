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
// Shared memory of a block, at most: with the first number three blocks fit on a multiprocessor, and
// one loads while another computes and the third stores; with the second one block fits.
constexpr int64_t kSharedBytesOfThreeBlocks = 72 << 10, kSharedBytesOfOneBlock = 200 << 10;

inline int64_t slice_bytes(int64_t row_bytes, int blocks) {
    return (row_bytes / kVectorBytes / blocks + 1 + kStateVectors) * kVectorBytes;
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
    const int64_t bytes = p.vocab * int64_t(sizeof(S)), limit = max_dynamic_shared(context);
    if (!p.target || p.label_smoothing != 0 || o.correct || bytes < kMinSharedRowBytes) return 0;
    const int largest = has_clusters(context) ? kMaxClusterSize : 1;
    for (int blocks = 1; blocks <= largest; blocks *= 2)
        if (slice_bytes(bytes, blocks) <= std::min(kSharedBytesOfThreeBlocks, limit)) return blocks;
    const bool fits =
        slice_bytes(bytes, kMaxClusterSize) <= std::min(kSharedBytesOfOneBlock, limit);
    return largest == kMaxClusterSize && fits ? kMaxClusterSize : 0;
}

// Loss and gradient in one pass. Where g.first is null, the loss alone: with the same bits, which
// forward_rows has not where it takes the sums of a cluster's row in another order.
template <class S, Scoring scoring>
void launch_forward_backward(const DeviceContext& context, const Problem<S, scoring>& p,
                             const Output<compute_t<S>>& o, const Gradient<S>& g,
                             bool vectors_match) {
    const bool may_hold = p.rows != 0 && vectors_match;
    const int blocks = may_hold ? blocks_per_row_in_shared(p, o, context) : 0;
    if (blocks == 0) {
        launch_rows(forward_backward_rows<S, scoring>, context, p, o, g);
        return;
    }
    const auto kernel = forward_backward_rows_in_shared<S, scoring>;
    const Grid grid = {kRowThreads, blocks, slice_bytes(p.vocab * int64_t(sizeof(S)), blocks)};
    const int64_t clusters = std::min(p.rows, resident_clusters(kernel, context, grid));
    launch_clusters(kernel, context, clusters * blocks, grid, p, o, g);
}

// A block's threads read so many numbers in the time that it takes to begin a cluster.
constexpr int64_t kNumbersOfOneBlock = 2 * kMaxThreads * kNumbersInFlight;

// A kernel that sums `count` numbers.
template <class... Parameters, class... Arguments>
void launch_sums(void (*kernel)(Parameters...), const DeviceContext& context, int64_t count,
                 Arguments... arguments) {
    const bool many = count > kNumbersOfOneBlock && has_clusters(context);
    const int blocks = many ? kMaxClusterSize : 1;
    const Grid grid = {kMaxThreads, blocks, kMaxClusterSize * int64_t(sizeof(Sums))};
    launch_clusters(kernel, context, blocks, grid, arguments...);
}

}  // namespace
}  // namespace neglog
