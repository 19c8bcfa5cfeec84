// pairs on CUDA: what one tile of similarities adds to the log-sum-exps of its rows and columns,
// and its gradient; and the loss by sigmoids. The schedules over tiles and the matmuls are those of
// python/neglog/ops/pairs.py and siglip.py.
//
// Compiled for sm_80, sm_90a and sm_100, run on the CPU by emulator/cuda_on_cpu.hpp, not yet on a GPU; no speed
// is claimed. The formulas and the edge cases are those of kernels/pairs.pyx.
//
// (a) A cell whose scores lie close together takes one exp a score (cell_one_exp.cuh); of others the
//     second kernel sees to it (cell.cuh).
// (b) The host never waits, so a whole loss can be captured in a CUDA graph.

#include "pairs/cell_one_exp.cuh"
#include "common/torch_stable.cuh"

namespace neglog {
namespace {

// The loss by sigmoids

template <class T>
struct Softplus {
    T value, slope;
};

template <class T>
__device__ Softplus<T> softplus(T z) {
    const T e = exp(-fabs(z));
    return {fmax(z, T(0)) + log1p(e), (z >= 0 ? T(1) : e) / (1 + e)};
}

// A warp to a row: adds softplus(-z) of the positive and softplus(z) of the others to the row's loss,
// their derivatives to its sum of them, and writes these. Sums of one vector in real, then in double.
template <class S>
__global__ void __launch_bounds__(kWarp* kWarpsOfBlock, 1)
    sigmoid_rows(Tile<S> t, double* loss, double* slopes, S* out, int64_t out_stride) {
    using T = real_of<S>;
    constexpr int n = kLanes<S>;
    const int64_t row = int64_t(blockIdx.x) * kWarpsOfBlock + threadIdx.x / kWarp;
    if (row >= t.rows) return;
    double row_loss = 0, row_slopes = 0;
    for (int64_t column = threadIdx.x % kWarp * n; column < t.columns; column += kWarp * n) {
        const auto s = scores_at(t, row, column);
        T grad[n], sum = 0, slope = 0;
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const bool positive = i == s.positive;
            const auto term = softplus(positive ? -s.score : s.z[i]);
            grad[i] = positive ? -term.slope : term.slope;
            sum += term.value;
            slope += grad[i];
        }
        row_loss += sum;
        row_slopes += slope;
        const int count = columns_from(t.columns, column, n);
        store_some(out + row * out_stride + column, narrowed<S>(grad), count);
    }
    row_loss = warp_sum(row_loss);
    row_slopes = warp_sum(row_slopes);
    if (threadIdx.x % kWarp == 0) {
        loss[row] += row_loss;
        slopes[row] += row_slopes;
    }
}

// The ops

constexpr int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What both ops are given.
struct Inputs {
    Tensor similarity, scale;
    MaybeTensor bias, positive, excluded, query_group, key_group;
    int64_t first_column;
};

void check_vector(const char* name, const MaybeTensor& tensor, const Tensor& similarity,
                  int64_t size, ScalarType dtype) {
    if (!tensor) return;
    check_device(name, *tensor, similarity);
    STD_TORCH_CHECK(tensor->scalar_type() == dtype, name, ": unexpected dtype");
    STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == size, name, ": expected ", size,
                    " numbers");
    STD_TORCH_CHECK(size < 2 || tensor->stride(0) == 1, name, ": expected them adjacent");
}

// As check_vector, or one number in all.
void check_numbers(const char* name, const MaybeTensor& tensor, const Tensor& similarity,
                   int64_t size) {
    const auto real = real_dtype(similarity);
    if (!tensor || tensor->dim() != 0) return check_vector(name, tensor, similarity, size, real);
    check_device(name, *tensor, similarity);
    STD_TORCH_CHECK(tensor->scalar_type() == real, name, ": unexpected dtype");
}

void check_matrix(const char* name, const Tensor& x, const Tensor& similarity) {
    check_device(name, x, similarity);
    STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == similarity.scalar_type(), name,
                    ": expected (rows, columns) of the similarities' dtype");
    const bool same = x.size(0) == similarity.size(0) && x.size(1) == similarity.size(1);
    STD_TORCH_CHECK(same, name, ": expected the similarities' shape");
    STD_TORCH_CHECK(x.stride(1) == 1 || x.size(1) < 2, name, ": expected columns adjacent");
}

void check(const Inputs& in) {
    const Tensor& x = in.similarity;
    check_matrix("similarity", x, x);
    const int64_t rows = x.size(0), columns = x.size(1);
    check_numbers("scale", in.scale, x, rows);
    check_numbers("bias", in.bias, x, columns);
    check_vector("positive", in.positive, x, rows, ScalarType::Long);
    check_vector("excluded", in.excluded, x, rows, ScalarType::Long);
    check_vector("query_group", in.query_group, x, rows, ScalarType::Long);
    check_vector("key_group", in.key_group, x, columns, ScalarType::Long);
    STD_TORCH_CHECK(bool(in.query_group) == bool(in.key_group), "key_group: expected both or none");
}

template <class S>
Tile<S> tile(const Inputs& in) {
    using T = real_of<S>;
    return {
        .rows = in.similarity.size(0),
        .columns = in.similarity.size(1),
        .first_column = in.first_column,
        .similarity = pointer<const S>(in.similarity),
        .stride = in.similarity.stride(0),
        .scale = pointer<const T>(in.scale),
        .scale_stride = in.scale.dim(),
        .bias = pointer<const T>(in.bias),
        .bias_stride = in.bias ? in.bias->dim() : 0,
        .positive = pointer<const int64_t>(in.positive),
        .excluded = pointer<const int64_t>(in.excluded),
        .row_group = pointer<const int64_t>(in.query_group),
        .column_group = pointer<const int64_t>(in.key_group),
    };
}

int64_t row_blocks(const Tensor& x) { return ceiling(x.size(0), kCellRows); }

template <class S>
int64_t column_blocks(const Tensor& x) {
    return ceiling(x.size(1), kCellColumns<S>);
}

template <class T>
void merge(const Call& call, const T* maximum, const double* sum, int64_t blocks, int64_t size,
           const Tensor& state_maximum, const Tensor& state_sum) {
    launch(merge_cells<T>, call, ceiling(size, kWarp), kWarp * kMergers, maximum, sum, blocks, size,
           pointer<T>(state_maximum), pointer<double>(state_sum));
}

// A warp to each cell.
template <class... Parameters, class... Arguments>
void launch_close(void (*kernel)(Parameters...), const Call& call, int64_t cells,
                  Arguments... arguments) {
    launch(kernel, call, ceiling(cells, kWarpsOfBlock), kWarp * kWarpsOfBlock, arguments...);
}

// A block to each cell.
template <class... Parameters, class... Arguments>
void launch_cells(void (*kernel)(Parameters...), const Call& call, int64_t cells,
                  Arguments... arguments) {
    launch(kernel, call, cells, kWarp * kWarpsOfCell, arguments...);
}

// For each cell, whether the quick kernel has done it; null where it would find none.
MaybeTensor new_done(const Inputs& in, int64_t cells) {
    if (in.bias || in.query_group) return std::nullopt;
    return torch::stable::new_empty(in.similarity, {cells}, ScalarType::Bool);
}

template <class S>
void run_forward(const Call& call, const Inputs& in, const Tensor& row_maximum,
                 const Tensor& row_sum, const MaybeTensor& column_maximum,
                 const MaybeTensor& column_sum, const MaybeTensor& score) {
    using T = real_of<S>;
    const Tensor& x = in.similarity;
    const int64_t down = row_blocks(x), across = column_blocks<S>(x);
    const int64_t of_rows = across * x.size(0), of_columns = column_sum ? down * x.size(1) : 0;
    const Tensor maxima = new_real(x, {of_rows + of_columns});
    const Tensor sums = torch::stable::new_empty(x, {of_rows + of_columns}, ScalarType::Double);
    T* const maximum = pointer<T>(maxima);
    double* const sum = pointer<double>(sums);
    const bool both = bool(column_sum);
    // The columns' first, where they are aligned.
    const Cells<T> cells = {down, across, maximum + of_columns, sum + of_columns,
                            both ? maximum : nullptr, both ? sum : nullptr};
    const MaybeTensor done = new_done(in, down * across);
    if (done)
        launch_close(forward_close_cells<S>, call, down * across, tile<S>(in), cells,
                     pointer<bool>(done));
    launch_cells(forward_cells<S>, call, down * across, tile<S>(in), cells, pointer<T>(score),
                 pointer<const bool>(done));
    merge(call, cells.row_maximum, cells.row_sum, across, x.size(0), row_maximum, row_sum);
    if (both)
        merge(call, cells.column_maximum, cells.column_sum, down, x.size(1), *column_maximum,
              *column_sum);
}

void pairs_tile(const Tensor& similarity, const Tensor& scale, const MaybeTensor& bias,
                  const MaybeTensor& positive, const MaybeTensor& excluded,
                  const MaybeTensor& query_group, const MaybeTensor& key_group,
                  int64_t first_column, const Tensor& row_maximum, const Tensor& row_sum,
                  const MaybeTensor& column_maximum, const MaybeTensor& column_sum,
                  const MaybeTensor& score) {
    const Inputs in = {similarity, scale,       bias,      positive,
                       excluded,   query_group, key_group, first_column};
    check(in);
    const int64_t rows = similarity.size(0), columns = similarity.size(1);
    const auto real = real_dtype(similarity);
    check_vector("row_maximum", row_maximum, similarity, rows, real);
    check_vector("row_sum", row_sum, similarity, rows, ScalarType::Double);
    check_vector("column_maximum", column_maximum, similarity, columns, real);
    check_vector("column_sum", column_sum, similarity, columns, ScalarType::Double);
    check_vector("score", score, similarity, rows, real);
    STD_TORCH_CHECK(bool(column_maximum) == bool(column_sum),
                    "column_sum: expected it and column_maximum, or neither");
    if (rows == 0 || columns == 0) return;
    const Call call(similarity);
    with_storage(similarity, [&](auto storage) {
        run_forward<decltype(storage)>(call, in, row_maximum, row_sum, column_maximum, column_sum,
                                       score);
    });
}

template <class T>
Marginal<T> marginal(const MaybeTensor& lse, const MaybeTensor& low, const MaybeTensor& grad,
                     const MaybeTensor& hard) {
    return {pointer<const T>(lse), pointer<const T>(low), pointer<const T>(grad),
            pointer<const T>(hard)};
}

void pairs_tile_backward(const Tensor& similarity, const Tensor& scale, const MaybeTensor& bias,
                           const MaybeTensor& positive, const MaybeTensor& excluded,
                           const MaybeTensor& query_group, const MaybeTensor& key_group,
                           int64_t first_column, const Tensor& row_lse, const Tensor& row_low,
                           const Tensor& row_grad, const MaybeTensor& row_hard,
                           const MaybeTensor& column_lse, const MaybeTensor& column_low,
                           const MaybeTensor& column_grad, const MaybeTensor& column_hard,
                           const MaybeTensor& grad_score, const Tensor& out) {
    const Inputs in = {similarity, scale,       bias,      positive,
                       excluded,   query_group, key_group, first_column};
    check(in);
    check_matrix("out", out, similarity);
    const int64_t rows = similarity.size(0), columns = similarity.size(1);
    const auto of_rows = [&](const char* name, const MaybeTensor& x) {
        check_vector(name, x, similarity, rows, real_dtype(similarity));
    };
    const auto of_columns = [&](const char* name, const MaybeTensor& x) {
        check_vector(name, x, similarity, columns, real_dtype(similarity));
        STD_TORCH_CHECK(bool(x) == bool(column_lse), name, ": expected all of the columns or none");
    };
    of_rows("row_lse", row_lse);
    of_rows("row_low", row_low);
    of_rows("row_grad", row_grad);
    of_rows("row_hard", row_hard);
    of_columns("column_lse", column_lse);
    of_columns("column_low", column_low);
    of_columns("column_grad", column_grad);
    of_rows("column_hard", column_hard);
    of_rows("grad_score", grad_score);
    if (rows == 0 || columns == 0) return;
    const Call call(similarity);
    with_storage(similarity, [&](auto storage) {
        using S = decltype(storage);
        using T = real_of<S>;
        const Gradient<S> g = {
            marginal<T>(row_lse, row_low, row_grad, row_hard),
            marginal<T>(column_lse, column_low, column_grad, column_hard),
            pointer<const T>(grad_score), pointer<S>(out), out.stride(0)};
        const int64_t down = row_blocks(similarity), across = column_blocks<S>(similarity);
        const MaybeTensor done = new_done(in, down * across);
        if (done)
            launch_close(backward_close_cells<S>, call, down * across, tile<S>(in), g, down, across,
                         pointer<bool>(done));
        launch_cells(backward_cells<S>, call, down * across, tile<S>(in), g, across,
                     pointer<const bool>(done));
    });
}

void pairs_tile_sigmoid(const Tensor& similarity, const Tensor& scale, const MaybeTensor& bias,
                          const MaybeTensor& positive, const MaybeTensor& excluded,
                          const MaybeTensor& query_group, const MaybeTensor& key_group,
                          int64_t first_column, const Tensor& loss, const Tensor& slopes,
                          const Tensor& out) {
    const Inputs in = {similarity, scale,       bias,      positive,
                       excluded,   query_group, key_group, first_column};
    check(in);
    check_matrix("out", out, similarity);
    const int64_t rows = similarity.size(0), columns = similarity.size(1);
    check_vector("loss", loss, similarity, rows, ScalarType::Double);
    check_vector("slopes", slopes, similarity, rows, ScalarType::Double);
    if (rows == 0 || columns == 0) return;
    const Call call(similarity);
    with_storage(similarity, [&](auto storage) {
        using S = decltype(storage);
        launch(sigmoid_rows<S>, call, ceiling(rows, kWarpsOfBlock), kWarp * kWarpsOfBlock,
               tile<S>(in), pointer<double>(loss), pointer<double>(slopes), pointer<S>(out),
               out.stride(0));
    });
}

}  // namespace
}  // namespace neglog

NEGLOG_IMPL(m) {
    m.impl("pairs_tile", TORCH_BOX(&neglog::pairs_tile));
    m.impl("pairs_tile_backward", TORCH_BOX(&neglog::pairs_tile_backward));
    m.impl("pairs_tile_sigmoid", TORCH_BOX(&neglog::pairs_tile_sigmoid));
}
