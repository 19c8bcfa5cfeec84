// nll on CUDA: neglog::nll, neglog::nll_backward and neglog::nll_, all options, and the product with
// the upstream for what nll_ wrote.
//
// Compiled for sm_80, sm_90a and sm_100, run on the CPU by emulated.hpp, not yet on a GPU; no speed
// is claimed. The formulas and the edge cases are those of kernels/nll.pyx.
//
// (a) One block walks one row, then the row a grid further. Each thread keeps an online (maximum,
//     sum) over 16-byte vectors, several of them in flight; the block merges the states by shuffles
//     and shared memory. One read of memory gives the row's log-sum-exp.
// (b) What needs the finished lse (label smoothing, probability targets, statistics) walks the row
//     again, from L2 while the rows at work fit there: accumulated online it would cancel at large
//     logits. The second walk is skipped where no option asks for it.
// (c) The target's own gradient is formed by expm1 of its log-probability: p - 1 would lose every
//     digit as p nears 1.
// (d) No atomics: a row's bits depend on the vocabulary, the dtype and its alignment alone, and the
//     sums over rows are made by one block in double, in one order. That is a small kernel before
//     (the mean's divisor) and one after (the loss).
// (e) The host never waits: divisors stay on the device, so a call can be captured in a CUDA graph.
//     A target out of range therefore fails a device-side assertion, as torch's does.
// (f) In place, a thread writes only vectors that it has just read itself, after a barrier that ends
//     all other reading of the row.
// (g) In place, a row of 32 KB and more that needs no second walk stays in shared memory, of one block
//     or shared out over a cluster's (sm_90 and later): read once, written once. Shorter rows find
//     themselves in the caches, longer ones would not fit.

#include "tensors.cuh"

#undef NDEBUG  // Python's own compiler flags set it, and without the assertion (e) reads anywhere
#include <cassert>

namespace neglog {
namespace {

// What a second walk asks for ahead: it finds the row in L2, and more than one of them shares a
// kernel's registers, of which doubles want two each.
template <class S>
constexpr int kAgain = sizeof(S) == 8 ? 1 : 2;

template <class S>
struct Problem {
    int64_t rows, vocab;
    const S* logits;
    int64_t logits_stride;
    const int64_t* target;  // (rows), or null for probabilities
    int64_t target_stride;
    const S* probs;  // (rows, vocab), or null for indices
    int64_t probs_stride;
    const real_of<S>* weight;  // (vocab), or null for ones
    int64_t ignore_index;
    double label_smoothing, share;  // share: label_smoothing / vocab
    Cap<real_of<S>> cap;
    double z_loss;
};

template <class T>
struct Output {
    T *loss, *lse, *lse_low;
    bool* correct;  // both null without statistics
    T* entropy;
};

// A number for each row; stride 0 for the same one.
template <class T>
struct Strided {
    const T* first;
    int64_t stride;
    __device__ T operator[](int64_t row) const { return first[row * stride]; }
};

template <class T>
struct Upstream {
    Strided<T> loss, lse;  // lse.first null for none
    const T* divisor;      // null for 1
};

// The row's gradient by the scores is soft * p, and hard * (p - 1) more at the target, less spread
// times the mass at each class.
template <class T>
struct Factors {
    int64_t target;  // -1 for none
    T at_target;     // before the spread
    T elsewhere;     // hard + soft: of p
    T spread;
};

// Reading

template <class S>
__device__ bool ignored(const Problem<S>& p, int64_t row) {
    return p.target && p.target[row * p.target_stride] == p.ignore_index;
}

template <class S>
__device__ int64_t class_of(const Problem<S>& p, int64_t row) {
    const int64_t target = p.target[row * p.target_stride];
    assert(target >= 0 && target < p.vocab);
    return target;
}

template <class S>
__device__ const S* logits_of(const Problem<S>& p, int64_t row) {
    return p.logits + row * p.logits_stride;
}

template <class S>
__device__ real_of<S> target_score(const Problem<S>& p, int64_t row) {
    return p.cap.score(widen(logits_of(p, row)[class_of(p, row)]));
}

// 0 where the row has no class: it is ignored, or its target is a distribution.
template <class S>
__device__ real_of<S> target_score_or_0(const Problem<S>& p, int64_t row) {
    return p.target && !ignored(p, row) ? target_score(p, row) : real_of<S>(0);
}

// What multiplies each log-probability besides the target's own: w_c, or w_c q'_c.
template <class S, int n>
__device__ void mass(const Problem<S>& p, int64_t row, int64_t column, real_of<S> (&a)[n]) {
    using T = real_of<S>;
#pragma unroll
    for (int i = 0; i < n; ++i) a[i] = 1;
    if (p.probs) {
        const S* from = p.probs + row * p.probs_stride;
        const bool aligned = same_phase(from, logits_of(p, row));
        const Lanes<S, n> q = load<S, n>(from + column, aligned);
#pragma unroll
        for (int i = 0; i < n; ++i)
            a[i] = widen(q.at[i]) * T(1 - p.label_smoothing) + T(p.share);
    }
    if (p.weight) {
#pragma unroll
        for (int i = 0; i < n; ++i) a[i] *= p.weight[column + i];
    }
}

// Forward of one row, by the whole block

template <class S>
__device__ LogSumExp<real_of<S>> row_state(const Problem<S>& p, int64_t row) {
    auto state = empty_log_sum_exp<real_of<S>>();
    walk<kInFlight>(logits_of(p, row), p.vocab, [&]<int n>(int64_t, const Lanes<S, n>& x) {
        real_of<S> z[n];
        scores(p.cap, x, z);
        absorb(state, z);
    });
    return block_reduce(state, MergeStates{});
}

// sum of mass * log p over the vocabulary
template <class S>
__device__ double row_cross_entropy(const Problem<S>& p, int64_t row, Lse<real_of<S>> lse) {
    real_of<S> sum = 0;
    walk<kAgain<S>>(logits_of(p, row), p.vocab, [&]<int n>(int64_t column, const Lanes<S, n>& x) {
        real_of<S> z[n], a[n];
        scores(p.cap, x, z);
        mass(p, row, column, a);
#pragma unroll
        for (int i = 0; i < n; ++i) sum += a[i] * log_probability(z[i], lse);
    });
    return block_sum(sum);
}

// Whether the target is where argmax would look, the first of the maxima, but for columns before it.
template <class S>
__device__ bool at_maximum(const Problem<S>& p, int64_t row, real_of<S> maximum, Lse<real_of<S>> lse) {
    const bool nan_among_finite = isnan(lse.high) && maximum < INFINITY;
    if (!p.target || ignored(p, row) || nan_among_finite) return false;
    return target_score(p, row) == maximum;
}

template <class S>
__device__ void row_statistics(const Problem<S>& p, const Output<real_of<S>>& o, int64_t row,
                               real_of<S> maximum, Lse<real_of<S>> lse) {
    using T = real_of<S>;
    const bool candidate = at_maximum(p, row, maximum, lse);
    const int64_t target = candidate ? class_of(p, row) : 0;
    bool earlier = false;
    T sum = 0;
    walk<kAgain<S>>(logits_of(p, row), p.vocab, [&]<int n>(int64_t column, const Lanes<S, n>& x) {
        T z[n];
        scores(p.cap, x, z);
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const T log_p = log_probability(z[i], lse);
            const T probability = exp(log_p);
            sum += probability == 0 ? 0 : probability * log_p;  // not 0 * -inf
            earlier |= column + i < target && z[i] == maximum;
        }
    });
    const double entropy = -block_sum(sum);
    earlier = __syncthreads_or(earlier);
    if (threadIdx.x == 0) {
        o.correct[row] = candidate && !earlier;
        o.entropy[row] = T(entropy);
    }
}

template <class S>
__device__ double target_weight(const Problem<S>& p, int64_t row) {
    return p.target && p.weight ? p.weight[class_of(p, row)] : 1;
}

// `target_z` is the target's score; of no account with probabilities.
template <class S>
__device__ double row_loss(const Problem<S>& p, int64_t row, Lse<real_of<S>> lse,
                           real_of<S> target_z) {
    const double w = target_weight(p, row);
    double loss = 0;
    if (p.target) loss = -(1 - p.label_smoothing) * w * log_probability(target_z, lse);
    if (p.probs)
        loss = -row_cross_entropy(p, row, lse);
    else if (p.label_smoothing != 0)
        loss -= p.share * row_cross_entropy(p, row, lse);
    if (p.z_loss != 0) loss += p.z_loss * w * (double(lse.high) * lse.high);
    return loss;
}

template <class S>
__device__ Lse<real_of<S>> row_forward(const Problem<S>& p, const Output<real_of<S>>& o,
                                       int64_t row) {
    const bool counted = !ignored(p, row);
    Lse<real_of<S>> lse = {0, 0};
    double loss = 0;
    if (counted || o.correct) {
        const auto state = row_state(p, row);
        lse = finish(state);
        if (counted) loss = row_loss(p, row, lse, target_score_or_0(p, row));
        if (o.correct) row_statistics(p, o, row, state.maximum, lse);
    }
    if (threadIdx.x == 0) {
        o.loss[row] = real_of<S>(loss);
        o.lse[row] = lse.high;
        o.lse_low[row] = lse.low;
    }
    return lse;
}

// Gradient of one row, by the whole block

// sum of w_c over the vocabulary, where label smoothing needs it
template <class S>
__device__ double weight_sum(const Problem<S>& p) {
    if (!p.weight || p.label_smoothing == 0 || p.probs) return double(p.vocab);
    real_of<S> sum = 0;
    for (int64_t c = threadIdx.x; c < p.vocab; c += blockDim.x) sum += p.weight[c];
    return block_sum(sum);
}

template <class S>
__device__ double row_mass(const Problem<S>& p, int64_t row) {
    real_of<S> sum = 0;
    walk<kAgain<S>>(logits_of(p, row), p.vocab, [&]<int n>(int64_t column, const Lanes<S, n>&) {
        real_of<S> a[n];
        mass(p, row, column, a);
#pragma unroll
        for (int i = 0; i < n; ++i) sum += a[i];
    });
    return block_sum(sum);
}

template <class S>
__device__ Factors<real_of<S>> row_factors(const Problem<S>& p, int64_t row, Lse<real_of<S>> lse,
                                           real_of<S> target_z, double grad, double grad_lse,
                                           double weights) {
    using T = real_of<S>;
    if (ignored(p, row)) return {-1, T(0), T(grad_lse), T(0)};
    const double w = target_weight(p, row);
    const double spread = p.probs ? grad : p.label_smoothing != 0 ? grad * p.share : 0;
    double soft = grad_lse + spread * (p.probs ? row_mass(p, row) : weights);
    if (p.z_loss != 0) soft += grad * 2 * p.z_loss * w * lse.high;
    if (p.probs) return {-1, T(0), T(soft), T(spread)};
    const double hard = grad * (1 - p.label_smoothing) * w;
    const T log_p = log_probability(target_z, lse);
    const double at_target = soft * exp(log_p) + hard * expm1(log_p);
    return {class_of(p, row), T(at_target), T(hard + soft), T(spread)};
}

template <class S, int n>
__device__ Lanes<S, n> gradient_at(const Problem<S>& p, int64_t row, int64_t column,
                                   const Lanes<S, n>& x, Lse<real_of<S>> lse,
                                   const Factors<real_of<S>>& f) {
    using T = real_of<S>;
    T z[n], grad[n];
    scores(p.cap, x, z);
#pragma unroll
    for (int i = 0; i < n; ++i) {
        const T p_dz = f.elsewhere * exp(log_probability(z[i], lse));
        grad[i] = column + i == f.target ? f.at_target : p_dz;
    }
    if (f.spread != 0) {
        T a[n];
        mass(p, row, column, a);
#pragma unroll
        for (int i = 0; i < n; ++i) grad[i] -= f.spread * a[i];
    }
    apply_slope(p.cap, z, grad);
    return narrowed<S>(grad);
}

template <int in_flight, class S>
__device__ void row_gradient(const Problem<S>& p, int64_t row, Lse<real_of<S>> lse,
                             const Factors<real_of<S>>& f, S* out) {
    const bool aligned = same_phase<S>(out, logits_of(p, row));
    walk<in_flight>(logits_of(p, row), p.vocab, [&]<int n>(int64_t column, const Lanes<S, n>& x) {
        store(out + column, gradient_at(p, row, column, x, lse, f), aligned);
    });
}

// A row on chip, in the shared memory of a cluster's blocks

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
template <class S>
__device__ LogSumExp<real_of<S>> take(const Problem<S>& p, const S* row, const Slice& own,
                                      uint4* held) {
    using T = real_of<S>;
    auto state = empty_log_sum_exp<T>();
    const auto vectors = reinterpret_cast<const uint4*>(row + own.first_column);
    for (int64_t first = threadIdx.x; first < own.vectors; first += kInFlight * blockDim.x) {
        uint4 bits[kInFlight];
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
            const int64_t v = first + u * blockDim.x;
            if (v < own.vectors) bits[u] = vectors[v];
        }
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
            const int64_t v = first + u * blockDim.x;
            if (v >= own.vectors) continue;
            held[v] = bits[u];
            T z[kLanes<S>];
            scores(p.cap, unpacked<S>(bits[u]), z);
            absorb(state, z);
        }
    }
    if (own.edge < p.vocab) {
        T z[1];
        scores(p.cap, load<S, 1>(row + own.edge, true), z);
        absorb(state, z);
    }
    return state;
}

// Writes the gradient over the slice.
template <class S>
__device__ void give(const Problem<S>& p, int64_t row, const Slice& own, const uint4* held,
                     Lse<real_of<S>> lse, const Factors<real_of<S>>& f, S* out) {
    constexpr int n = kLanes<S>;
    for (int64_t v = threadIdx.x; v < own.vectors; v += blockDim.x) {
        const int64_t column = own.first_column + v * n;
        store(out + column, gradient_at(p, row, column, unpacked<S>(held[v]), lse, f), true);
    }
    if (own.edge < p.vocab) {
        const auto x = load<S, 1>(out + own.edge, true);
        store(out + own.edge, gradient_at(p, row, own.edge, x, lse, f), true);
    }
}

template <class S>
__device__ void zero(const Slice& own, int64_t vocab, S* out) {
    auto vectors = reinterpret_cast<uint4*>(out + own.first_column);
    for (int64_t v = threadIdx.x; v < own.vectors; v += blockDim.x) vectors[v] = uint4{};
    if (own.edge < vocab) out[own.edge] = S(0);
}

// Kernels over rows

template <class S>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    forward_rows(Problem<S> p, Output<real_of<S>> o) {
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) row_forward(p, o, row);
}

template <class S>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    backward_rows(Problem<S> p, Upstream<real_of<S>> up, Strided<real_of<S>> lse,
                  Strided<real_of<S>> lse_low, S* out) {
    const double scale = up.divisor ? 1 / double(*up.divisor) : 1;
    const double weights = weight_sum(p);
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const double grad_lse = up.lse.first ? up.lse[row] : 0;
        S* const out_row = out + row * p.vocab;
        if (ignored(p, row) && grad_lse == 0) {  // exactly zero, even where the logits are NaN
            zero_row(out_row, p.vocab);
            continue;
        }
        const Lse<real_of<S>> saved = {lse[row], lse_low[row]};
        const auto z = target_score_or_0(p, row);
        const auto f = row_factors(p, row, saved, z, up.loss[row] * scale, grad_lse, weights);
        row_gradient<kInFlight>(p, row, saved, f, out_row);
    }
}

template <class T>
__device__ double fused_scale(const T* divisor, bool late) {
    return divisor && !(late && *divisor != 0) ? 1 / double(*divisor) : 1;
}

template <class S>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    fused_rows(Problem<S> p, Output<real_of<S>> o, const real_of<S>* divisor, bool late, S* logits) {
    const double scale = fused_scale(divisor, late);
    const double weights = weight_sum(p);
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const auto lse = row_forward(p, o, row);
        const auto z = target_score_or_0(p, row);
        const auto f = row_factors(p, row, lse, z, scale, 0, weights);
        __syncthreads();  // no thread still reads another's part of the row, the target's logit say
        S* const out_row = logits + row * p.logits_stride;
        if (ignored(p, row))
            zero_row(out_row, p.vocab);
        else
            row_gradient<kAgain<S>>(p, row, lse, f, out_row);
    }
}

// fused_rows of class targets without label smoothing and statistics, a cluster to a row.
template <class S>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    fused_rows_on_chip(Problem<S> p, Output<real_of<S>> o, const real_of<S>* divisor, bool late,
                       S* logits) {
    using T = real_of<S>;
    NEGLOG_DYNAMIC_SHARED(chip);
    const auto slots = reinterpret_cast<LogSumExp<T>*>(chip);
    uint4* const held = chip + kSlotVectors;
    const double scale = fused_scale(divisor, late);
    const int64_t parts = cluster_size();
    int turn = 0;
    for (int64_t row = blockIdx.x / parts; row < p.rows; row += gridDim.x / parts) {
        S* const at = logits + row * p.logits_stride;
        const Slice own = slice_of<S>(at, p.vocab);
        const bool counted = !ignored(p, row);
        Lse<T> lse = {0, 0};
        double loss = 0;
        if (counted) {
            const T z = target_score(p, row);  // before the barriers, after which it is overwritten
            const auto of_slice = block_reduce(take<S>(p, at, own, held), MergeStates{});
            lse = finish(cluster_reduce(of_slice, slots + turn));
            turn = 1 - turn;
            loss = row_loss(p, row, lse, z);
            give(p, row, own, held, lse, row_factors(p, row, lse, z, scale, 0, 0), at);
        } else {
            zero(own, p.vocab, at);
        }
        if (threadIdx.x == 0 && cluster_rank() == 0) {
            o.loss[row] = T(loss);
            o.lse[row] = lse.high;
            o.lse_low[row] = lse.low;
        }
    }
    cluster_sync();  // a block that ends takes along what the others may still read
}

// Rows times their factors; nothing is read of those whose factor is 1, as an upstream mostly is.
template <class S>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    scale_rows(Problem<S> p, Strided<real_of<S>> factor, S* x) {
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const real_of<S> own = factor[row];
        if (own == 1) continue;
        S* const at = x + row * p.logits_stride;
        walk<kInFlight>(logits_of(p, row), p.vocab, [&]<int n>(int64_t column, const Lanes<S, n>& v) {
            real_of<S> scaled[n];
#pragma unroll
            for (int i = 0; i < n; ++i) scaled[i] = widen(v.at[i]) * own;
            store(at + column, narrowed<S>(scaled), true);
        });
    }
}

// The kernel of one block before them

// The mean's divisor. Targets are checked here even where num_items is the divisor.
template <class S>
__global__ void __launch_bounds__(kMaxThreads, 1)
    sum_weights(Problem<S> p, const real_of<S>* num_items, real_of<S>* total_weight) {
    double sum = 0;
    for (int64_t row = threadIdx.x; p.target && row < p.rows; row += blockDim.x)
        if (!ignored(p, row)) {
            const int64_t target = class_of(p, row);
            sum += p.weight ? p.weight[target] : 1;
        }
    const double total = p.target ? block_sum(sum) : p.vocab ? double(p.rows) : double(NAN);
    if (threadIdx.x == 0) *total_weight = num_items ? *num_items : real_of<S>(total);
}

// Launching

constexpr int64_t kNone = 0, kMean = 1;
// Beyond this a block takes several rows; enough to fill any GPU many times over.
constexpr int64_t kMaxBlocks = 65536;

template <class S, class... Parameters, class... Arguments>
void launch_rows(void (*kernel)(Problem<S>, Parameters...), const Call& call, const Problem<S>& p,
                 Arguments... arguments) {
    if (p.rows == 0) return;
    launch(kernel, call, std::min(p.rows, kMaxBlocks), threads_for<S>(p.vocab), p, arguments...);
}

constexpr int64_t kShortestOnChip = 32 << 10;
// Of a block, so that two of them share a multiprocessor's memory, and one loads while another stores;
// then of one that has it alone.
constexpr int64_t kSliceBytes = 72 << 10, kLargestSliceBytes = 200 << 10;
constexpr int kMostParts = 8;  // that every device with clusters takes

inline int64_t slice_bytes(int64_t row_bytes, int parts) {
    return (row_bytes / kVectorBytes / parts + 1 + kSlotVectors) * kVectorBytes;
}

// How many blocks hold a row on chip, or 0 where none do.
template <class S>
int parts_on_chip(const Problem<S>& p, const Output<real_of<S>>& o, const Call& call) {
    const int64_t bytes = p.vocab * int64_t(sizeof(S));
    if (!p.target || p.label_smoothing != 0 || o.correct || bytes < kShortestOnChip) return 0;
    const int64_t most = most_dynamic_shared(call), usual = std::min(kSliceBytes, most);
    const int most_parts = has_clusters(call) ? kMostParts : 1;
    for (int parts = 1; parts <= most_parts; parts *= 2)
        if (slice_bytes(bytes, parts) <= usual) return parts;
    const bool alone = slice_bytes(bytes, kMostParts) <= std::min(kLargestSliceBytes, most);
    return most_parts == kMostParts && alone ? kMostParts : 0;
}

template <class S>
void launch_fused(const Call& call, const Problem<S>& p, const Output<real_of<S>>& o,
                  const real_of<S>* divisor, bool late, S* logits) {
    const int parts = p.rows == 0 ? 0 : parts_on_chip(p, o, call);
    if (parts == 0) {
        launch_rows(fused_rows<S>, call, p, o, divisor, late, logits);
        return;
    }
    const int64_t clusters = std::min(p.rows, kMaxBlocks / parts);
    const int64_t shared_bytes = slice_bytes(p.vocab * int64_t(sizeof(S)), parts);
    launch_clusters(fused_rows_on_chip<S>, call, clusters * parts, kRowThreads, parts, shared_bytes,
                    p, o, divisor, late, logits);
}

template <class... Parameters, class... Arguments>
void launch_one_block(void (*kernel)(Parameters...), const Call& call, Arguments... arguments) {
    launch(kernel, call, 1, kMaxThreads, arguments...);
}

// Tensors

// What every op is given, with columns that are adjacent in memory.
struct Inputs {
    Tensor logits, target;
    MaybeTensor weight;
    int64_t reduction, ignore_index;
    double label_smoothing, logit_scale, softcap, z_loss;
};

struct Results {
    Tensor row_loss, lse, lse_low, total_weight, correct, entropy, loss;
};

template <class T>
Strided<T> strided(const Tensor& tensor) {
    return {pointer<const T>(tensor), tensor.dim() == 0 ? 0 : tensor.stride(0)};
}

bool columns_adjacent(const Tensor& rows) { return rows.stride(1) == 1 || rows.size(1) == 1; }

Tensor adjacent(const Tensor& rows) {
    return columns_adjacent(rows) ? rows : torch::stable::contiguous(rows);
}

// One number in all, or one for each of `size`, in the accumulation dtype.
void check_real(const char* name, const MaybeTensor& tensor, const Tensor& logits, int64_t size) {
    if (!tensor) return;
    check_device(name, *tensor, logits);
    STD_TORCH_CHECK(tensor->scalar_type() == real_dtype(logits), name,
                    ": expected float32, or float64 for float64 logits");
    const bool fits = tensor->dim() == 1 && tensor->size(0) == size;
    STD_TORCH_CHECK(fits || tensor->dim() == 0, name, ": expected ", size, " numbers");
}

// Only what would otherwise be read as something it is not; the public face words its own errors.
Inputs checked(const Inputs& in) {
    const Tensor &logits = in.logits, &target = in.target;
    STD_TORCH_CHECK(on_device(logits) && logits.dim() == 2, "logits: expected (N, V) on CUDA");
    check_device("target", target, logits);
    STD_TORCH_CHECK(target.dim() == 1 || target.dim() == 2, "target: expected (N,) or (N, V)");
    STD_TORCH_CHECK(target.size(0) == logits.size(0), "target: expected as many rows as logits");
    const bool index = target.dim() == 1;
    STD_TORCH_CHECK(index || target.size(1) == logits.size(1), "target: expected logits' shape");
    const auto expected = index ? ScalarType::Long : logits.scalar_type();
    STD_TORCH_CHECK(target.scalar_type() == expected, "target: expected int64, or logits' dtype");
    check_real("weight", in.weight, logits, logits.size(1));
    STD_TORCH_CHECK(!in.weight || in.weight->dim() == 1, "weight: expected (V,)");
    Inputs ready = in;
    ready.logits = adjacent(logits);
    if (!index) ready.target = adjacent(target);
    if (in.weight) ready.weight = torch::stable::contiguous(*in.weight);
    return ready;
}

template <class S>
Problem<S> problem(const Inputs& in) {
    const bool index = in.target.dim() == 1;
    const int64_t vocab = in.logits.size(1);
    return {
        .rows = in.logits.size(0),
        .vocab = vocab,
        .logits = pointer<const S>(in.logits),
        .logits_stride = in.logits.stride(0),
        .target = index ? pointer<const int64_t>(in.target) : nullptr,
        .target_stride = in.target.stride(0),
        .probs = index ? nullptr : pointer<const S>(in.target),
        .probs_stride = in.target.stride(0),
        .weight = pointer<const real_of<S>>(in.weight),
        .ignore_index = in.ignore_index,
        .label_smoothing = in.label_smoothing,
        .share = vocab == 0 ? 0 : in.label_smoothing / double(vocab),
        .cap = {real_of<S>(in.logit_scale), real_of<S>(in.softcap)},
        .z_loss = in.z_loss,
    };
}

Results new_results(const Tensor& logits, bool stats) {
    const std::vector<int64_t> rows{logits.size(0)}, counted{stats ? logits.size(0) : 0};
    return {new_real(logits, rows), new_real(logits, rows),
            new_real(logits, rows), new_real(logits, {}),
            torch::stable::new_empty(logits, counted, ScalarType::Bool),
            new_real(logits, counted), new_real(logits, {})};
}

template <class S>
Output<real_of<S>> output(const Results& r) {
    using T = real_of<S>;
    const bool stats = r.correct.numel() > 0;
    return {pointer<T>(r.row_loss), pointer<T>(r.lse), pointer<T>(r.lse_low),
            stats ? pointer<bool>(r.correct) : nullptr, stats ? pointer<T>(r.entropy) : nullptr};
}

// The ops

template <class S>
void run_forward(const Call& call, const Inputs& in, const MaybeTensor& num_items, bool in_place,
                 Results& r) {
    using T = real_of<S>;
    const auto p = problem<S>(in);
    T* const total_weight = pointer<T>(r.total_weight);
    const T* const divisor = in.reduction == kMean ? total_weight : nullptr;
    // In float16 a gradient divided by thousands of rows is below the smallest number, and a loss
    // scale that comes after cannot bring it back: there the autograd formula divides later, but by
    // 0 now, so that an ignored row's 0 does not become 0 / 0.
    const bool late = std::is_same_v<S, __half>;
    launch_one_block(sum_weights<S>, call, p, pointer<const T>(num_items), total_weight);
    if (in_place)
        launch_fused(call, p, output<S>(r), divisor, late, pointer<S>(in.logits));
    else
        launch_rows(forward_rows<S>, call, p, output<S>(r));
    if (in.reduction == kNone)
        r.loss = r.row_loss;
    else
        launch_one_block(sum_losses<T>, call, pointer<const T>(r.row_loss), p.rows, divisor,
                         pointer<T>(r.loss));
}

Results forward(const Inputs& in, const MaybeTensor& num_items, bool stats, bool in_place) {
    check_real("num_items", num_items, in.logits, 1);
    const Call call(in.logits);
    Results r = new_results(in.logits, stats);
    with_storage(in.logits, [&](auto storage) {
        run_forward<decltype(storage)>(call, in, num_items, in_place, r);
    });
    return r;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> nll(
    const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
    const MaybeTensor& num_items, int64_t reduction, int64_t ignore_index, double label_smoothing,
    double logit_scale, double softcap, double z_loss, bool stats, const std::string&) {
    const Inputs in = checked({logits, target, weight, reduction, ignore_index, label_smoothing,
                               logit_scale, softcap, z_loss});
    const Results r = forward(in, num_items, stats, false);
    return {r.loss, r.lse, r.lse_low, r.total_weight, r.correct, r.entropy};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> nll_(
    const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
    const MaybeTensor& num_items, int64_t reduction, int64_t ignore_index, double label_smoothing,
    double logit_scale, double softcap, double z_loss, bool stats, const std::string&) {
    const Inputs in = checked({logits, target, weight, reduction, ignore_index, label_smoothing,
                               logit_scale, softcap, z_loss});
    const Results r = forward(in, num_items, stats, true);
    Tensor written = logits;
    if (!columns_adjacent(logits)) torch::stable::copy_(written, in.logits);
    return {r.loss, r.lse, r.total_weight, r.correct, r.entropy};
}

Tensor nll_backward(const Tensor& grad_loss, const MaybeTensor& grad_lse, const Tensor& logits,
                    const Tensor& target, const MaybeTensor& weight, const Tensor& lse,
                    const Tensor& lse_low, const Tensor& total_weight, int64_t reduction,
                    int64_t ignore_index, double label_smoothing, double logit_scale,
                    double softcap, double z_loss, const std::string&) {
    const Inputs in = checked({logits, target, weight, reduction, ignore_index, label_smoothing,
                               logit_scale, softcap, z_loss});
    const int64_t rows = logits.size(0);
    check_real("grad_loss", grad_loss, logits, rows);
    check_real("grad_lse", grad_lse, logits, rows);
    check_real("lse", lse, logits, rows);
    check_real("lse_low", lse_low, logits, rows);
    check_real("total_weight", total_weight, logits, 1);
    const Call call(logits);
    const Tensor out = torch::stable::new_empty(logits, logits.sizes(), logits.scalar_type());
    with_storage(logits, [&](auto storage) {
        using S = decltype(storage);
        using T = real_of<S>;
        const Upstream<T> up = {
            strided<T>(grad_loss), grad_lse ? strided<T>(*grad_lse) : Strided<T>{nullptr, 0},
            reduction == kMean ? pointer<const T>(total_weight) : nullptr};
        launch_rows(backward_rows<S>, call, problem<S>(in), up, strided<T>(lse),
                    strided<T>(lse_low), pointer<S>(out));
    });
    return out;
}

void nll_scale_(const Tensor& grad, const Tensor& factor) {
    STD_TORCH_CHECK(on_device(grad) && grad.dim() == 2, "grad: expected (N, V) on CUDA");
    check_real("factor", factor, grad, grad.size(0));
    const Call call(grad);
    const Tensor rows = adjacent(grad);
    with_storage(rows, [&](auto storage) {
        using S = decltype(storage);
        Problem<S> p = {};
        p.rows = rows.size(0);
        p.vocab = rows.size(1);
        p.logits = pointer<const S>(rows);
        p.logits_stride = rows.stride(0);
        launch_rows(scale_rows<S>, call, p, strided<real_of<S>>(factor), pointer<S>(rows));
    });
    Tensor written = grad;
    if (!columns_adjacent(grad)) torch::stable::copy_(written, rows);
}

}  // namespace
}  // namespace neglog

NEGLOG_IMPL(m) {
    m.impl("nll", TORCH_BOX(&neglog::nll));
    m.impl("nll_backward", TORCH_BOX(&neglog::nll_backward));
    m.impl("nll_", TORCH_BOX(&neglog::nll_));
    m.impl("nll_scale_", TORCH_BOX(&neglog::nll_scale_));
}
