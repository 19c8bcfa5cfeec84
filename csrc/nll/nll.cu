// nll on CUDA: neglog::nll, neglog::nll_backward and neglog::nll_, all options, and the product with
// the upstream for what nll_ wrote.
//
// Compiled for sm_80, sm_90a and sm_100, run on the CPU by emulator/cuda_on_cpu.hpp, not yet on a GPU; no speed
// is claimed.
//
// (a) One block walks one row (row.cuh), then the row a grid further.
// (b) In place, a row of 32 KB and more that needs no second walk stays on chip (row_in_shared.cuh).
//     Shorter rows find themselves in the caches, longer ones would not fit.
// (c) No atomics: a row's bits depend on the vocabulary, the dtype and its alignment alone, and the
//     sums over rows are made by one block in double, in one order.
// (d) The host never waits: divisors stay on the device, so a call can be captured in a CUDA graph.
//     A target out of range therefore fails a device-side assertion, as torch's does.

#include "nll/row_in_shared.cuh"
#include "common/torch_stable.cuh"

namespace neglog {
namespace {

// Kernels over rows

template <class S, bool capped>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<S>)
    forward_rows(Problem<S, capped> p, Output<real_of<S>> o) {
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) row_forward(p, o, row);
}

template <class S, bool capped>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<S>)
    backward_rows(Problem<S, capped> p, Upstream<real_of<S>> up, Strided<real_of<S>> lse,
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
        row_gradient<kInFlight<S>>(p, row, saved, f, out_row);
    }
}

template <class T>
__device__ double fused_scale(const T* divisor, bool late) {
    return divisor && !(late && *divisor != 0) ? 1 / double(*divisor) : 1;
}

template <class S, bool capped>
__global__ void __launch_bounds__(kRowThreads, kFusedBlocks)
    fused_rows(Problem<S, capped> p, Output<real_of<S>> o, const real_of<S>* divisor, bool late,
               S* logits) {
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
            row_gradient<kAgain>(p, row, lse, f, out_row);
    }
}

// fused_rows of class targets without label smoothing and statistics, a cluster to a row.
template <class S, bool capped>
__global__ void __launch_bounds__(kRowThreads, kFusedBlocks)
    fused_rows_on_chip(Problem<S, capped> p, Output<real_of<S>> o, const real_of<S>* divisor,
                       bool late, S* logits) {
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
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<S>)
    scale_rows(Problem<S, false> p, Strided<real_of<S>> factor, S* x) {
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const real_of<S> own = factor[row];
        if (own == 1) continue;
        S* const at = x + row * p.logits_stride;
        const S* const from = at;
        walk<kInFlight<S>>(from, p.vocab, [&]<int n>(int64_t column, const Lanes<S, n>& v) {
            real_of<S> scaled[n];
#pragma unroll
            for (int i = 0; i < n; ++i) scaled[i] = widen(v.at[i]) * own;
            store(at + column, narrowed<S>(scaled), true);
        });
    }
}

// Sums over rows, by a kernel of one block

// What a thread asks for at a time: one number after the other would be 20 us of waiting for 32768.
constexpr int kSummed = 8;

// Calls use(read(row)) for each of the block's rows in one order, kSummed of them read ahead.
template <class Read, class Use>
__device__ void for_rows(int64_t rows, Read read, Use use) {
    for (int64_t first = threadIdx.x; first < rows; first += kSummed * blockDim.x) {
        decltype(read(first)) found[kSummed];
#pragma unroll
        for (int u = 0; u < kSummed; ++u)
            if (first + u * blockDim.x < rows) found[u] = read(first + u * blockDim.x);
#pragma unroll
        for (int u = 0; u < kSummed; ++u)
            if (first + u * blockDim.x < rows) use(found[u]);
    }
}

template <class S, bool capped>
__device__ double total_weight_of(const Problem<S, capped>& p) {
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

// The mean's divisor. Targets are checked here even where num_items is the divisor.
template <class S, bool capped>
__device__ real_of<S> divisor_of(const Problem<S, capped>& p, const real_of<S>* num_items) {
    const double total = total_weight_of(p);
    return num_items ? *num_items : real_of<S>(total);
}

// Before the rows, where their gradients want the divisor.
template <class S, bool capped>
__global__ void __launch_bounds__(kMaxThreads, 1)
    sum_weights(Problem<S, capped> p, const real_of<S>* num_items, real_of<S>* total_weight) {
    const real_of<S> divisor = divisor_of(p, num_items);
    if (threadIdx.x == 0) *total_weight = divisor;
}

// After the rows: the loss, unless it is null, and, unless that is known, the divisor.
template <class S, bool capped>
__global__ void __launch_bounds__(kMaxThreads, 1)
    sum_losses(Problem<S, capped> p, const real_of<S>* row_loss, const real_of<S>* num_items,
               bool known, bool mean, real_of<S>* total_weight, real_of<S>* loss) {
    using T = real_of<S>;
    const T divisor = known ? *total_weight : divisor_of(p, num_items);
    double sum = 0;
    for_rows(
        loss ? p.rows : 0, [&](int64_t row) { return row_loss[row]; }, [&](T one) { sum += one; });
    const double total = block_sum(sum);
    if (threadIdx.x != 0) return;
    if (!known) *total_weight = divisor;
    if (loss) *loss = T(mean ? total / double(divisor) : total);
}

// Launching

constexpr int64_t kNone = 0, kMean = 1;

// Beyond this a block takes several rows: to start one for each of 1000 classes costs as much as to
// read it. Long rows have a block each, as the last of four would keep the others' places empty.
inline int64_t most_blocks(const Call& call, int threads) {
    return int64_t(multiprocessors(call)) * (kThreadsOfMultiprocessor / threads);
}

template <class S, bool capped, class... Parameters, class... Arguments>
void launch_rows(void (*kernel)(Problem<S, capped>, Parameters...), const Call& call,
                 const Problem<S, capped>& p, Arguments... arguments) {
    if (p.rows == 0) return;
    const int threads = threads_for<S>(p.vocab);
    const int64_t most = threads == kRowThreads ? p.rows : most_blocks(call, threads);
    launch(kernel, call, std::min(p.rows, most), threads, p, arguments...);
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
template <class S, bool capped>
int parts_on_chip(const Problem<S, capped>& p, const Output<real_of<S>>& o, const Call& call) {
    const int64_t bytes = p.vocab * int64_t(sizeof(S));
    if (!p.target || p.label_smoothing != 0 || o.correct || bytes < kShortestOnChip) return 0;
    const int64_t most = most_dynamic_shared(call), usual = std::min(kSliceBytes, most);
    const int most_parts = has_clusters(call) ? kMostParts : 1;
    for (int parts = 1; parts <= most_parts; parts *= 2)
        if (slice_bytes(bytes, parts) <= usual) return parts;
    const bool alone = slice_bytes(bytes, kMostParts) <= std::min(kLargestSliceBytes, most);
    return most_parts == kMostParts && alone ? kMostParts : 0;
}

template <class S, bool capped>
void launch_fused(const Call& call, const Problem<S, capped>& p, const Output<real_of<S>>& o,
                  const real_of<S>* divisor, bool late, S* logits) {
    const int parts = p.rows == 0 ? 0 : parts_on_chip(p, o, call);
    if (parts == 0) {
        launch_rows(fused_rows<S, capped>, call, p, o, divisor, late, logits);
        return;
    }
    const int64_t clusters = std::min(p.rows, most_blocks(call, kRowThreads) / parts);
    const int64_t shared_bytes = slice_bytes(p.vocab * int64_t(sizeof(S)), parts);
    launch_clusters(fused_rows_on_chip<S, capped>, call, clusters * parts, kRowThreads, parts,
                    shared_bytes, p, o, divisor, late, logits);
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

template <class S, bool capped>
Problem<S, capped> problem(const Inputs& in) {
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

// Calls body with the Problem of the storage type and the softcap, for its type.
template <class Body>
void with_problem(const Inputs& in, Body body) {
    with_storage(in.logits, [&](auto storage) {
        using S = decltype(storage);
        if (in.softcap == 0) body(problem<S, false>(in));
        else body(problem<S, true>(in));
    });
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

template <class S, bool capped>
void run_forward(const Call& call, const Problem<S, capped>& p, const Inputs& in,
                 const MaybeTensor& num_items, bool in_place, Results& r) {
    using T = real_of<S>;
    T* const total_weight = pointer<T>(r.total_weight);
    const T* const items = pointer<const T>(num_items);
    const bool mean = in.reduction == kMean, whole = in.reduction != kNone;
    if (in_place && p.vocab != 0) {
        // In float16 a gradient divided by thousands of rows is below the smallest number, and a
        // loss scale that comes after cannot bring it back: there the autograd formula divides
        // later, but by 0 now, so that an ignored row's 0 does not become 0 / 0.
        const bool late = std::is_same_v<S, __half>;
        launch_one_block(sum_weights<S, capped>, call, p, items, total_weight);
        launch_fused(call, p, output<S>(r), mean ? total_weight : nullptr, late,
                     pointer<S>(in.logits));
    } else {
        launch_rows(forward_rows<S, capped>, call, p, output<S>(r));
    }
    const bool known = in_place && p.vocab != 0;
    if (whole || !known)
        launch_one_block(sum_losses<S, capped>, call, p, pointer<const T>(r.row_loss), items,
                         known, mean, total_weight, whole ? pointer<T>(r.loss) : nullptr);
    if (!whole) r.loss = r.row_loss;
}

Results forward(const Inputs& in, const MaybeTensor& num_items, bool stats, bool in_place) {
    check_real("num_items", num_items, in.logits, 1);
    const Call call(in.logits);
    Results r = new_results(in.logits, stats);
    with_problem(in, [&](const auto& p) { run_forward(call, p, in, num_items, in_place, r); });
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
    if (logits.size(1) == 0) return out;  // and of probabilities no address tells that they are
    with_problem(in, [&]<class S, bool capped>(const Problem<S, capped>& p) {
        using T = real_of<S>;
        const Upstream<T> up = {
            strided<T>(grad_loss), grad_lse ? strided<T>(*grad_lse) : Strided<T>{nullptr, 0},
            reduction == kMean ? pointer<const T>(total_weight) : nullptr};
        launch_rows(backward_rows<S, capped>, call, p, up, strided<T>(lse), strided<T>(lse_low),
                    pointer<S>(out));
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
        Problem<S, false> p = {};
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
