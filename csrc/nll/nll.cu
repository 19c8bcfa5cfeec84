// The CUDA ops of nll, the log-softmax and negative log-likelihood of rows of logits:
//
//   neglog::nll           loss and log-sum-exp of each row
//   neglog::nll_backward  gradient by the logits
//   neglog::nll_          loss, and in the same pass the gradient for upstream 1, written in place:
//                         over the logits
//   neglog::nll_scale_    the upstream gradient times what nll_ wrote
//
// In short, loss = log(sum_c exp(z_c)) - z_target, and dloss / dz_c = softmax(z)_c - [c = target].
// row.cuh has the formulas with class weights, label smoothing, target distributions, logit scale,
// softcap and z-loss.
//
// (a) A thread block computes a whole row (row.cuh), and the grid strides over the rows. Short rows
//     get smaller blocks, not several rows a block, so that a row's bits depend on the vocabulary,
//     the dtype and the row's alignment alone.
// (b) In place, rows of 32 KB and more that need no second pass are kept in shared memory
//     (row_in_shared.cuh). Shorter rows are still in a cache when they are read again. Rows larger
//     than the shared memory of a cluster are read twice.
// (c) No atomics. A single block forms the sums over rows, in double and in one order, so that the
//     same call gives the same bits every time.
// (d) The host never waits for the device: divisors stay on the device, and a call can be captured
//     in a CUDA graph. A target out of range therefore fails a device-side assertion, as torch's
//     does.

#include "common/torch_stable.cuh"
#include "nll/row_in_shared.cuh"

#include <algorithm>
#include <cfloat>

namespace neglog {
namespace {

// Kernels over rows, one block to a row

template <class S, bool has_softcap>
__global__ void __launch_bounds__(kRowThreads, kMinBlocks<S>)
    forward_rows(Problem<S, has_softcap> p, Output<compute_t<S>> o) {
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) row_forward(p, o, row);
}

template <class S, bool has_softcap>
__global__ void __launch_bounds__(kRowThreads, kMinBlocks<S>)
    backward_rows(Problem<S, has_softcap> p, Upstream<compute_t<S>> up, PerRow<compute_t<S>> lse,
                  PerRow<compute_t<S>> lse_low, S* out) {
    const double scale = up.divisor ? 1 / double(*up.divisor) : 1;
    const double weight_sum = class_weight_sum(p);
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const double grad_lse = up.lse.first ? up.lse[row] : 0;
        S* const out_row = out + row * p.vocab;
        // Exactly zero, even where the logits are NaN.
        if (is_ignored(p, row) && (grad_lse == 0 || !isfinite(lse[row]))) {
            zero_row(out_row, p.vocab);
            continue;
        }
        const Lse<compute_t<S>> saved = {lse[row], lse_low[row]};
        const auto z = target_score_or_0(p, row);
        const auto f =
            gradient_factors(p, row, saved, z, up.loss[row] * scale, grad_lse, weight_sum);
        row_gradient<kLoadsInFlight<S>>(p, row, saved, f, out_row);
    }
}

// What multiplies the gradients that nll_ forms. `divide_later` is explained in run_forward.
template <class T>
__device__ double gradient_scale(const T* divisor, bool divide_later) {
    return divisor && !(divide_later && *divisor != 0) ? 1 / double(*divisor) : 1;
}

template <class S, bool has_softcap>
__global__ void __launch_bounds__(kRowThreads, kMinBlocksForwardBackward)
    forward_backward_rows(Problem<S, has_softcap> p, Output<compute_t<S>> o,
                          const compute_t<S>* divisor, bool divide_later, S* logits) {
    const double scale = gradient_scale(divisor, divide_later);
    const double weight_sum = class_weight_sum(p);
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const auto lse = row_forward(p, o, row);
        const auto z = target_score_or_0(p, row);
        const auto f = gradient_factors(p, row, lse, z, scale, 0, weight_sum);
        __syncthreads();  // all threads have read the row and its target; now they are overwritten
        S* const out_row = logits + row * p.logits_stride;
        if (is_ignored(p, row)) zero_row(out_row, p.vocab);
        else row_gradient<kLoadsInFlightSecondPass>(p, row, lse, f, out_row);
    }
}

// The same with the row in shared memory, one cluster to a row: for class targets, without label
// smoothing and without statistics.
template <class S, bool has_softcap>
__global__ void __launch_bounds__(kRowThreads, kMinBlocksForwardBackward)
    forward_backward_rows_in_shared(Problem<S, has_softcap> p, Output<compute_t<S>> o,
                                    const compute_t<S>* divisor, bool divide_later, S* logits) {
    using T = compute_t<S>;
    NEGLOG_DYNAMIC_SHARED(shared);
    const auto states = reinterpret_cast<SoftmaxState<T>*>(shared);
    uint4* const held = shared + kStateVectors;
    const double scale = gradient_scale(divisor, divide_later);
    const int64_t blocks_per_row = cluster_size();
    int slot = 0;
    for (int64_t row = blockIdx.x / blocks_per_row; row < p.rows;
         row += gridDim.x / blocks_per_row) {
        S* const row_logits = logits + row * p.logits_stride;
        const RowSlice slice = slice_of<S>(row_logits, p.vocab);
        const bool counted = !is_ignored(p, row);
        Lse<T> lse = {0, 0};
        double loss = 0;
        if (counted) {
            const T z = target_score(p, row);  // before the barriers: after them it is overwritten
            const auto state =
                block_reduce(load_slice<S>(p, row_logits, slice, held), MergeStates{});
            lse = finish(cluster_reduce(state, states + slot));
            slot = 1 - slot;
            loss = row_loss(p, row, lse, z);
            const auto f = gradient_factors(p, row, lse, z, scale, 0, 0);
            write_slice_gradient(p, row, slice, held, lse, f, row_logits);
        } else {
            zero_slice(slice, p.vocab, row_logits);
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
    scale_rows(Problem<S, false> p, PerRow<compute_t<S>> factor, S* x) {
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

// Sums over rows, by kernels of one block

// Rows whose numbers a thread loads before it uses the first. One load after the other would take
// an estimated 20 us of latency for 32768 rows.
constexpr int kRowsInFlight = 8;

// Calls use(read(row)) for each row, in a block-stride loop.
template <class Read, class Use>
__device__ void for_rows(int64_t rows, Read read, Use use) {
    for (int64_t first = threadIdx.x; first < rows; first += kRowsInFlight * blockDim.x) {
        decltype(read(first)) found[kRowsInFlight];
#pragma unroll
        for (int u = 0; u < kRowsInFlight; ++u)
            if (first + u * blockDim.x < rows) found[u] = read(first + u * blockDim.x);
#pragma unroll
        for (int u = 0; u < kRowsInFlight; ++u)
            if (first + u * blockDim.x < rows) use(found[u]);
    }
}

template <class S, bool has_softcap>
__device__ double total_weight_of(const Problem<S, has_softcap>& p) {
    if (!p.target) return p.vocab ? double(p.rows) : double(NAN);
    double sum = 0;
    for_rows(
        p.rows, [&](int64_t row) { return p.target[row * p.target_stride]; },
        [&](int64_t target) {
            if (target == p.ignore_index) return;
            assert(target >= 0 && target < p.vocab);
            sum += p.weight ? p.weight[target] : 1;
        });
    return block_sum(sum);
}

// The divisor of the mean. Where num_items is given the sum is still formed, for its check of
// targets.
template <class S, bool has_softcap>
__device__ compute_t<S> divisor_of(const Problem<S, has_softcap>& p,
                                   const compute_t<S>* num_items) {
    const double total = total_weight_of(p);
    return num_items ? *num_items : compute_t<S>(total);
}

// Runs before the rows where their gradients need the divisor.
template <class S, bool has_softcap>
__global__ void __launch_bounds__(kMaxThreads, 1)
    sum_weights(Problem<S, has_softcap> p, const compute_t<S>* num_items,
                compute_t<S>* total_weight) {
    const compute_t<S> divisor = divisor_of(p, num_items);
    if (threadIdx.x == 0) *total_weight = divisor;
}

// Runs after the rows. Writes the loss unless its pointer is null, and total_weight unless
// sum_weights has done it.
template <class S, bool has_softcap>
__global__ void __launch_bounds__(kMaxThreads, 1)
    sum_losses(Problem<S, has_softcap> p, const compute_t<S>* row_loss,
               const compute_t<S>* num_items, bool divisor_known, bool mean,
               compute_t<S>* total_weight, compute_t<S>* loss) {
    using T = compute_t<S>;
    const T divisor = divisor_known ? *total_weight : divisor_of(p, num_items);
    double sum = 0;
    for_rows(
        loss ? p.rows : 0, [&](int64_t row) { return row_loss[row]; }, [&](T one) { sum += one; });
    const double total = block_sum(sum);
    if (threadIdx.x != 0) return;
    if (!divisor_known) *total_weight = divisor;
    if (loss) *loss = T(mean ? total / double(divisor) : total);
}

// Launching

constexpr int64_t kReductionNone = 0, kReductionMean = 1;  // as in aten; 2 is the sum
constexpr int kThreadsPerMultiprocessor = 2048;

// As many blocks as the device runs at once, if only their threads are counted.
inline int64_t max_blocks(const DeviceContext& context, int threads) {
    return int64_t(multiprocessor_count(context)) * (kThreadsPerMultiprocessor / threads);
}

// Short rows share a grid of max_blocks: to start a block costs as much as to read 1000 classes.
// Long rows get a block each, else a multiprocessor would idle while the last blocks finish their
// share.
template <class S, bool has_softcap, class... Parameters, class... Arguments>
void launch_rows(void (*kernel)(Problem<S, has_softcap>, Parameters...),
                 const DeviceContext& context, const Problem<S, has_softcap>& p,
                 Arguments... arguments) {
    if (p.rows == 0) return;
    const int threads = block_size_for<S>(p.vocab);
    const int64_t blocks = threads == kRowThreads ? p.rows : max_blocks(context, threads);
    launch(kernel, context, std::min(p.rows, blocks), threads, p, arguments...);
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

// The size of the cluster that holds a row in shared memory, or 0 where the row is not held.
template <class S, bool has_softcap>
int blocks_per_row_in_shared(const Problem<S, has_softcap>& p, const Output<compute_t<S>>& o,
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

template <class S, bool has_softcap>
void launch_forward_backward(const DeviceContext& context, const Problem<S, has_softcap>& p,
                             const Output<compute_t<S>>& o, const compute_t<S>* divisor,
                             bool divide_later, S* logits) {
    const int blocks_per_row = p.rows == 0 ? 0 : blocks_per_row_in_shared(p, o, context);
    if (blocks_per_row == 0) {
        launch_rows(forward_backward_rows<S, has_softcap>, context, p, o, divisor, divide_later,
                    logits);
        return;
    }
    const int64_t clusters = std::min(p.rows, max_blocks(context, kRowThreads) / blocks_per_row);
    const int64_t shared_bytes = slice_bytes(p.vocab * int64_t(sizeof(S)), blocks_per_row);
    launch_clusters(forward_backward_rows_in_shared<S, has_softcap>, context,
                    clusters * blocks_per_row, kRowThreads, blocks_per_row, shared_bytes, p, o,
                    divisor, divide_later, logits);
}

template <class... Parameters, class... Arguments>
void launch_one_block(void (*kernel)(Parameters...), const DeviceContext& context,
                      Arguments... arguments) {
    launch(kernel, context, 1, kMaxThreads, arguments...);
}

// Tensors

// The arguments that the ops share.
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
PerRow<T> per_row(const Tensor& tensor) {
    return {pointer<const T>(tensor), tensor.dim() == 0 ? 0 : tensor.stride(0)};
}

// 0 for none. Beyond the range of what is computed in a cap is none: as inf it would make inf * 0.
// One that rounds to 0 would make 0 / 0, so the smallest normal number takes its place.
double softcap_of(ScalarType logits, double softcap) {
    const bool wide = logits == ScalarType::Double;
    if (softcap == 0 || softcap > (wide ? DBL_MAX : FLT_MAX)) return 0;
    return std::max(softcap, wide ? DBL_MIN : double(FLT_MIN));
}

// The arguments with columns adjacent in memory. Checks what a kernel would misread; the Python
// functions that call the ops raise the errors meant for users.
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
    check_numbers("weight", in.weight, logits, logits.size(1));
    STD_TORCH_CHECK(!in.weight || in.weight->dim() == 1, "weight: expected (V,)");
    Inputs ready = in;
    ready.logits = with_adjacent_columns(logits);
    if (!index) ready.target = with_adjacent_columns(target);
    if (in.weight) ready.weight = torch::stable::contiguous(*in.weight);
    ready.softcap = softcap_of(logits.scalar_type(), in.softcap);
    return ready;
}

template <class S, bool has_softcap>
Problem<S, has_softcap> problem(const Inputs& in) {
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
        .weight = pointer<const compute_t<S>>(in.weight),
        .ignore_index = in.ignore_index,
        .label_smoothing = in.label_smoothing,
        .smoothing_per_class = vocab == 0 ? 0 : in.label_smoothing / double(vocab),
        .to_score = {compute_t<S>(in.logit_scale), compute_t<S>(in.softcap)},
        .z_loss = in.z_loss,
    };
}

// Calls body with the Problem for the dtype of the logits, with or without a softcap.
template <class Body>
void dispatch_problem(const Inputs& in, Body body) {
    dispatch_storage(in.logits, [&](auto storage) {
        using S = decltype(storage);
        if (in.softcap == 0) body(problem<S, false>(in));
        else body(problem<S, true>(in));
    });
}

Results new_results(const Tensor& logits, bool stats) {
    const std::vector<int64_t> rows{logits.size(0)}, counted{stats ? logits.size(0) : 0};
    return {new_compute_tensor(logits, rows),
            new_compute_tensor(logits, rows),
            new_compute_tensor(logits, rows),
            new_compute_tensor(logits, {}),
            torch::stable::new_empty(logits, counted, ScalarType::Bool),
            new_compute_tensor(logits, counted),
            new_compute_tensor(logits, {})};
}

template <class S>
Output<compute_t<S>> output(const Results& r) {
    using T = compute_t<S>;
    const bool stats = r.correct.numel() > 0;
    return {pointer<T>(r.row_loss), pointer<T>(r.lse), pointer<T>(r.lse_low),
            stats ? pointer<bool>(r.correct) : nullptr, stats ? pointer<T>(r.entropy) : nullptr};
}

// The ops

template <class S, bool has_softcap>
void run_forward(const DeviceContext& context, const Problem<S, has_softcap>& p, const Inputs& in,
                 const MaybeTensor& num_items, bool in_place, Results& r) {
    using T = compute_t<S>;
    T* const total_weight = pointer<T>(r.total_weight);
    const T* const items = pointer<const T>(num_items);
    const bool mean = in.reduction == kReductionMean, reduced = in.reduction != kReductionNone;
    const bool forms_gradient = in_place && p.vocab != 0;
    if (forms_gradient) {
        // In float16 a gradient divided by thousands of rows underflows, and a loss scale that
        // multiplies it later cannot recover it. There the autograd formula divides after that,
        // except by 0: this is done here, so that an ignored row's gradient of 0 does not become 0
        // / 0.
        const bool divide_later = std::is_same_v<S, __half>;
        launch_one_block(sum_weights<S, has_softcap>, context, p, items, total_weight);
        launch_forward_backward(context, p, output<S>(r), mean ? total_weight : nullptr,
                                divide_later, pointer<S>(in.logits));
    } else {
        launch_rows(forward_rows<S, has_softcap>, context, p, output<S>(r));
    }
    if (reduced || !forms_gradient)
        launch_one_block(sum_losses<S, has_softcap>, context, p, pointer<const T>(r.row_loss),
                         items, forms_gradient, mean, total_weight,
                         reduced ? pointer<T>(r.loss) : nullptr);
    if (!reduced) r.loss = r.row_loss;
}

Results forward(const Inputs& in, const MaybeTensor& num_items, bool stats, bool in_place) {
    check_numbers("num_items", num_items, in.logits, 1);
    const DeviceContext context(in.logits);
    Results r = new_results(in.logits, stats);
    dispatch_problem(in,
                     [&](const auto& p) { run_forward(context, p, in, num_items, in_place, r); });
    return r;
}

// The schemas are copied from python/neglog/ops/nll/schema.py, which defines them.

// nll(Tensor logits, Tensor target, Tensor? weight, Tensor? num_items, int reduction,
//     SymInt ignore_index, float label_smoothing, float logit_scale, float softcap, float z_loss,
//     bool stats, str backend)
//     -> (Tensor loss, Tensor lse, Tensor lse_low, Tensor total_weight, Tensor correct,
//         Tensor entropy)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> nll(
    const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
    const MaybeTensor& num_items, int64_t reduction, int64_t ignore_index, double label_smoothing,
    double logit_scale, double softcap, double z_loss, bool stats, const std::string&) {
    const Inputs in = checked({logits, target, weight, reduction, ignore_index, label_smoothing,
                               logit_scale, softcap, z_loss});
    const Results r = forward(in, num_items, stats, false);
    return {r.loss, r.lse, r.lse_low, r.total_weight, r.correct, r.entropy};
}

// nll_(Tensor(a!) logits, Tensor target, Tensor? weight, Tensor? num_items, int reduction,
//      SymInt ignore_index, float label_smoothing, float logit_scale, float softcap, float z_loss,
//      bool stats, str backend)
//     -> (Tensor loss, Tensor lse, Tensor total_weight, Tensor correct, Tensor entropy)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> nll_(
    const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
    const MaybeTensor& num_items, int64_t reduction, int64_t ignore_index, double label_smoothing,
    double logit_scale, double softcap, double z_loss, bool stats, const std::string&) {
    const Inputs in = checked({logits, target, weight, reduction, ignore_index, label_smoothing,
                               logit_scale, softcap, z_loss});
    const Results r = forward(in, num_items, stats, true);
    Tensor written = logits;
    if (!has_adjacent_columns(logits)) torch::stable::copy_(written, in.logits);
    return {r.loss, r.lse, r.total_weight, r.correct, r.entropy};
}

// nll_backward(Tensor grad_loss, Tensor? grad_lse, Tensor logits, Tensor target, Tensor? weight,
//              Tensor lse, Tensor lse_low, Tensor total_weight, int reduction, SymInt ignore_index,
//              float label_smoothing, float logit_scale, float softcap, float z_loss, str backend)
//     -> Tensor
Tensor nll_backward(const Tensor& grad_loss, const MaybeTensor& grad_lse, const Tensor& logits,
                    const Tensor& target, const MaybeTensor& weight, const Tensor& lse,
                    const Tensor& lse_low, const Tensor& total_weight, int64_t reduction,
                    int64_t ignore_index, double label_smoothing, double logit_scale,
                    double softcap, double z_loss, const std::string&) {
    const Inputs in = checked({logits, target, weight, reduction, ignore_index, label_smoothing,
                               logit_scale, softcap, z_loss});
    const int64_t rows = logits.size(0);
    check_numbers("grad_loss", grad_loss, logits, rows);
    check_numbers("grad_lse", grad_lse, logits, rows);
    check_numbers("lse", lse, logits, rows);
    check_numbers("lse_low", lse_low, logits, rows);
    check_numbers("total_weight", total_weight, logits, 1);
    const DeviceContext context(logits);
    const Tensor out = torch::stable::new_empty(logits, logits.sizes(), logits.scalar_type());
    // Without classes there is nothing to write. A target distribution then has a null pointer, by
    // which the kernels would take it for absent.
    if (logits.size(1) == 0) return out;
    dispatch_problem(in, [&]<class S, bool has_softcap>(const Problem<S, has_softcap>& p) {
        using T = compute_t<S>;
        const Upstream<T> up = {
            per_row<T>(grad_loss), grad_lse ? per_row<T>(*grad_lse) : PerRow<T>{nullptr, 0},
            reduction == kReductionMean ? pointer<const T>(total_weight) : nullptr};
        launch_rows(backward_rows<S, has_softcap>, context, p, up, per_row<T>(lse),
                    per_row<T>(lse_low), pointer<S>(out));
    });
    return out;
}

// nll_scale_(Tensor(a!) grad, Tensor factor) -> ()
void nll_scale_(const Tensor& grad, const Tensor& factor) {
    STD_TORCH_CHECK(on_device(grad) && grad.dim() == 2, "grad: expected (N, V) on CUDA");
    check_numbers("factor", factor, grad, grad.size(0));
    const DeviceContext context(grad);
    const Tensor rows = with_adjacent_columns(grad);
    dispatch_storage(rows, [&](auto storage) {
        using S = decltype(storage);
        Problem<S, false> p = {};
        p.rows = rows.size(0);
        p.vocab = rows.size(1);
        p.logits = pointer<const S>(rows);
        p.logits_stride = rows.stride(0);
        launch_rows(scale_rows<S>, context, p, per_row<compute_t<S>>(factor), pointer<S>(rows));
    });
    Tensor written = grad;
    if (!has_adjacent_columns(grad)) torch::stable::copy_(written, rows);
}

}  // namespace
}  // namespace neglog

// STABLE_TORCH_LIBRARY_IMPL of the namespace neglog; the schemas stand above the functions.
NEGLOG_IMPL(m) {
    m.impl("nll", TORCH_BOX(&neglog::nll));
    m.impl("nll_backward", TORCH_BOX(&neglog::nll_backward));
    m.impl("nll_", TORCH_BOX(&neglog::nll_));
    m.impl("nll_scale_", TORCH_BOX(&neglog::nll_scale_));
}
