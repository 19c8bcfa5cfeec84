// The CUDA ops of pairs, the contrastive losses. Similarities of queries (rows) and keys (columns)
// come in tiles, which torch's matmul has computed; python/neglog/ops/pairs goes over the
// tiles.
//
//   neglog::pairs_tile           merges a tile into the log-sum-exps of its rows and columns
//   neglog::pairs_tile_backward  gradient of a tile's scores
//   neglog::pairs_tile_sigmoid   loss by sigmoids (SigLIP) of a tile, with its gradient
//
// The score is z_ij = similarity_ij * scale_i + bias_j. The losses are made in Python from lse_i =
// log(sum_j exp(z_ij)), from the same over columns, and from the positives' scores. The gradient by
// a score is a sum of terms weight * exp(z - lse), see Marginal in cell.cuh. The sigmoid loss of a
// row is sum_j softplus(z_ij), with softplus(-z_ij) for its positive.
//
// (a) A tile is split into cells of 64 rows, so that a cell's states of rows and columns fit in a
//     warp's registers. Cells whose scores are close together take one exp for each score, a warp
//     to a cell (cell_one_exp.cuh). The other cells take one for the row and one for the column, a
//     block to a cell (cell.cuh).
// (b) The sigmoid kernel has a warp to each row, because it needs no number of a column.
// (c) No atomics: cells write their states to memory of their own, and a kernel merges these in one
//     order, so that the same call gives the same bits every time.
// (d) The host never waits for the device: a whole loss can be captured in a CUDA graph.

#include "common/torch_stable.cuh"
#include "pairs/cell_one_exp.cuh"

namespace neglog {
namespace {

// The loss by sigmoids

// log(1 + exp(z)) and its derivative
template <class T>
struct Softplus {
    T value, slope;
};

template <class T>
__device__ Softplus<T> softplus(T z) {
    const T e = exp(-fabs(z));
    return {fmax(z, T(0)) + log1p(e), (z >= 0 ? T(1) : e) / (1 + e)};
}

// A warp to a row. Adds softplus(-z) of the positive and softplus(z) of the other scores to
// loss[row], their derivatives by z to slopes[row], and writes these to `out`. The sum over a
// vector is formed in T, all others in double.
template <class S>
__global__ void __launch_bounds__(kWarpSize* kWarpsPerBlock, 1)
    sigmoid_rows(Tile<S> t, double* loss, double* slopes, S* out, int64_t out_stride) {
    using T = compute_t<S>;
    constexpr int n = kVectorSize<S>;
    const int64_t row = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
    if (row >= t.rows) return;
    double row_loss = 0, row_slopes = 0;
    for (int64_t column = threadIdx.x % kWarpSize * n; column < t.columns;
         column += kWarpSize * n) {
        const auto s = scores_at(t, row, column);
        T grad[n], sum = 0, slope = 0;
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const bool positive = i == s.positive;
            const auto term = softplus(positive ? -s.positive_score : s.z[i]);
            grad[i] = positive ? -term.slope : term.slope;
            sum += term.value;
            slope += grad[i];
        }
        row_loss += sum;
        row_slopes += slope;
        const int count = columns_left(t.columns, column, n);
        store_partial(out + row * out_stride + column, narrowed<S>(grad), count);
    }
    row_loss = warp_sum(row_loss);
    row_slopes = warp_sum(row_slopes);
    if (threadIdx.x % kWarpSize == 0) {
        loss[row] += row_loss;
        slopes[row] += row_slopes;
    }
}

// The ops

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The arguments that the ops share.
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

// A vector or a tensor (), of the dtype that is computed in.
void check_vector_or_number(const char* name, const MaybeTensor& tensor, const Tensor& similarity,
                            int64_t size) {
    const auto dtype = compute_dtype(similarity);
    if (!tensor || tensor->dim() != 0) return check_vector(name, tensor, similarity, size, dtype);
    check_device(name, *tensor, similarity);
    STD_TORCH_CHECK(tensor->scalar_type() == dtype, name, ": unexpected dtype");
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
    check_vector_or_number("scale", in.scale, x, rows);
    check_vector_or_number("bias", in.bias, x, columns);
    check_vector("positive", in.positive, x, rows, ScalarType::Long);
    check_vector("excluded", in.excluded, x, rows, ScalarType::Long);
    check_vector("query_group", in.query_group, x, rows, ScalarType::Long);
    check_vector("key_group", in.key_group, x, columns, ScalarType::Long);
    STD_TORCH_CHECK(bool(in.query_group) == bool(in.key_group), "key_group: expected both or none");
}

template <class S>
Tile<S> tile(const Inputs& in) {
    using T = compute_t<S>;
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

int64_t count_row_blocks(const Tensor& x) { return ceil_div(x.size(0), kCellRows); }

template <class S>
int64_t count_column_blocks(const Tensor& x) {
    return ceil_div(x.size(1), kCellColumns<S>);
}

template <class T>
void merge_states(const DeviceContext& context, const T* maximum, const double* sum, int64_t blocks,
                  int64_t size, const Tensor& state_maximum, const Tensor& state_sum) {
    launch(merge_cells<T>, context, ceil_div(size, kWarpSize), kWarpSize * kMergeWarps, maximum,
           sum, blocks, size, pointer<T>(state_maximum), pointer<double>(state_sum));
}

// One warp to each cell.
template <class... Parameters, class... Arguments>
void launch_warp_per_cell(void (*kernel)(Parameters...), const DeviceContext& context,
                          int64_t cells, Arguments... arguments) {
    launch(kernel, context, ceil_div(cells, kWarpsPerBlock), kWarpSize * kWarpsPerBlock,
           arguments...);
}

// One block to each cell.
template <class... Parameters, class... Arguments>
void launch_block_per_cell(void (*kernel)(Parameters...), const DeviceContext& context,
                           int64_t cells, Arguments... arguments) {
    launch(kernel, context, cells, kWarpSize * kWarpsPerCell, arguments...);
}

// A flag for each cell, which the kernels of cell_one_exp.cuh set; null where they cannot take any
// cell.
MaybeTensor new_cell_done(const Inputs& in, int64_t cells) {
    if (in.bias || in.query_group) return std::nullopt;
    return torch::stable::new_empty(in.similarity, {cells}, ScalarType::Bool);
}

template <class S>
void run_forward(const DeviceContext& context, const Inputs& in, const Tensor& row_maximum,
                 const Tensor& row_sum, const MaybeTensor& column_maximum,
                 const MaybeTensor& column_sum, const MaybeTensor& positive_score) {
    using T = compute_t<S>;
    const Tensor& x = in.similarity;
    const int64_t row_blocks = count_row_blocks(x), column_blocks = count_column_blocks<S>(x);
    const bool with_columns = bool(column_sum);
    const int64_t row_states = column_blocks * x.size(0);
    const int64_t column_states = with_columns ? row_blocks * x.size(1) : 0;
    const Tensor maxima = new_compute_tensor(x, {row_states + column_states});
    const Tensor sums =
        torch::stable::new_empty(x, {row_states + column_states}, ScalarType::Double);
    T* const maximum = pointer<T>(maxima);
    double* const sum = pointer<double>(sums);
    // The columns' states come first, because the memory begins aligned and they are stored as
    // vectors.
    const CellStates<T> cells = {
        .row_blocks = row_blocks,
        .column_blocks = column_blocks,
        .row_maximum = maximum + column_states,
        .row_sum = sum + column_states,
        .column_maximum = with_columns ? maximum : nullptr,
        .column_sum = with_columns ? sum : nullptr,
    };
    const MaybeTensor cell_done = new_cell_done(in, row_blocks * column_blocks);
    if (cell_done)
        launch_warp_per_cell(forward_cells_one_exp<S>, context, row_blocks * column_blocks,
                             tile<S>(in), cells, pointer<bool>(cell_done));
    launch_block_per_cell(forward_cells<S>, context, row_blocks * column_blocks, tile<S>(in), cells,
                          pointer<T>(positive_score), pointer<const bool>(cell_done));
    merge_states(context, cells.row_maximum, cells.row_sum, column_blocks, x.size(0), row_maximum,
                 row_sum);
    if (with_columns)
        merge_states(context, cells.column_maximum, cells.column_sum, row_blocks, x.size(1),
                     *column_maximum, *column_sum);
}

// The schemas are copied from python/neglog/ops/pairs/schema.py, which defines them.

// pairs_tile(Tensor similarity, Tensor scale, Tensor? bias, Tensor? positive, Tensor? excluded,
//            Tensor? query_group, Tensor? key_group, int first_column, Tensor(a!) row_maximum,
//            Tensor(b!) row_sum, Tensor(c!)? column_maximum, Tensor(d!)? column_sum,
//            Tensor(e!)? positive_score) -> ()
void pairs_tile(const Tensor& similarity, const Tensor& scale, const MaybeTensor& bias,
                const MaybeTensor& positive, const MaybeTensor& excluded,
                const MaybeTensor& query_group, const MaybeTensor& key_group, int64_t first_column,
                const Tensor& row_maximum, const Tensor& row_sum, const MaybeTensor& column_maximum,
                const MaybeTensor& column_sum, const MaybeTensor& positive_score) {
    const Inputs in = {similarity, scale,       bias,      positive,
                       excluded,   query_group, key_group, first_column};
    check(in);
    const int64_t rows = similarity.size(0), columns = similarity.size(1);
    const auto dtype = compute_dtype(similarity);
    check_vector("row_maximum", row_maximum, similarity, rows, dtype);
    check_vector("row_sum", row_sum, similarity, rows, ScalarType::Double);
    check_vector("column_maximum", column_maximum, similarity, columns, dtype);
    check_vector("column_sum", column_sum, similarity, columns, ScalarType::Double);
    check_vector("positive_score", positive_score, similarity, rows, dtype);
    STD_TORCH_CHECK(bool(column_maximum) == bool(column_sum),
                    "column_sum: expected it and column_maximum, or neither");
    if (rows == 0 || columns == 0) return;
    const DeviceContext context(similarity);
    dispatch_storage(similarity, [&](auto storage) {
        run_forward<decltype(storage)>(context, in, row_maximum, row_sum, column_maximum,
                                       column_sum, positive_score);
    });
}

template <class T>
Marginal<T> marginal(const MaybeTensor& lse, const MaybeTensor& low,
                     const MaybeTensor& softmax_weight, const MaybeTensor& target_weight) {
    return {pointer<const T>(lse), pointer<const T>(low), pointer<const T>(softmax_weight),
            pointer<const T>(target_weight)};
}

// pairs_tile_backward(Tensor similarity, Tensor scale, Tensor? bias, Tensor? positive,
//                     Tensor? excluded, Tensor? query_group, Tensor? key_group, int first_column,
//                     Tensor row_lse, Tensor row_low, Tensor row_softmax_weight,
//                     Tensor? row_target_weight, Tensor? column_lse, Tensor? column_low,
//                     Tensor? column_softmax_weight, Tensor? column_target_weight,
//                     Tensor? grad_positive_score, Tensor(a!) out) -> ()
void pairs_tile_backward(const Tensor& similarity, const Tensor& scale, const MaybeTensor& bias,
                         const MaybeTensor& positive, const MaybeTensor& excluded,
                         const MaybeTensor& query_group, const MaybeTensor& key_group,
                         int64_t first_column, const Tensor& row_lse, const Tensor& row_low,
                         const Tensor& row_softmax_weight, const MaybeTensor& row_target_weight,
                         const MaybeTensor& column_lse, const MaybeTensor& column_low,
                         const MaybeTensor& column_softmax_weight,
                         const MaybeTensor& column_target_weight,
                         const MaybeTensor& grad_positive_score, const Tensor& out) {
    const Inputs in = {similarity, scale,       bias,      positive,
                       excluded,   query_group, key_group, first_column};
    check(in);
    check_matrix("out", out, similarity);
    const int64_t rows = similarity.size(0), columns = similarity.size(1);
    const auto of_rows = [&](const char* name, const MaybeTensor& x) {
        check_vector(name, x, similarity, rows, compute_dtype(similarity));
    };
    const auto of_columns = [&](const char* name, const MaybeTensor& x) {
        check_vector(name, x, similarity, columns, compute_dtype(similarity));
        STD_TORCH_CHECK(bool(x) == bool(column_lse), name, ": expected all of the columns or none");
    };
    of_rows("row_lse", row_lse);
    of_rows("row_low", row_low);
    of_rows("row_softmax_weight", row_softmax_weight);
    of_rows("row_target_weight", row_target_weight);
    of_columns("column_lse", column_lse);
    of_columns("column_low", column_low);
    of_columns("column_softmax_weight", column_softmax_weight);
    of_rows("column_target_weight", column_target_weight);
    of_rows("grad_positive_score", grad_positive_score);
    if (rows == 0 || columns == 0) return;
    const DeviceContext context(similarity);
    dispatch_storage(similarity, [&](auto storage) {
        using S = decltype(storage);
        using T = compute_t<S>;
        const Gradient<S> g = {
            marginal<T>(row_lse, row_low, row_softmax_weight, row_target_weight),
            marginal<T>(column_lse, column_low, column_softmax_weight, column_target_weight),
            pointer<const T>(grad_positive_score), pointer<S>(out), out.stride(0)};
        const int64_t row_blocks = count_row_blocks(similarity);
        const int64_t column_blocks = count_column_blocks<S>(similarity);
        const MaybeTensor cell_done = new_cell_done(in, row_blocks * column_blocks);
        if (cell_done)
            launch_warp_per_cell(backward_cells_one_exp<S>, context, row_blocks * column_blocks,
                                 tile<S>(in), g, row_blocks, column_blocks,
                                 pointer<bool>(cell_done));
        launch_block_per_cell(backward_cells<S>, context, row_blocks * column_blocks, tile<S>(in),
                              g, column_blocks, pointer<const bool>(cell_done));
    });
}

// pairs_tile_sigmoid(Tensor similarity, Tensor scale, Tensor? bias, Tensor? positive,
//                    Tensor? excluded, Tensor? query_group, Tensor? key_group, int first_column,
//                    Tensor(a!) loss, Tensor(b!) slopes, Tensor(c!) out) -> ()
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
    const DeviceContext context(similarity);
    dispatch_storage(similarity, [&](auto storage) {
        using S = decltype(storage);
        launch(sigmoid_rows<S>, context, ceil_div(rows, kWarpsPerBlock), kWarpSize * kWarpsPerBlock,
               tile<S>(in), pointer<double>(loss), pointer<double>(slopes), pointer<S>(out),
               out.stride(0));
    });
}

}  // namespace
}  // namespace neglog

// STABLE_TORCH_LIBRARY_IMPL of the namespace neglog; the schemas stand above the functions.
NEGLOG_IMPL(m) {
    m.impl("pairs_tile", TORCH_BOX(&neglog::pairs_tile));
    m.impl("pairs_tile_backward", TORCH_BOX(&neglog::pairs_tile_backward));
    m.impl("pairs_tile_sigmoid", TORCH_BOX(&neglog::pairs_tile_sigmoid));
}
