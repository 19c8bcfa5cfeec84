// The CUDA op of kl, a student's distributions against a teacher's:
//
//   neglog::kl_rows  the loss of each row, its two parts, and where `gradient` is given the gradient
//                    of the logits, written there; it may be the logits
//
// row.cuh has the formulas, divergence.cuh those of the divergence, and named.cuh a teacher of named
// classes.
//
// (a) A thread block computes a whole row, and the grid strides over the rows, as in csrc/nll.
// (b) There are two kernels for each dtype of the logits, one for each kind of teacher. The
//     teacher's dtype, the divergence and the options are tested at run time: several exps and logs
//     for each class take longer than these branches, which all threads take alike.
// (c) No atomics but on bits of a block's own bitmap, whose result depends on no order. The same
//     call gives the same bits every time.
// (d) The host never waits for the device. A target or id out of range, a class named twice, and
//     log-probabilities that sum to more than 1 fail a device-side assertion, as torch's targets do.

#include "common/torch_stable.cuh"
#include "kl/named.cuh"

namespace neglog {
namespace {

// Blocks that a multiprocessor's registers must hold. On sm_100 nvcc takes more registers, and they
// spill with two.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <class S>
constexpr int kMinBlocks = 1;
#else
template <class S>
constexpr int kMinBlocks = sizeof(S) == 8 ? 1 : 2;
#endif

template <class T>
__device__ void write_losses(const Output<T>& o, int64_t row, double loss, double divergence,
                             double cross_entropy) {
    if (threadIdx.x != 0) return;
    o.loss[row] = T(loss);
    o.divergence[row] = T(divergence);
    o.cross_entropy[row] = T(cross_entropy);
}

// 0 for a weight of 0, even where the value is not finite.
__device__ inline double weighted(double weight, double value) {
    return weight == 0 ? 0 : weight * value;
}

template <class Row, class S>
__device__ void compare_row(const Problem<S>& p, const Output<compute_t<S>>& o,
                            const Gradient<S>& g, int64_t row) {
    using T = compute_t<S>;
    const bool has_hard = p.hard_weight != 0;
    const int64_t target = p.target[row];
    assert(!has_hard || (target >= 0 && target < p.vocab));
    const T target_z = has_hard ? score_at(p, row, target) : T(0);  // the gradient may overwrite it
    Row taught(p, row);
    const Lse<T> of_hard = taught.find_sums();
    const auto soft = p.soft_weight != 0 ? taught.divergence() : Divergence{0, 0};
    const T target_log_p = log_probability(target_z, of_hard);
    const double hard = has_hard ? -double(target_log_p) : 0;
    const double token_weight = token_weight_of(p, row);
    const double loss = weighted(p.soft_weight, soft.value) + weighted(p.hard_weight, hard);
    write_losses(o, row, token_weight * loss, soft.value, hard);
    if (!g.first) return;
    const double upstream = token_weight * (g.upstream.first ? g.upstream[row] : T(1));
    const Factors<T> f = {
        .soft_scale = T(upstream * p.soft_weight / p.temperature),
        .hard_scale = T(upstream * p.hard_weight),
        .of_hard = of_hard,
        .target = target,
        .target_slope = expm1(target_log_p),
    };
    __syncthreads();  // all threads have read what the gradient may now overwrite
    taught.write_gradient(soft, f, g.first + row * g.stride);
}

template <class Row, class S>
__global__ void __launch_bounds__(kRowThreads, kMinBlocks<S>)
    compare_rows(Problem<S> p, Output<compute_t<S>> o, Gradient<S> g) {
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
        if (!is_ignored(p, row)) {
            compare_row<Row>(p, o, g, row);
            continue;
        }
        write_losses(o, row, 0, 0, 0);
        if (g.first) zero_row(g.first + row * g.stride, p.vocab);
    }
}

// The op

struct Inputs {
    Tensor logits, teacher;
    MaybeTensor ids;
    Tensor target;
    MaybeTensor token_weight, grad, gradient;
    int64_t ignore_index;
    bool probabilities;
    double beta, temperature, soft_weight, hard_weight;
    double logit_scale, softcap, teacher_scale, teacher_softcap;
};

void check_rows(const char* name, const Tensor& tensor, const Tensor& logits, int64_t columns) {
    check_device(name, tensor, logits);
    STD_TORCH_CHECK(
        tensor.dim() == 2 && tensor.size(0) == logits.size(0) && tensor.size(1) == columns, name,
        ": expected ", logits.size(0), " rows of ", columns, " numbers");
}

// The arguments with columns adjacent in memory. Checks what a kernel would misread; the Python
// functions that call the op raise the errors meant for users.
Inputs checked(const Inputs& in) {
    const Tensor& logits = in.logits;
    STD_TORCH_CHECK(on_device(logits) && logits.dim() == 2, "logits: expected (N, V) on CUDA");
    const int64_t rows = logits.size(0), vocab = logits.size(1);
    const bool named = in.ids.has_value();
    STD_TORCH_CHECK(!named || in.ids->dim() == 2, "ids: expected (N, K)");
    const int64_t columns = named ? in.ids->size(1) : vocab;
    check_rows("teacher", in.teacher, logits, columns);
    if (named) {
        check_rows("ids", *in.ids, logits, columns);
        STD_TORCH_CHECK(in.ids->scalar_type() == ScalarType::Long, "ids: expected int64");
    }
    check_device("target", in.target, logits);
    STD_TORCH_CHECK(in.target.dim() == 1 && in.target.size(0) == rows &&
                        in.target.scalar_type() == ScalarType::Long,
                    "target: expected ", rows, " numbers of int64");
    check_numbers("token_weight", in.token_weight, logits, rows);
    STD_TORCH_CHECK(!in.token_weight || in.token_weight->dim() == 1, "token_weight: expected (N,)");
    check_numbers("grad", in.grad, logits, rows);
    if (in.gradient) {
        check_rows("gradient", *in.gradient, logits, vocab);
        STD_TORCH_CHECK(in.gradient->scalar_type() == logits.scalar_type() &&
                            has_adjacent_columns(*in.gradient),
                        "gradient: expected the logits' dtype, and columns adjacent in memory");
    }
    Inputs ready = in;
    ready.logits = with_adjacent_columns(logits);
    ready.teacher = with_adjacent_columns(in.teacher);
    if (named) ready.ids = with_adjacent_columns(*in.ids);
    ready.softcap = softcap_of(logits.scalar_type(), in.softcap);
    ready.teacher_softcap = softcap_of(logits.scalar_type(), in.teacher_softcap);
    return ready;
}

DType dtype_of(const Tensor& tensor) {
    DType found = DType::float32;
    dispatch_storage(tensor, [&](auto storage) {
        using M = decltype(storage);
        if (std::is_same_v<M, double>) found = DType::float64;
        if (std::is_same_v<M, __nv_bfloat16>) found = DType::bfloat16;
        if (std::is_same_v<M, __half>) found = DType::float16;
    });
    return found;
}

template <class S>
Problem<S> problem(const Inputs& in) {
    using T = compute_t<S>;
    const Kind kind = in.beta == 0 ? Kind::forward : in.beta == 1 ? Kind::reverse : Kind::between;
    return {
        .rows = in.logits.size(0),
        .vocab = in.logits.size(1),
        .logits = pointer<const S>(in.logits),
        .logits_stride = in.logits.stride(0),
        .teacher = {pointer<const void>(in.teacher), in.teacher.stride(0), dtype_of(in.teacher),
                    in.probabilities},
        .ids = pointer<const int64_t>(in.ids),
        .ids_stride = in.ids ? in.ids->stride(0) : 0,
        .count = in.ids ? in.ids->size(1) : 0,
        .target = per_row<int64_t>(in.target),
        .token_weight = per_row_or_none<T>(in.token_weight),
        .ignore_index = in.ignore_index,
        .measure = {kind, in.beta},
        .to_score = {T(in.logit_scale), T(in.softcap)},
        .to_teacher_score = {T(in.teacher_scale), T(in.teacher_softcap)},
        .inverse_temperature = T(1 / in.temperature),
        .temperature = in.temperature,
        .soft_weight = in.soft_weight,
        .hard_weight = in.hard_weight,
        .has_hard_sum = in.hard_weight != 0 && (in.temperature != 1 || in.ids),
    };
}

template <class S>
Gradient<S> gradient_of(const Inputs& in) {
    return {pointer<S>(in.gradient), in.gradient ? in.gradient->stride(0) : 0,
            per_row_or_none<compute_t<S>>(in.grad)};
}

template <class S>
void compare(const DeviceContext& context, const Problem<S>& p, const Output<compute_t<S>>& o,
             const Gradient<S>& g) {
    const int threads = block_size_for<S>(p.vocab);
    const int64_t blocks = blocks_for_rows(context, p.rows, threads);
    if (!p.ids) {
        launch(compare_rows<ScoredRow<S>, S>, context, blocks, threads, p, o, g);
        return;
    }
    const int64_t bytes = named_bytes<compute_t<S>>(p.vocab, p.count);
    const int64_t limit = max_dynamic_shared(context);
    STD_TORCH_CHECK(bytes <= limit, "ids: ", p.count, " of ", p.vocab, " classes need ", bytes,
                    " bytes of shared memory, and the device has ", limit);
    launch_clusters(compare_rows<NamedRow<S>, S>, context, blocks, Grid{threads, 1, bytes}, p, o,
                    g);
}

// The schema is copied from python/neglog/ops/kl/schema.py, which defines it.

// kl_rows(Tensor logits, Tensor teacher, Tensor? ids, Tensor target, Tensor? token_weight,
//         Tensor? grad, Tensor(a!)? gradient, SymInt ignore_index, bool probabilities, float beta,
//         float temperature, float soft_weight, float hard_weight, float logit_scale,
//         float softcap, float teacher_scale, float teacher_softcap)
//     -> (Tensor loss, Tensor divergence, Tensor cross_entropy)
std::tuple<Tensor, Tensor, Tensor> kl_rows(const Tensor& logits, const Tensor& teacher,
                                           const MaybeTensor& ids, const Tensor& target,
                                           const MaybeTensor& token_weight, const MaybeTensor& grad,
                                           const MaybeTensor& gradient, int64_t ignore_index,
                                           bool probabilities, double beta, double temperature,
                                           double soft_weight, double hard_weight,
                                           double logit_scale, double softcap, double teacher_scale,
                                           double teacher_softcap) {
    const Inputs in = checked({logits, teacher, ids, target, token_weight, grad, gradient,
                               ignore_index, probabilities, beta, temperature, soft_weight,
                               hard_weight, logit_scale, softcap, teacher_scale, teacher_softcap});
    const std::vector<int64_t> rows{logits.size(0)};
    const Tensor loss = new_compute_tensor(logits, rows);
    const Tensor divergence = new_compute_tensor(logits, rows);
    const Tensor cross_entropy = new_compute_tensor(logits, rows);
    const DeviceContext context(logits);
    dispatch_storage(logits, [&](auto storage) {
        using S = decltype(storage);
        using T = compute_t<S>;
        const auto p = problem<S>(in);
        const Output<T> o = {pointer<T>(loss), pointer<T>(divergence), pointer<T>(cross_entropy)};
        if (p.rows != 0) compare(context, p, o, gradient_of<S>(in));
    });
    return {loss, divergence, cross_entropy};
}

}  // namespace
}  // namespace neglog

// STABLE_TORCH_LIBRARY_IMPL of the namespace neglog; the schema stands above the function.
NEGLOG_IMPL(m) { m.impl("kl_rows", TORCH_BOX(&neglog::kl_rows)); }
