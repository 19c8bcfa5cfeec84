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
__global__ void __launch_bounds__(kRowThreads, kMinBlocks<S>)
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
        const bool unused = u.grad_lse == 0 && u.grad_entropy == 0;
        if (is_ignored(p, row) && (unused || !isfinite(kept.lse[row]))) {
            zero_row(out_row, p.vocab);
            continue;
        }
        const Lse<compute_t<S>> lse = {kept.lse[row], kept.lse_low[row]};
        const auto z = target_score_or_0(p, row);
        const auto f = gradient_factors(p, row, lse, z, u);
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
        const auto f = gradient_factors(p, row, lse, z, {upstream, 0, 0, 0});
        __syncthreads();  // all threads have read row and target, which may now be overwritten
        S* const out_row = g.first + row * g.stride;
        if (is_ignored(p, row)) zero_row(out_row, p.vocab);
        else row_gradient<kLoadsInFlightSecondPass>(p, row, lse, f, out_row);
    }
}

// The same with the row in shared memory, one cluster to a row: for class targets, without label
// smoothing and without statistics.
template <class S, Scoring scoring>
__global__ void __launch_bounds__(kRowThreads, kMinBlocksForwardBackward)
    forward_backward_rows_in_shared(Problem<S, scoring> p, Output<compute_t<S>> o, Gradient<S> g) {
    using T = compute_t<S>;
    NEGLOG_DYNAMIC_SHARED(shared);
    const auto states = reinterpret_cast<SoftmaxState<T>*>(shared);
    uint4* const held = shared + kStateVectors;
    const bool forms = is_formed(g);
    const double upstream = row_upstream(g);
    const int64_t blocks_per_row = cluster_size(), step = gridDim.x / blocks_per_row;
    const int group_vectors = vectors_of_group<S>(p.vocab);
    int slot = 0;
    bool copying = false;  // this row; the one before it has begun
    for (int64_t row = blockIdx.x / blocks_per_row; row < p.rows; row += step) {
        const S* const row_logits = logits_row(p, row);
        S* const out_row = forms ? g.first + row * g.stride : nullptr;
        const RowSlice slice = slice_of<S>(row_logits, p.vocab);
        Lse<T> lse = {0, 0};
        double loss = 0;
        if (!is_ignored(p, row)) {
            for (int group = 0; group < kCopyGroups && !copying; ++group)
                copy_group(group, group_vectors, slice, row_logits, held);
            const T z = target_score(p, row);  // before the barriers: after them it is overwritten
            const auto state =
                block_reduce(read_slice(p, row_logits, slice, group_vectors, held), MergeStates{});
            lse = finish(cluster_reduce(state, states + slot));
            slot = 1 - slot;
            loss = row_loss(p, row, lse, z);
            const auto f = gradient_factors(p, row, lse, z, {upstream, 0, 0, 0});
            copying = row + step < p.rows && !is_ignored(p, row + step);
            const S* const next = copying ? logits_row(p, row + step) : row_logits;
            const RowSlice next_slice = copying ? slice_of<S>(next, p.vocab) : RowSlice{};
#pragma unroll 1
            for (int group = 0; group < kCopyGroups; ++group) {
                if (out_row)
                    write_group_gradient(group, group_vectors, p, row, slice, held, lse, f,
                                         out_row);
                copy_group(group, group_vectors, next_slice, next, held);
            }
            if (out_row) write_edge_gradient(p, row, slice, lse, f, out_row);
        } else if (out_row) {
            zero_slice(slice, p.vocab, out_row);
        }
        if (threadIdx.x == 0 && cluster_rank() == 0) {
            o.loss[row] = T(loss);
            o.lse[row] = lse.high;
            o.lse_low[row] = lse.low;
        }
    }
    cluster_sync();  // the shared memory of a block that ends is gone, and others may still read it
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

// Sums over rows or classes, by kernels of one block

// Numbers that a thread loads before it uses the first. One load after the other would take an
// estimated 20 us of latency for 32768 rows.
constexpr int kNumbersInFlight = 8;

// Calls use(read(i)) for each i below `count`, a row or a class, in a block-stride loop.
template <class Read, class Use>
__device__ void for_each_number(int64_t count, Read read, Use use) {
    for (int64_t first = threadIdx.x; first < count; first += kNumbersInFlight * blockDim.x) {
        decltype(read(first)) found[kNumbersInFlight];
#pragma unroll
        for (int u = 0; u < kNumbersInFlight; ++u)
            if (first + u * blockDim.x < count) found[u] = read(first + u * blockDim.x);
#pragma unroll
        for (int u = 0; u < kNumbersInFlight; ++u)
            if (first + u * blockDim.x < count) use(found[u]);
    }
}

// Runs before rows whose gradients need the sum: with class weights and label smoothing. A block
// for each row would read as many weights as logits again.
template <class S, Scoring scoring>
__global__ void __launch_bounds__(kMaxThreads, 1)
    sum_class_weights(Problem<S, scoring> p, double* weight_sum) {
    double sum = 0;
    for_each_number(
        p.vocab, [&](int64_t c) { return p.weight[c]; }, [&](compute_t<S> one) { sum += one; });
    const double total = block_sum(sum);
    if (threadIdx.x == 0) *weight_sum = total;
}

template <class S, Scoring scoring>
__device__ double total_weight_of(const Problem<S, scoring>& p) {
    if (!p.target && p.vocab == 0) return double(NAN);
    if (!p.target && !p.token_weight) return double(p.rows);
    double sum = 0;
    for_each_number(
        p.rows, [&](int64_t row) { return label_of(p, row); },
        [&](const RowLabel<compute_t<S>>& label) {
            if (is_ignored(p, label)) return;
            assert(!p.target || (label.target >= 0 && label.target < p.vocab));
            const double w = p.target && p.weight ? p.weight[label.target] : 1;
            sum += rounded_product(double(label.token_weight), w);
        });
    return block_sum(sum);
}

// The divisor of the mean. Where num_items is given the sum is still formed, for its check of
// targets.
template <class S, Scoring scoring>
__device__ compute_t<S> divisor_of(const Problem<S, scoring>& p, const compute_t<S>* num_items) {
    const double total = total_weight_of(p);
    return num_items ? *num_items : compute_t<S>(total);
}

// Runs before the rows where their gradients need the divisor. Writes the upstream expected, 1 where
// `remembered` is null, to `formed_for` unless that is null: a backward on another stream may
// change what is remembered before the rows are done, and all of them need one number.
template <class S, Scoring scoring>
__global__ void __launch_bounds__(kMaxThreads, 1)
    sum_weights(Problem<S, scoring> p, const compute_t<S>* num_items, compute_t<S>* total_weight,
                const Remembered<compute_t<S>>* remembered, compute_t<S>* formed_for) {
    const compute_t<S> divisor = divisor_of(p, num_items);
    if (threadIdx.x != 0) return;
    *total_weight = divisor;
    if (formed_for) *formed_for = remembered ? expected_upstream(*remembered) : 1;
}

// Runs after the rows. Writes the loss unless its pointer is null, and total_weight unless
// sum_weights has done it.
template <class S, Scoring scoring>
__global__ void __launch_bounds__(kMaxThreads, 1)
    sum_losses(Problem<S, scoring> p, const compute_t<S>* row_loss, const compute_t<S>* num_items,
               bool divisor_known, bool mean, compute_t<S>* total_weight, compute_t<S>* loss) {
    using T = compute_t<S>;
    const T divisor = divisor_known ? *total_weight : divisor_of(p, num_items);
    double sum = 0;
    for_each_number(
        loss ? p.rows : 0, [&](int64_t row) { return row_loss[row]; }, [&](T one) { sum += one; });
    const double total = block_sum(sum);
    if (threadIdx.x != 0) return;
    if (!divisor_known) *total_weight = divisor;
    if (loss) *loss = T(mean ? total / double(divisor) : total);
}

}  // namespace
}  // namespace neglog
