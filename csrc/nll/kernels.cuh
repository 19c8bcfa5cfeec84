// The kernels of nll: over rows (row.cuh, row_in_shared.cuh), and sums over all rows. nll.cu launches
// them.

#pragma once

#include "nll/row_in_shared.cuh"

namespace neglog {
namespace {

// Kernels over rows, one block to a row

template <class S, Scoring scoring>
__global__ void __launch_bounds__(kRowThreads, kMinBlocks<S>)
    forward_rows(Problem<S, scoring> p, Output<compute_t<S>> o) {
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) row_forward(p, o, row);
}

// The target's column where this thread has it in for_each_in_row, else -1. Of a row that counts.
template <class S, Scoring scoring>
__device__ int64_t own_target(const Problem<S, scoring>& p, int64_t row) {
    if (!p.target) return -1;
    const int64_t target = target_of(p, row);
    return is_own_column(logits_row(p, row), p.vocab, target) ? target : -1;
}

// What forwards expect the upstream of their backward to be: that of the last one. After kPatience
// backwards that had another than the one before them they expect nothing, and form no gradient,
// until one has the same again.
template <class T>
struct Remembered {
    T upstream, misses;
};
constexpr int kPatience = 2;

// NaN for nothing.
template <class T>
__device__ T expected_upstream(const Remembered<T>& remembered) {
    return remembered.misses < kPatience ? remembered.upstream : T(NAN);
}

// An upstream of 0 is not expected: -0 equals it, and its gradient has zeros of another sign. Nor
// is one of inf or NaN, which a step brings that is then left out.
template <class T>
__device__ void remember(T upstream, Remembered<T>& remembered) {
    if (upstream == remembered.upstream) {
        remembered.misses = 0;
        return;
    }
    remembered.misses += 1;
    if (isfinite(upstream) && upstream != 0) remembered.upstream = upstream;
}

// What a gradient was formed for in the forward, and where to remember what it is wanted for.
template <class T>
struct Formed {
    const T* upstream;          // null where `out` holds no gradient yet
    Remembered<T>* remembered;  // null for nowhere
};

// Nearly every call finds that `out` was formed for its upstream, and returns at once.
template <class S, Scoring scoring>
__global__ void __launch_bounds__(kRowThreads, kMinBlocksBackward<S, scoring>)
    backward_rows(Problem<S, scoring> p, Upstream<compute_t<S>> up, Saved<compute_t<S>> kept,
                  Formed<compute_t<S>> formed, S* out) {
    if (formed.remembered && blockIdx.x == 0 && threadIdx.x == 0)
        remember(up.loss[0], *formed.remembered);
    if (formed.upstream && *formed.upstream == up.loss[0]) return;
    const double scale = up.divisor ? 1 / double(*up.divisor) : 1;
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const RowUpstream u = {up.loss[row] * scale, up.lse.first ? up.lse[row] : 0,
                               up.entropy.first ? up.entropy[row] : 0,
                               up.entropy.first ? kept.entropy[row] : 0};
        S* const out_row = out + row * p.vocab;
        // Exactly zero, even where the logits are NaN.
        const bool unused = u.grad_lse == 0 && u.grad_entropy == 0, counted = !is_ignored(p, row);
        if (!counted && (unused || !isfinite(kept.lse[row]))) {
            zero_row(out_row, p.vocab);
            continue;
        }
        const Lse<compute_t<S>> lse = {kept.lse[row], kept.lse_low[row]};
        const auto z = target_score_or_0(p, row);
        const int64_t own = counted ? own_target(p, row) : -1;
        const auto f = gradient_factors(p, row, counted, own, lse, z, u);
        row_gradient<kLoadsInFlight<S>>(p, row, lse, f, out_row);
    }
}

// The upstream gradient of a row's loss, by the same operations as in backward_rows.
template <class S>
__device__ double row_upstream(const Gradient<S>& g) {
    const double upstream = g.upstream ? double(*g.upstream) : 1;
    const bool divides = g.divisor && !(g.divide_later && *g.divisor != 0);
    return upstream * (divides ? 1 / double(*g.divisor) : 1);
}

template <class S>
__device__ bool is_formed(const Gradient<S>& g) {
    return g.first && !(g.upstream && isnan(*g.upstream));
}

template <class S, Scoring scoring>
__global__ void __launch_bounds__(kRowThreads, kMinBlocksForwardBackward)
    forward_backward_rows(Problem<S, scoring> p, Output<compute_t<S>> o, Gradient<S> g) {
    const bool forms = is_formed(g);
    const double upstream = row_upstream(g);
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const auto lse = row_forward(p, o, row);
        if (!forms) continue;
        const auto z = target_score_or_0(p, row);
        const bool counted = !is_ignored(p, row);
        const int64_t own = counted ? own_target(p, row) : -1;
        const auto f = gradient_factors(p, row, counted, own, lse, z, {upstream, 0, 0, 0});
        __syncthreads();  // all threads have read row and target, which may now be overwritten
        S* const out_row = g.first + row * g.stride;
        if (!counted) zero_row(out_row, p.vocab);
        else row_gradient<kLoadsInFlightSecondPass>(p, row, lse, f, out_row);
    }
}

// The same with the row in shared memory, one cluster to a row: for class targets, without label
// smoothing and without statistics.
template <class S, Scoring scoring>
__global__ void __launch_bounds__(kRowThreads, kMinBlocksInShared<S, scoring>)
    forward_backward_rows_in_shared(Problem<S, scoring> p, Output<compute_t<S>> o, Gradient<S> g) {
    using T = compute_t<S>;
    p.probs = nullptr;  // what nvcc is to know
    p.label_smoothing = 0;
    NEGLOG_DYNAMIC_SHARED(shared);
    __shared__ Mailbox mailboxes[2];
    const Cluster cluster = this_cluster();
    ClusterMerge<T> merge(cluster, reinterpret_cast<SoftmaxState<T>*>(shared), mailboxes);
    uint4* const held = shared + kStateVectors;
    const bool forms = is_formed(g);
    const double upstream = row_upstream(g);
    const int64_t step = gridDim.x / cluster.blocks;
    const int group_vectors = vectors_of_group<S>(p.vocab, cluster);
    UpcomingTargets targets;
    bool copying = false;  // this row; the one before it has begun
    for (int64_t row = blockIdx.x / cluster.blocks; row < p.rows; row += step) {
        targets.advance_to(p, row, step);
        const int target = targets.of_row();
        const S* const row_logits = logits_row(p, row);
        S* const out_row = forms ? g.first + row * g.stride : nullptr;
        const RowSlice slice = slice_of<S>(row_logits, p.vocab, cluster);
        if (target < 0) {
            if (is_first_of(cluster)) write_loss(o, row, 0, Lse<T>{0, 0});
            if (out_row) zero_slice(slice, p.vocab, out_row);
            continue;
        }
        for (int group = 0; group < kCopyGroups && !copying; ++group)
            copy_group(group, group_vectors, slice, row_logits, held);
        const auto lse = finish(merge(read_slice(p, row_logits, slice, group_vectors, held)));
        const bool is_own = is_own_of_slice<S>(slice, target);
        const T z = is_own ? p.to_score(own_logit(slice, held, row_logits, target)) : T(0);
        const int64_t own = is_own ? target : -1;
        const auto f = gradient_factors(p, row, true, own, lse, z, {upstream, 0, 0, 0});
        copying = targets.of_next_row() >= 0;
        const S* const next = copying ? logits_row(p, row + step) : row_logits;
        const RowSlice next_slice = copying ? slice_of<S>(next, p.vocab, cluster) : RowSlice{};
#pragma unroll 1
        for (int group = 0; group < kCopyGroups; ++group) {
            if (out_row)
                write_group_gradient(group, group_vectors, p, row, slice, held, lse, f, out_row);
            copy_group(group, group_vectors, next_slice, next, held);
        }
        if (out_row) {
            write_edge_gradient(p, row, slice, lse, f, out_row);
            write_target_gradient(f, out_row);
        }
        if (is_own) write_loss(o, row, row_loss(p, row, lse, z), lse);
    }
    cluster_sync();  // nobody sends to a block that has ended
}

// Multiplies rows by their factors, in place. Rows whose factor is 1, as the upstream gradient
// mostly is, are not read.
template <class S>
__global__ void __launch_bounds__(kRowThreads, kMinBlocks<S>)
    scale_rows(Problem<S, Scoring::unchanged> p, PerRow<compute_t<S>> factor, S* x) {
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const compute_t<S> row_factor = factor[row];
        if (row_factor == 1) continue;
        S* const to = x + row * p.logits_stride;
        const S* const from = to;
        const auto scale = [&]<int n>(int64_t column, const Elements<S, n>& v) {
            compute_t<S> scaled[n];
#pragma unroll
            for (int i = 0; i < n; ++i) scaled[i] = widen(v.value[i]) * row_factor;
            store(to + column, narrowed<S>(scaled), true);
        };
        for_each_in_row<kLoadsInFlight<S>>(from, p.vocab, scale);
    }
}

// Sums over rows or classes, by kernels of one block, or of one cluster

// Numbers that a thread loads before it uses the first.
constexpr int kNumbersInFlight = 8;

// Calls use(read(i)) for each i below `count`, a row or a class, shared out over the cluster.
template <class Read, class Use>
__device__ void for_each_number(const Cluster& cluster, int64_t count, Read read, Use use) {
    const int64_t threads = int64_t(cluster.blocks) * blockDim.x;
    const int64_t start = int64_t(cluster.rank) * blockDim.x + threadIdx.x;
    for (int64_t first = start; first < count; first += kNumbersInFlight * threads) {
        decltype(read(first)) found[kNumbersInFlight];
#pragma unroll
        for (int u = 0; u < kNumbersInFlight; ++u)
            if (first + u * threads < count) found[u] = read(first + u * threads);
#pragma unroll
        for (int u = 0; u < kNumbersInFlight; ++u)
            if (first + u * threads < count) use(found[u]);
    }
}

// Of the rows, or with class weights of the classes.
struct Sums {
    double weights, losses;
};

// The sums over the cluster, in the first thread of its first block; elsewhere nothing to use.
__device__ inline Sums sums_of_cluster(const Cluster& cluster, const Sums& of_thread) {
    NEGLOG_DYNAMIC_SHARED(shared);
    __shared__ Mailbox mailbox;
    Sums* const of_blocks = reinterpret_cast<Sums*>(shared);
    const Sums own = {block_sum(of_thread.weights), block_sum(of_thread.losses)};
    if (cluster.blocks == 1) return own;
    open_mailboxes(&mailbox, 1);
    cluster_sync();  // nobody may send to a block that has not begun
    expect_bytes(&mailbox, cluster.rank == 0 ? cluster.blocks * unsigned(sizeof(Sums)) : 0);
    if (threadIdx.x == 0) send(own, of_blocks + cluster.rank, &mailbox, 0);
    wait_for_mail(&mailbox, 0);
    Sums all = {0, 0};
    for (unsigned rank = 0; cluster.rank == 0 && rank < cluster.blocks; ++rank) {
        all.weights += of_blocks[rank].weights;
        all.losses += of_blocks[rank].losses;
    }
    return all;
}

// Runs before rows whose gradients need the sum: with class weights and label smoothing. A block
// for each row would read as many weights as logits again.
template <class S, Scoring scoring>
__global__ void __launch_bounds__(kMaxThreads, 1)
    sum_class_weights(Problem<S, scoring> p, double* weight_sum) {
    const Cluster cluster = this_cluster();
    Sums sums = {0, 0};
    for_each_number(
        cluster, p.vocab, [&](int64_t c) { return p.weight[c]; },
        [&](compute_t<S> one) { sums.weights += one; });
    sums = sums_of_cluster(cluster, sums);
    if (is_first_of(cluster)) *weight_sum = sums.weights;
}

// This thread's part of what a mean is over; checks its targets.
template <class S, Scoring scoring>
__device__ double weights_of_thread(const Problem<S, scoring>& p, const Cluster& cluster) {
    if (!p.target && (p.vocab == 0 || !p.token_weight)) {
        const double all = p.vocab == 0 ? double(NAN) : double(p.rows);
        return is_first_of(cluster) ? all : 0;
    }
    double sum = 0;
    for_each_number(
        cluster, p.rows, [&](int64_t row) { return label_of(p, row); },
        [&](const RowLabel<compute_t<S>>& label) {
            if (is_ignored(p, label)) return;
            assert(!p.target || (label.target >= 0 && label.target < p.vocab));
            const double w = p.target && p.weight ? p.weight[label.target] : 1;
            sum += rounded_product(double(label.token_weight), w);
        });
    return sum;
}

// Runs before the rows where their gradients need the divisor. Writes the upstream expected, 1 where
// `remembered` is null, to `formed_for` unless that is null: a backward on another stream may
// change what is remembered before the rows are done, and all of them need one number. Where
// num_items is given the sum is still formed, for its check of targets.
template <class S, Scoring scoring>
__global__ void __launch_bounds__(kMaxThreads, 1)
    sum_weights(Problem<S, scoring> p, const compute_t<S>* num_items, compute_t<S>* total_weight,
                const Remembered<compute_t<S>>* remembered, compute_t<S>* formed_for) {
    const Cluster cluster = this_cluster();
    const Sums sums = sums_of_cluster(cluster, {weights_of_thread(p, cluster), 0});
    if (!is_first_of(cluster)) return;
    *total_weight = num_items ? *num_items : compute_t<S>(sums.weights);
    if (formed_for) *formed_for = remembered ? expected_upstream(*remembered) : 1;
}

// Runs after the rows. Writes the loss unless its pointer is null, and total_weight unless
// sum_weights has done it.
template <class S, Scoring scoring>
__global__ void __launch_bounds__(kMaxThreads, 1)
    sum_losses(Problem<S, scoring> p, const compute_t<S>* row_loss, const compute_t<S>* num_items,
               bool divisor_known, bool mean, compute_t<S>* total_weight, compute_t<S>* loss) {
    using T = compute_t<S>;
    const Cluster cluster = this_cluster();
    Sums sums = {divisor_known ? 0 : weights_of_thread(p, cluster), 0};
    for_each_number(
        cluster, loss ? p.rows : 0, [&](int64_t row) { return row_loss[row]; },
        [&](T one) { sums.losses += one; });
    sums = sums_of_cluster(cluster, sums);
    if (!is_first_of(cluster)) return;
    const T divisor = divisor_known ? *total_weight : num_items ? *num_items : T(sums.weights);
    if (!divisor_known) *total_weight = divisor;
    if (loss) *loss = T(mean ? sums.losses / double(divisor) : sums.losses);
}

}  // namespace
}  // namespace neglog
