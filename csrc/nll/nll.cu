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
// row.cuh has the formulas with class weights, token weights, label smoothing, target distributions,
// logit scale, softcap and z-loss.
//
// (a) A thread block computes a whole row (row.cuh), and the grid strides over the rows. Short rows
//     get smaller blocks, not several rows a block, so that a row's bits depend on the vocabulary,
//     the dtype and the row's alignment alone.
// (b) Where loss and gradient are formed in one pass, rows of 32 KB and more that need no second
//     read are kept in shared memory (row_in_shared.cuh). Shorter rows are still in a cache when
//     they are read again. Rows larger than the shared memory of a cluster are read twice.
// (c) No atomics. A single block or cluster forms the sums over rows, in double and in one order, so
//     that the same call gives the same bits every time.
// (d) The host never waits for the device: divisors stay on the device, and a call can be captured
//     in a CUDA graph. A target out of range therefore fails a device-side assertion, as torch's
//     does.

#include "nll/launch.cuh"

namespace neglog {
namespace {

// Tensors

// The arguments that the ops share.
struct Inputs {
    Tensor logits, target;
    MaybeTensor weight, token_weight;
    int64_t reduction, ignore_index;
    double label_smoothing, logit_scale, softcap, z_loss;
};

struct Results {
    Tensor row_loss, lse, lse_low, total_weight, correct, entropy, argmax, loss;
};

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
    check_numbers("token_weight", in.token_weight, logits, logits.size(0));
    STD_TORCH_CHECK(!in.token_weight || in.token_weight->dim() == 1, "token_weight: expected (N,)");
    Inputs ready = in;
    ready.logits = with_adjacent_columns(logits);
    if (!index) ready.target = with_adjacent_columns(target);
    if (in.weight) ready.weight = torch::stable::contiguous(*in.weight);
    if (in.token_weight) ready.token_weight = torch::stable::contiguous(*in.token_weight);
    ready.softcap = softcap_of(logits.scalar_type(), in.softcap);
    return ready;
}

template <class S, Scoring scoring>
Problem<S, scoring> problem(const Inputs& in) {
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
        .token_weight = pointer<const compute_t<S>>(in.token_weight),
        .ignore_index = in.ignore_index,
        .label_smoothing = in.label_smoothing,
        .smoothing_per_class = vocab == 0 ? 0 : in.label_smoothing / double(vocab),
        .to_score = {compute_t<S>(in.logit_scale), compute_t<S>(in.softcap)},
        .z_loss = in.z_loss,
    };
}

// Calls body with the Problem for the dtype of the logits, and for how they become scores.
template <class Body>
void dispatch_problem(const Inputs& in, Body body) {
    dispatch_storage(in.logits, [&](auto storage) {
        using S = decltype(storage);
        if (in.softcap != 0) body(problem<S, Scoring::capped>(in));
        else if (in.logit_scale != 1) body(problem<S, Scoring::scaled>(in));
        else body(problem<S, Scoring::unchanged>(in));
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
            torch::stable::new_empty(logits, counted, ScalarType::Long),
            new_compute_tensor(logits, {})};
}

template <class S>
Output<compute_t<S>> output(const Results& r) {
    using T = compute_t<S>;
    const bool stats = r.correct.numel() > 0;
    return {pointer<T>(r.row_loss),
            pointer<T>(r.lse),
            pointer<T>(r.lse_low),
            stats ? pointer<bool>(r.correct) : nullptr,
            stats ? pointer<T>(r.entropy) : nullptr,
            stats ? pointer<int64_t>(r.argmax) : nullptr};
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

// Sums the class weights where the problem's gradients need it. The memory returned is the sum's.
template <class S, Scoring scoring>
MaybeTensor add_weight_sum(const DeviceContext& context, const Inputs& in, Problem<S, scoring>& p) {
    if (!p.weight || !p.target || p.label_smoothing == 0) return std::nullopt;
    const Tensor sum = torch::stable::new_empty(in.logits, {}, ScalarType::Double);
    launch_sums(sum_class_weights<S, scoring>, context, p.vocab, p, pointer<double>(sum));
    p.weight_sum = pointer<const double>(sum);
    return sum;
}

// The ops

// Needed where the loss is reduced, and where sum_weights has not run.
template <class S, Scoring scoring>
void launch_sum_losses(const DeviceContext& context, const Problem<S, scoring>& p, const Inputs& in,
                       const MaybeTensor& num_items, const Destination<compute_t<S>>& to,
                       bool divisor_known) {
    using T = compute_t<S>;
    launch_sums(sum_losses<S, scoring>, context, p.rows, p, to.rows.loss,
                pointer<const T>(num_items), divisor_known, in.reduction == kReductionMean,
                to.total_weight, to.loss);
}

template <class S, Scoring scoring>
void forward_alone(const DeviceContext& context, const Problem<S, scoring>& p, const Inputs& in,
                   const MaybeTensor& num_items, const Destination<compute_t<S>>& to) {
    launch_rows(forward_rows<S, scoring>, context, p, to.rows);
    launch_sum_losses(context, p, in, num_items, to, false);
}

template <class S, Scoring scoring>
void forward_in_place(const DeviceContext& context, Problem<S, scoring> p, const Inputs& in,
                      const MaybeTensor& num_items, const Destination<compute_t<S>>& to) {
    using T = compute_t<S>;
    const auto weight_sum = add_weight_sum(context, in, p);
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
    launch_sums(sum_weights<S, scoring>, context, p.rows, p, pointer<const T>(num_items),
                to.total_weight, nullptr, nullptr);
    launch_forward_backward(context, p, to.rows, gradient, true);
    if (to.loss) launch_sum_losses(context, p, in, num_items, to, true);
}

Results forward(const Inputs& in, const MaybeTensor& num_items, bool stats, bool in_place) {
    check_numbers("num_items", num_items, in.logits, 1);
    const DeviceContext context(in.logits);
    const bool reduced = in.reduction != kReductionNone;
    Results r = new_results(in.logits, stats);
    dispatch_problem(in, [&]<class S, Scoring scoring>(const Problem<S, scoring>& p) {
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

// nll(Tensor logits, Tensor target, Tensor? weight, Tensor? token_weight, Tensor? num_items,
//     int reduction, SymInt ignore_index, float label_smoothing, float logit_scale, float softcap,
//     float z_loss, bool stats, str backend)
//     -> (Tensor loss, Tensor lse, Tensor lse_low, Tensor total_weight, Tensor correct,
//         Tensor entropy, Tensor argmax)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> nll(
    const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
    const MaybeTensor& token_weight, const MaybeTensor& num_items, int64_t reduction,
    int64_t ignore_index, double label_smoothing, double logit_scale, double softcap, double z_loss,
    bool stats, const std::string&) {
    const Inputs in = checked({logits, target, weight, token_weight, reduction, ignore_index,
                               label_smoothing, logit_scale, softcap, z_loss});
    const Results r = forward(in, num_items, stats, false);
    return {r.loss, r.lse, r.lse_low, r.total_weight, r.correct, r.entropy, r.argmax};
}

// nll_(Tensor(a!) logits, Tensor target, Tensor? weight, Tensor? token_weight, Tensor? num_items,
//      int reduction, SymInt ignore_index, float label_smoothing, float logit_scale, float softcap,
//      float z_loss, bool stats, str backend)
//     -> (Tensor loss, Tensor lse, Tensor total_weight, Tensor correct, Tensor entropy,
//         Tensor argmax)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> nll_(
    const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
    const MaybeTensor& token_weight, const MaybeTensor& num_items, int64_t reduction,
    int64_t ignore_index, double label_smoothing, double logit_scale, double softcap, double z_loss,
    bool stats, const std::string&) {
    const Inputs in = checked({logits, target, weight, token_weight, reduction, ignore_index,
                               label_smoothing, logit_scale, softcap, z_loss});
    const Results r = forward(in, num_items, stats, true);
    Tensor written = logits;
    if (!has_adjacent_columns(logits)) torch::stable::copy_(written, in.logits);
    return {r.loss, r.lse, r.total_weight, r.correct, r.entropy, r.argmax};
}

// nll_backward(Tensor grad_loss, Tensor? grad_lse, Tensor? grad_entropy, Tensor logits,
//              Tensor target, Tensor? weight, Tensor? token_weight, Tensor lse, Tensor lse_low,
//              Tensor? entropy, Tensor total_weight, int reduction, SymInt ignore_index,
//              float label_smoothing, float logit_scale, float softcap, float z_loss, str backend)
//     -> Tensor
Tensor nll_backward(const Tensor& grad_loss, const MaybeTensor& grad_lse,
                    const MaybeTensor& grad_entropy, const Tensor& logits, const Tensor& target,
                    const MaybeTensor& weight, const MaybeTensor& token_weight, const Tensor& lse,
                    const Tensor& lse_low, const MaybeTensor& entropy, const Tensor& total_weight,
                    int64_t reduction, int64_t ignore_index, double label_smoothing,
                    double logit_scale, double softcap, double z_loss, const std::string&) {
    const Inputs in = checked({logits, target, weight, token_weight, reduction, ignore_index,
                               label_smoothing, logit_scale, softcap, z_loss});
    const int64_t rows = logits.size(0);
    check_numbers("grad_loss", grad_loss, logits, rows);
    check_numbers("grad_lse", grad_lse, logits, rows);
    check_numbers("lse", lse, logits, rows);
    check_numbers("lse_low", lse_low, logits, rows);
    check_numbers("total_weight", total_weight, logits, 1);
    check_numbers("grad_entropy", grad_entropy, logits, rows);
    if (grad_entropy) {
        STD_TORCH_CHECK(entropy.has_value(), "entropy: expected what nll returned with stats");
        check_numbers("entropy", entropy, logits, rows);
    }
    const DeviceContext context(logits);
    const Tensor out = torch::stable::new_empty(logits, logits.sizes(), logits.scalar_type());
    // Without classes there is nothing to write. A target distribution then has a null pointer, by
    // which the kernels would take it for absent.
    if (logits.size(1) == 0) return out;
    dispatch_problem(in, [&]<class S, Scoring scoring>(Problem<S, scoring> p) {
        using T = compute_t<S>;
        const auto weight_sum = add_weight_sum(context, in, p);
        const Upstream<T> up = {
            per_row<T>(grad_loss), per_row_or_none<T>(grad_lse), per_row_or_none<T>(grad_entropy),
            reduction == kReductionMean ? pointer<const T>(total_weight) : nullptr};
        const Saved<T> kept = {per_row<T>(lse), per_row<T>(lse_low),
                               grad_entropy ? per_row<T>(*entropy) : PerRow<T>{nullptr, 0}};
        launch_rows(backward_rows<S, scoring>, context, p, up, kept, Formed<T>{nullptr, nullptr},
                    pointer<S>(out));
    });
    return out;
}

// Two adjacent numbers: an upstream, and misses.
void check_remembered(const MaybeTensor& remembered, const Tensor& logits) {
    check_numbers("remembered", remembered, logits, 2);
    STD_TORCH_CHECK(!remembered || (remembered->dim() == 1 && remembered->is_contiguous()),
                    "remembered: expected 2 adjacent numbers");
}

// nll_with_gradient(Tensor logits, Tensor target, Tensor? weight, Tensor? token_weight,
//                   Tensor? num_items, Tensor? remembered, int reduction, SymInt ignore_index,
//                   float label_smoothing, float logit_scale, float softcap, float z_loss,
//                   bool form)
//     -> (Tensor loss, Tensor kept, Tensor gradient)
std::tuple<Tensor, Tensor, Tensor> nll_with_gradient(
    const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
    const MaybeTensor& token_weight, const MaybeTensor& num_items, const MaybeTensor& remembered,
    int64_t reduction, int64_t ignore_index, double label_smoothing, double logit_scale,
    double softcap, double z_loss, bool form) {
    const Inputs in = checked({logits, target, weight, token_weight, reduction, ignore_index,
                               label_smoothing, logit_scale, softcap, z_loss});
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
    dispatch_problem(in, [&]<class S, Scoring scoring>(Problem<S, scoring> p) {
        using T = compute_t<S>;
        const Kept<T> to = kept_numbers<T>(kept, rows);
        const Output<T> out = {to.row_loss, to.lse, to.lse_low, nullptr, nullptr, nullptr};
        const Destination<T> all = {out, to.total_weight, pointer<T>(loss)};
        Gradient<S> g = {};
        MaybeTensor weight_sum;
        if (forms) {
            weight_sum = add_weight_sum(context, in, p);
            g = {
                .first = pointer<S>(gradient),
                .stride = vocab,
                .upstream = to.formed_for,
                .divisor = reduction == kReductionMean ? to.total_weight : nullptr,
                .divide_later = false,  // the upstream is known, with a loss scale that is in it
            };
            launch_sums(sum_weights<S, scoring>, context, p.rows, p, pointer<const T>(num_items),
                        to.total_weight, pointer<const Remembered<T>>(remembered), to.formed_for);
        }
        launch_forward_backward(context, p, out, g, lies_as_new_memory(p));
        launch_sum_losses(context, p, in, num_items, all, forms);
    });
    return {loss, kept, gradient};
}

// nll_gradient_for_(Tensor(a!) gradient, Tensor grad_loss, Tensor kept, Tensor(b!)? remembered,
//                   Tensor logits, Tensor target, Tensor? weight, Tensor? token_weight,
//                   int reduction, SymInt ignore_index, float label_smoothing, float logit_scale,
//                   float softcap, float z_loss, bool formed) -> ()
void nll_gradient_for_(const Tensor& gradient, const Tensor& grad_loss, const Tensor& kept,
                       const MaybeTensor& remembered, const Tensor& logits, const Tensor& target,
                       const MaybeTensor& weight, const MaybeTensor& token_weight,
                       int64_t reduction, int64_t ignore_index, double label_smoothing,
                       double logit_scale, double softcap, double z_loss, bool formed) {
    const Inputs in = checked({logits, target, weight, token_weight, reduction, ignore_index,
                               label_smoothing, logit_scale, softcap, z_loss});
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
    dispatch_problem(in, [&]<class S, Scoring scoring>(Problem<S, scoring> p) {
        using T = compute_t<S>;
        const auto weight_sum = add_weight_sum(context, in, p);
        const Kept<T> from = kept_numbers<T>(kept, rows);
        const Upstream<T> up = {{pointer<const T>(grad_loss), 0},
                                {nullptr, 0},
                                {nullptr, 0},
                                reduction == kReductionMean ? from.total_weight : nullptr};
        // Few blocks where they nearly always have nothing to do.
        const int64_t most = max_blocks(context, formed ? kRowThreads : block_size_for<S>(vocab));
        launch_row_blocks(
            backward_rows<S, scoring>, context, most, p, up,
            Saved<T>{{from.lse, 1}, {from.lse_low, 1}, {nullptr, 0}},
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
        Problem<S, Scoring::unchanged> p = {};
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
