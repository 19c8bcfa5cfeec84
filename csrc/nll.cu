// nll on CUDA: neglog::nll, neglog::nll_backward and neglog::nll_, all options.
//
// Compiled for sm_80, sm_90a and sm_100, not yet run on a GPU; no speed is claimed. The formulas and
// the edge cases are those of kernels/nll.pyx, which is tested.
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

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cassert>
#include <optional>
#include <string>
#include <tuple>

#include "online_softmax.cuh"

namespace neglog {
namespace {

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
    real_of<S> logit_scale, softcap;
    double z_loss;
};

template <class T>
struct Output {
    T *loss, *lse, *lse_low;  // lse_low null where not wanted
    bool* correct;            // both null without statistics
    T* entropy;
};

template <class T>
struct Upstream {
    const T* loss;
    int64_t loss_stride;
    const T* lse;  // null for none
    int64_t lse_stride;
    const T* divisor;  // null for 1
};

// The row's gradient is plain * p at other classes, soft * p + hard * (p - 1) at the target, less
// spread times the mass at each class.
template <class T>
struct Factors {
    int64_t target;
    T plain, hard, soft, spread;
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

// A logit after scale and cap: the z of the formulas.
template <class S>
__device__ real_of<S> score(const Problem<S>& p, S x) {
    const real_of<S> z = rounded_product(widen(x), p.logit_scale);
    return p.softcap == 0 ? z : rounded_product(p.softcap, tanh(z / p.softcap));
}

template <class S, int n>
__device__ void scores(const Problem<S>& p, const Lanes<S, n>& x, real_of<S> (&z)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) z[i] = score(p, x.at[i]);
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
    walk(logits_of(p, row), p.vocab, [&]<int n>(int64_t, const Lanes<S, n>& x) {
        real_of<S> z[n];
        scores(p, x, z);
        absorb(state, z);
    });
    return block_reduce(state, MergeStates{});
}

// sum of mass * log p over the vocabulary
template <class S>
__device__ double row_cross_entropy(const Problem<S>& p, int64_t row, Lse<real_of<S>> lse) {
    real_of<S> sum = 0;
    walk(logits_of(p, row), p.vocab, [&]<int n>(int64_t column, const Lanes<S, n>& x) {
        real_of<S> z[n], a[n];
        scores(p, x, z);
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
    return score(p, logits_of(p, row)[class_of(p, row)]) == maximum;
}

template <class S>
__device__ void row_statistics(const Problem<S>& p, const Output<real_of<S>>& o, int64_t row,
                               real_of<S> maximum, Lse<real_of<S>> lse) {
    using T = real_of<S>;
    const bool candidate = at_maximum(p, row, maximum, lse);
    const int64_t target = candidate ? class_of(p, row) : 0;
    bool earlier = false;
    T sum = 0;
    walk(logits_of(p, row), p.vocab, [&]<int n>(int64_t column, const Lanes<S, n>& x) {
        T z[n];
        scores(p, x, z);
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

template <class S>
__device__ double row_loss(const Problem<S>& p, int64_t row, Lse<real_of<S>> lse) {
    const double w = target_weight(p, row);
    double loss = 0;
    if (p.target) {
        const auto z = score(p, logits_of(p, row)[class_of(p, row)]);
        loss = -(1 - p.label_smoothing) * w * log_probability(z, lse);
    }
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
        if (counted) loss = row_loss(p, row, lse);
        if (o.correct) row_statistics(p, o, row, state.maximum, lse);
    }
    if (threadIdx.x == 0) {
        o.loss[row] = real_of<S>(loss);
        o.lse[row] = lse.high;
        if (o.lse_low) o.lse_low[row] = lse.low;
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
    const S* probs = p.probs + row * p.probs_stride;
    real_of<S> sum = 0;
    walk(logits_of(p, row), p.vocab, [&]<int n>(int64_t column, const Lanes<S, n>&) {
        real_of<S> a[n];
        mass(p, row, column, a);
#pragma unroll
        for (int i = 0; i < n; ++i) sum += a[i];
    });
    return block_sum(sum);
}

template <class S>
__device__ Factors<real_of<S>> row_factors(const Problem<S>& p, int64_t row, Lse<real_of<S>> lse,
                                           double grad, double grad_lse, double weights) {
    using T = real_of<S>;
    if (ignored(p, row)) return {-1, T(grad_lse), T(0), T(grad_lse), T(0)};
    const double w = target_weight(p, row);
    const double hard = p.target ? grad * (1 - p.label_smoothing) * w : 0;
    const double spread = p.probs ? grad : p.label_smoothing != 0 ? grad * p.share : 0;
    double soft = grad_lse + spread * (p.probs ? row_mass(p, row) : weights);
    if (p.z_loss != 0) soft += grad * 2 * p.z_loss * w * lse.high;
    return {p.target ? class_of(p, row) : -1, T(hard + soft), T(hard), T(soft), T(spread)};
}

// The target's gradient, where the target is among these columns.
template <class T, int n>
__device__ void set_target(const Factors<T>& f, int64_t column, const T (&z)[n], Lse<T> lse,
                           T (&grad)[n]) {
    const int64_t here = f.target - column;
    if (here < 0 || here >= n) return;
    T z_target = z[0];  // chosen, not indexed: a runtime index would move z to local memory
#pragma unroll
    for (int i = 1; i < n; ++i) z_target = i == int(here) ? z[i] : z_target;
    const T log_p = log_probability(z_target, lse);
    const T value = f.soft * exp(log_p) + f.hard * expm1(log_p);
#pragma unroll
    for (int i = 0; i < n; ++i) grad[i] = i == int(here) ? value : grad[i];
}

template <class S>
__device__ real_of<S> slope(const Problem<S>& p, real_of<S> z) {
    if (p.softcap == 0) return p.logit_scale;
    const real_of<S> ratio = z / p.softcap;  // 1 - tanh^2, and tanh is z / softcap
    return (1 - ratio) * (1 + ratio) * p.logit_scale;
}

template <class S>
__device__ void row_gradient(const Problem<S>& p, int64_t row, Lse<real_of<S>> lse,
                             const Factors<real_of<S>>& f, S* out) {
    using T = real_of<S>;
    const bool aligned = same_phase<S>(out, logits_of(p, row));
    walk(logits_of(p, row), p.vocab, [&]<int n>(int64_t column, const Lanes<S, n>& x) {
        T z[n], grad[n];
        scores(p, x, z);
#pragma unroll
        for (int i = 0; i < n; ++i) grad[i] = f.plain * exp(log_probability(z[i], lse));
        set_target(f, column, z, lse, grad);
        if (f.spread != 0) {
            T a[n];
            mass(p, row, column, a);
#pragma unroll
            for (int i = 0; i < n; ++i) grad[i] -= f.spread * a[i];
        }
        Lanes<S, n> y;
#pragma unroll
        for (int i = 0; i < n; ++i) narrow(grad[i] * slope(p, z[i]), y.at[i]);
        store(out + column, y, aligned);
    });
}

// Kernels over rows

template <class S>
__global__ void __launch_bounds__(kMaxThreads)
    forward_rows(Problem<S> p, Output<real_of<S>> o) {
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) row_forward(p, o, row);
}

template <class S>
__global__ void __launch_bounds__(kMaxThreads)
    backward_rows(Problem<S> p, Upstream<real_of<S>> up, const real_of<S>* lse,
                  const real_of<S>* lse_low, S* out) {
    const double scale = up.divisor ? 1 / double(*up.divisor) : 1;
    const double weights = weight_sum(p);
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const double grad_lse = up.lse ? up.lse[row * up.lse_stride] : 0;
        S* const out_row = out + row * p.vocab;
        if (ignored(p, row) && grad_lse == 0) {  // exactly zero, even where the logits are NaN
            zero_row(out_row, p.vocab);
            continue;
        }
        const Lse<real_of<S>> saved = {lse[row], lse_low[row]};
        const double grad = up.loss[row * up.loss_stride] * scale;
        row_gradient(p, row, saved, row_factors(p, row, saved, grad, grad_lse, weights), out_row);
    }
}

template <class S>
__global__ void __launch_bounds__(kMaxThreads)
    fused_rows(Problem<S> p, Output<real_of<S>> o, const real_of<S>* divisor, S* logits) {
    const double scale = divisor ? 1 / double(*divisor) : 1;
    const double weights = weight_sum(p);
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const auto lse = row_forward(p, o, row);
        __syncthreads();  // the forward's last reads, such as the target's logit, before the writes
        S* const out_row = logits + row * p.logits_stride;
        if (ignored(p, row))
            zero_row(out_row, p.vocab);
        else
            row_gradient(p, row, lse, row_factors(p, row, lse, scale, 0, weights), out_row);
    }
}

// Kernels of one block, summing over rows

// The mean's divisor. Targets are checked here even where num_items is the divisor.
template <class S>
__global__ void __launch_bounds__(kMaxThreads)
    sum_weights(Problem<S> p, const real_of<S>* num_items, real_of<S>* total_weight) {
    double sum = 0;
    for (int64_t row = threadIdx.x; p.target && row < p.rows; row += blockDim.x)
        if (!ignored(p, row)) {
            const int64_t target = class_of(p, row);
            sum += p.weight ? p.weight[target] : 1;
        }
    const double total = p.target ? block_sum(sum) : double(p.rows);
    if (threadIdx.x == 0) *total_weight = num_items ? *num_items : real_of<S>(total);
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    sum_losses(const T* row_loss, int64_t rows, const T* divisor, T* loss) {
    double sum = 0;
    for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) sum += row_loss[row];
    const double total = block_sum(sum);
    if (threadIdx.x == 0) *loss = T(divisor ? total / double(*divisor) : total);
}

// Launching

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kNone = 0, kMean = 1;
// Beyond this a block takes several rows; enough to fill any GPU many times over.
constexpr int64_t kMaxBlocks = 65536;

struct Options {
    int64_t ignore_index;
    double label_smoothing, logit_scale, softcap, z_loss;
};

struct Call {
    torch::stable::accelerator::DeviceGuard guard;
    cudaStream_t stream;

    explicit Call(const Tensor& logits) : guard(logits.get_device_index()) {
        void* current = nullptr;
        STABLE_TORCH_ERROR_CODE_CHECK(
            aoti_torch_get_current_cuda_stream(logits.get_device_index(), &current));
        stream = static_cast<cudaStream_t>(current);
    }
};

// A block as large as gives each thread all its loads in flight once, so that it depends on the
// vocabulary and the dtype alone.
template <class S>
int threads_for(int64_t vocab) {
    int threads = kWarp;
    while (threads < kMaxThreads && int64_t(threads) * kInFlight * kLanes<S> < vocab) threads *= 2;
    return threads;
}

template <class S, class... Parameters, class... Arguments>
void launch_rows(void (*kernel)(Problem<S>, Parameters...), const Call& call, const Problem<S>& p,
                 Arguments... arguments) {
    if (p.rows == 0) return;
    const auto blocks = unsigned(std::min(p.rows, kMaxBlocks));
    kernel<<<blocks, threads_for<S>(p.vocab), 0, call.stream>>>(p, arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T>
T* pointer(const Tensor& tensor) {
    return static_cast<T*>(tensor.data_ptr());
}

template <class T>
T* pointer(const MaybeTensor& tensor) {
    return tensor ? pointer<T>(*tensor) : nullptr;
}

bool columns_adjacent(const Tensor& rows) { return rows.stride(1) == 1 || rows.size(1) == 1; }

Tensor adjacent(const Tensor& rows) {
    return columns_adjacent(rows) ? rows : torch::stable::contiguous(rows);
}

MaybeTensor contiguous(const MaybeTensor& tensor) {
    return tensor ? MaybeTensor(torch::stable::contiguous(*tensor)) : tensor;
}

ScalarType real_dtype(const Tensor& logits) {
    const bool wide = logits.scalar_type() == ScalarType::Double;
    return wide ? ScalarType::Double : ScalarType::Float;
}

// Only what would otherwise be read as something it is not; the public face words its own errors.
void check(const Tensor& logits, const Tensor& target, const MaybeTensor& weight) {
    STD_TORCH_CHECK(logits.dim() == 2, "logits: expected 2 dimensions, got ", logits.dim());
    STD_TORCH_CHECK(target.dim() == 1 || target.dim() == 2, "target: expected (N,) or (N, V)");
    STD_TORCH_CHECK(target.size(0) == logits.size(0), "target: expected as many rows as logits");
    const bool index = target.dim() == 1;
    STD_TORCH_CHECK(index || target.size(1) == logits.size(1), "target: expected logits' shape");
    const auto expected = index ? ScalarType::Long : logits.scalar_type();
    STD_TORCH_CHECK(target.scalar_type() == expected, "target: expected int64, or logits' dtype");
    STD_TORCH_CHECK(target.is_cuda(), "target: expected a CUDA tensor");
    STD_TORCH_CHECK(!weight || (weight->dim() == 1 && weight->size(0) == logits.size(1)),
                    "weight: expected one number for each class");
}

void check_real(const char* name, const MaybeTensor& tensor, const Tensor& logits) {
    if (!tensor) return;
    STD_TORCH_CHECK(tensor->is_cuda(), name, ": expected a CUDA tensor");
    STD_TORCH_CHECK(tensor->scalar_type() == real_dtype(logits),
                    name, ": expected the accumulation dtype");
}

// `target` and `weight` as prepared: adjacent columns, contiguous weight.
template <class S>
Problem<S> problem(const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
                   const Options& options) {
    const bool index = target.dim() == 1;
    const int64_t vocab = logits.size(1);
    return {
        .rows = logits.size(0),
        .vocab = vocab,
        .logits = pointer<const S>(logits),
        .logits_stride = logits.stride(0),
        .target = index ? pointer<const int64_t>(target) : nullptr,
        .target_stride = target.stride(0),
        .probs = index ? nullptr : pointer<const S>(target),
        .probs_stride = target.stride(0),
        .weight = pointer<const real_of<S>>(weight),
        .ignore_index = options.ignore_index,
        .label_smoothing = options.label_smoothing,
        .share = vocab == 0 ? 0 : options.label_smoothing / double(vocab),
        .logit_scale = real_of<S>(options.logit_scale),
        .softcap = real_of<S>(options.softcap),
        .z_loss = options.z_loss,
    };
}
