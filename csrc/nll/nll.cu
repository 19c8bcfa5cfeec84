// The CUDA ops of nll, the log-softmax and negative log-likelihood of rows of logits:
//
//   neglog::nll                loss and log-sum-exp of each row
//   neglog::nll_backward       gradient by the logits
//   neglog::nll_with_gradient  loss, and in the same pass the gradient for an upstream that is
//                              remembered, in new memory
//   neglog::nll_gradient_for_  that gradient formed again, where the upstream is another
//   neglog::nll_               loss, and in the same pass the gradient for upstream 1, written in
//                              place: over the logits
//   neglog::nll_scale_         the upstream gradient times what nll_ wrote
//
// In short, loss = log(sum_c exp(z_c)) - z_target, and dloss / dz_c = softmax(z)_c - [c = target].
// row.cuh has the formulas with class weights, label smoothing, target distributions, logit scale,
// softcap and z-loss.
//
// (a) A thread block computes a whole row (row.cuh), and the grid strides over the rows. Short rows
//     get smaller blocks, not several rows a block, so that a row's bits depend on the vocabulary,
//     the dtype and the row's alignment alone.
// (b) Where loss and gradient are formed in one pass, rows of 32 KB and more that need no second
//     read are kept in shared memory (row_in_shared.cuh). Shorter rows are still in a cache when
//     they are read again. Rows larger than the shared memory of a cluster are read twice.
// (c) No atomics. A single block forms the sums over rows, in double and in one order, so that the
//     same call gives the same bits every time.
// (d) The host never waits for the device: divisors stay on the device, and a call can be captured
//     in a CUDA graph. A target out of range therefore fails a device-side assertion, as torch's
//     does.

#include "common/torch_stable.cuh"
#include "nll/kernels.cuh"

#include <algorithm>
#include <cfloat>

namespace neglog {
namespace {

// Launching

constexpr int64_t kReductionNone = 0, kReductionMean = 1;  // as in aten; 2 is the sum
constexpr int kThreadsPerMultiprocessor = 2048;

// As many blocks as the device runs at once, if only their threads are counted.
inline int64_t max_blocks(const DeviceContext& context, int threads) {
    return int64_t(multiprocessor_count(context)) * (kThreadsPerMultiprocessor / threads);
}

template <class S, bool has_softcap, class... Parameters, class... Arguments>
void launch_row_blocks(void (*kernel)(Problem<S, has_softcap>, Parameters...),
                       const DeviceContext& context, int64_t blocks,
                       const Problem<S, has_softcap>& p, Arguments... arguments) {
    if (p.rows == 0) return;
    launch(kernel, context, std::min(p.rows, blocks), block_size_for<S>(p.vocab), p, arguments...);
}

// Short rows share a grid of max_blocks: to start a block costs as much as to read 1000 classes.
// Long rows get a block each, else a multiprocessor would idle while the last blocks finish their
// share.
template <class S, bool has_softcap, class... Parameters, class... Arguments>
void launch_rows(void (*kernel)(Problem<S, has_softcap>, Parameters...),
                 const DeviceContext& context, const Problem<S, has_softcap>& p,
                 Arguments... arguments) {
    const int threads = block_size_for<S>(p.vocab);
    const int64_t blocks = threads == kRowThreads ? p.rows : max_blocks(context, threads);
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
template <class S, bool has_softcap>
bool lies_as_new_memory(const Problem<S, has_softcap>& p) {
    return reinterpret_cast<uintptr_t>(p.logits) % kVectorBytes == 0 &&
           (p.logits_stride - p.vocab) % kVectorSize<S> == 0;
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

// Loss and gradient in one pass. Where g.first is null, the loss alone: with the same bits, which
// forward_rows has not where it takes the sums of a cluster's row in another order.
template <class S, bool has_softcap>
void launch_forward_backward(const DeviceContext& context, const Problem<S, has_softcap>& p,
                             const Output<compute_t<S>>& o, const Gradient<S>& g,
                             bool vectors_match) {
    const bool may_hold = p.rows != 0 && vectors_match;
    const int blocks_per_row = may_hold ? blocks_per_row_in_shared(p, o, context) : 0;
    if (blocks_per_row == 0) {
        launch_rows(forward_backward_rows<S, has_softcap>, context, p, o, g);
        return;
    }
    const int64_t clusters = std::min(p.rows, max_blocks(context, kRowThreads) / blocks_per_row);
    const int64_t shared_bytes = slice_bytes(p.vocab * int64_t(sizeof(S)), blocks_per_row);
    launch_clusters(forward_backward_rows_in_shared<S, has_softcap>, context,
                    clusters * blocks_per_row, kRowThreads, blocks_per_row, shared_bytes, p, o, g);
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

// Where a forward writes.
template <class T>
struct Destination {
    Output<T> rows;
    T *total_weight, *loss;  // loss is null where rows are not reduced
};

template <class S>
Destination<compute_t<S>> destination(const Results& r, bool reduced) {
    using T = compute_t<S>;
    return {output<S>(r), pointer<T>(r.total_weight), reduced ? pointer<T>(r.loss) : nullptr};
}

// The ops

// Needed where the loss is reduced, and where sum_weights has not run.
template <class S, bool has_softcap>
void launch_sum_losses(const DeviceContext& context, const Problem<S, has_softcap>& p,
                       const Inputs& in, const MaybeTensor& num_items,
                       const Destination<compute_t<S>>& to, bool divisor_known) {
    using T = compute_t<S>;
    launch_one_block(sum_losses<S, has_softcap>, context, p, static_cast<const T*>(to.rows.loss),
                     pointer<const T>(num_items), divisor_known, in.reduction == kReductionMean,
                     to.total_weight, to.loss);
}

template <class S, bool has_softcap>
void forward_alone(const DeviceContext& context, const Problem<S, has_softcap>& p, const Inputs& in,
                   const MaybeTensor& num_items, const Destination<compute_t<S>>& to) {
    launch_rows(forward_rows<S, has_softcap>, context, p, to.rows);
    launch_sum_losses(context, p, in, num_items, to, false);
}

template <class S, bool has_softcap>
void forward_in_place(const DeviceContext& context, const Problem<S, has_softcap>& p,
                      const Inputs& in, const MaybeTensor& num_items,
                      const Destination<compute_t<S>>& to) {
    using T = compute_t<S>;
    // In float16 a gradient divided by thousands of rows underflows, and a loss scale that
    // multiplies it later cannot recover it. There the autograd formula divides after that, except
    // by 0: this is done here, so that an ignored row's gradient of 0 does not become 0 / 0.
    const Gradient<S> gradient = {
        .first = pointer<S>(in.logits),
        .stride = p.logits_stride,
        .upstream = nullptr,
        .divisor = in.reduction == kReductionMean ? to.total_weight : nullptr,
        .divide_later = std::is_same_v<S, __half>,
    };
    launch_one_block(sum_weights<S, has_softcap>, context, p, pointer<const T>(num_items),
                     to.total_weight, static_cast<const Remembered<T>*>(nullptr),
                     static_cast<T*>(nullptr));
    launch_forward_backward(context, p, to.rows, gradient, true);
    if (to.loss) launch_sum_losses(context, p, in, num_items, to, true);
}

Results forward(const Inputs& in, const MaybeTensor& num_items, bool stats, bool in_place) {
    check_numbers("num_items", num_items, in.logits, 1);
    const DeviceContext context(in.logits);
    const bool reduced = in.reduction != kReductionNone;
    Results r = new_results(in.logits, stats);
    dispatch_problem(in, [&]<class S, bool has_softcap>(const Problem<S, has_softcap>& p) {
        const auto to = destination<S>(r, reduced);
        if (in_place && p.vocab != 0) forward_in_place(context, p, in, num_items, to);
        else forward_alone(context, p, in, num_items, to);
    });
    if (!reduced) r.loss = r.row_loss;
    return r;
}

// What nll_with_gradient keeps for nll_gradient_for_, in one tensor, which takes the host less time
// than five: lse (N), lse_low (N), the losses of rows (N), the divisor of the mean, and the
// upstream that the gradient was formed for.
template <class T>
struct Kept {
    T *lse, *lse_low, *row_loss, *total_weight, *formed_for;
};

int64_t kept_size(int64_t rows) { return 3 * rows + 2; }

template <class T>
Kept<T> kept_numbers(const Tensor& kept, int64_t rows) {
    T* const first = pointer<T>(kept);
    return {first, first + rows, first + 2 * rows, first + 3 * rows, first + 3 * rows + 1};
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
                    per_row<T>(lse_low), Formed<T>{nullptr, nullptr}, pointer<S>(out));
    });
    return out;
}

// Two adjacent numbers: an upstream, and misses.
void check_remembered(const MaybeTensor& remembered, const Tensor& logits) {
    check_numbers("remembered", remembered, logits, 2);
    STD_TORCH_CHECK(!remembered || (remembered->dim() == 1 && remembered->is_contiguous()),
                    "remembered: expected 2 adjacent numbers");
}

// nll_with_gradient(Tensor logits, Tensor target, Tensor? weight, Tensor? num_items,
//                   Tensor? remembered, int reduction, SymInt ignore_index, float label_smoothing,
//                   float logit_scale, float softcap, float z_loss, bool form)
//     -> (Tensor loss, Tensor kept, Tensor gradient)
std::tuple<Tensor, Tensor, Tensor> nll_with_gradient(const Tensor& logits, const Tensor& target,
                                                     const MaybeTensor& weight,
                                                     const MaybeTensor& num_items,
                                                     const MaybeTensor& remembered,
                                                     int64_t reduction, int64_t ignore_index,
                                                     double label_smoothing, double logit_scale,
                                                     double softcap, double z_loss, bool form) {
    const Inputs in = checked({logits, target, weight, reduction, ignore_index, label_smoothing,
                               logit_scale, softcap, z_loss});
    STD_TORCH_CHECK(reduction != kReductionNone, "reduction: expected mean or sum");
    check_numbers("num_items", num_items, logits, 1);
    check_remembered(remembered, logits);
    const DeviceContext context(logits);
    const int64_t rows = logits.size(0), vocab = logits.size(1);
    const bool forms = form && vocab != 0;
    const Tensor loss = new_compute_tensor(logits, {});
    const Tensor kept = new_compute_tensor(logits, {kept_size(rows)});
    const Tensor gradient =
        torch::stable::new_empty(logits, {form ? rows : 0, form ? vocab : 0}, logits.scalar_type());
    dispatch_problem(in, [&]<class S, bool has_softcap>(const Problem<S, has_softcap>& p) {
        using T = compute_t<S>;
        const Kept<T> to = kept_numbers<T>(kept, rows);
        const Output<T> out = {to.row_loss, to.lse, to.lse_low, nullptr, nullptr};
        const Destination<T> all = {out, to.total_weight, pointer<T>(loss)};
        Gradient<S> g = {};
        if (forms) {
            g = {
                .first = pointer<S>(gradient),
                .stride = vocab,
                .upstream = to.formed_for,
                .divisor = reduction == kReductionMean ? to.total_weight : nullptr,
                .divide_later = false,  // the upstream is known, with a loss scale that is in it
            };
            launch_one_block(sum_weights<S, has_softcap>, context, p, pointer<const T>(num_items),
                             to.total_weight, pointer<const Remembered<T>>(remembered),
                             to.formed_for);
        }
        launch_forward_backward(context, p, out, g, lies_as_new_memory(p));
        launch_sum_losses(context, p, in, num_items, all, forms);
    });
    return {loss, kept, gradient};
}

// nll_gradient_for_(Tensor(a!) gradient, Tensor grad_loss, Tensor kept, Tensor(b!)? remembered,
//                   Tensor logits, Tensor target, Tensor? weight, int reduction,
//                   SymInt ignore_index, float label_smoothing, float logit_scale, float softcap,
//                   float z_loss, bool formed) -> ()
void nll_gradient_for_(const Tensor& gradient, const Tensor& grad_loss, const Tensor& kept,
                       const MaybeTensor& remembered, const Tensor& logits, const Tensor& target,
                       const MaybeTensor& weight, int64_t reduction, int64_t ignore_index,
                       double label_smoothing, double logit_scale, double softcap, double z_loss,
                       bool formed) {
    const Inputs in = checked({logits, target, weight, reduction, ignore_index, label_smoothing,
                               logit_scale, softcap, z_loss});
    STD_TORCH_CHECK(reduction != kReductionNone, "reduction: expected mean or sum");
    const int64_t rows = logits.size(0), vocab = logits.size(1);
    check_device("gradient", gradient, logits);
    STD_TORCH_CHECK(gradient.dim() == 2 && gradient.size(0) == rows && gradient.size(1) == vocab &&
                        gradient.scalar_type() == logits.scalar_type() && gradient.is_contiguous(),
                    "gradient: expected a contiguous tensor of the logits' shape and dtype");
    check_numbers("kept", kept, logits, kept_size(rows));
    STD_TORCH_CHECK(kept.dim() == 1 && kept.is_contiguous(), "kept: expected what was returned");
    check_numbers("grad_loss", grad_loss, logits, 1);
    check_remembered(remembered, logits);
    if (vocab == 0) return;
    const DeviceContext context(logits);
    dispatch_problem(in, [&]<class S, bool has_softcap>(const Problem<S, has_softcap>& p) {
        using T = compute_t<S>;
        const Kept<T> from = kept_numbers<T>(kept, rows);
        const Upstream<T> up = {{pointer<const T>(grad_loss), 0},
                                {nullptr, 0},
                                reduction == kReductionMean ? from.total_weight : nullptr};
        // Few blocks, because they nearly always have nothing to do.
        launch_row_blocks(
            backward_rows<S, has_softcap>, context, max_blocks(context, block_size_for<S>(vocab)),
            p, up, PerRow<T>{from.lse, 1}, PerRow<T>{from.lse_low, 1},
            Formed<T>{formed ? from.formed_for : nullptr, pointer<Remembered<T>>(remembered)},
            pointer<S>(gradient));
    });
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
    m.impl("nll_with_gradient", TORCH_BOX(&neglog::nll_with_gradient));
    m.impl("nll_gradient_for_", TORCH_BOX(&neglog::nll_gradient_for_));
    m.impl("nll_", TORCH_BOX(&neglog::nll_));
    m.impl("nll_scale_", TORCH_BOX(&neglog::nll_scale_));
}
