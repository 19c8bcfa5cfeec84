// The host code that the ops share: tensors through torch's stable ABI, checks of arguments, kernel
// launches.
//
// With NEGLOG_EMULATED the ops are compiled for the CPU, in the namespace neglog_emulated.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifndef NEGLOG_EMULATED
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include <algorithm>
#include <cfloat>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/rows.cuh"

namespace neglog {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Launching

// Of a launch with dynamic shared memory, all but the number of blocks. cluster_blocks is 1 where
// there are no clusters.
struct Grid {
    int threads, cluster_blocks;
    int64_t shared_bytes;
};

#ifdef NEGLOG_EMULATED
#define NEGLOG_IMPL(library) STABLE_TORCH_LIBRARY_IMPL(neglog_emulated, CPU, library)

inline bool on_device(const Tensor& tensor) { return tensor.is_cpu(); }

struct DeviceContext {  // needs nothing on the CPU
    explicit DeviceContext(const Tensor&) {}
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const DeviceContext&, int64_t blocks, int threads,
            Arguments... arguments) {
    emulated::launch(unsigned(blocks), unsigned(threads), [&] { kernel(arguments...); });
}

template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), const DeviceContext&, int64_t blocks,
                     const Grid& grid, Arguments... arguments) {
    emulated::launch_clusters(unsigned(blocks), unsigned(grid.threads),
                              unsigned(grid.cluster_blocks), size_t(grid.shared_bytes),
                              [&] { kernel(arguments...); });
}

// So few that clusters take several rows in the tests.
template <class... Parameters>
int64_t resident_clusters(void (*)(Parameters...), const DeviceContext&, const Grid& grid) {
    return std::max(1, 16 / grid.cluster_blocks);
}

inline bool has_clusters(const DeviceContext&) { return true; }
// So few that blocks take several rows in the tests.
inline int multiprocessor_count(const DeviceContext&) { return 2; }
inline int64_t max_dynamic_shared(const DeviceContext&) { return 226 << 10; }
#else
#define NEGLOG_IMPL(library) STABLE_TORCH_LIBRARY_IMPL(neglog, CUDA, library)

inline bool on_device(const Tensor& tensor) { return tensor.is_cuda(); }

// The device of a tensor, and its current stream there.
struct DeviceContext {
    torch::stable::accelerator::DeviceGuard guard;
    int device;
    cudaStream_t stream;

    explicit DeviceContext(const Tensor& tensor)
        : guard(tensor.get_device_index()), device(tensor.get_device_index()) {
        void* current = nullptr;
        TORCH_ERROR_CODE_CHECK(  // torch 2.10 to 2.12 have no other function for it
            aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
        stream = static_cast<cudaStream_t>(current);
    }
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const DeviceContext& context, int64_t blocks,
            int threads, Arguments... arguments) {
    kernel<<<unsigned(blocks), unsigned(threads), 0, context.stream>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
}

inline int device_attribute(const DeviceContext& context, cudaDeviceAttr attribute) {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, context.device));
    return value;
}

inline int multiprocessor_count(const DeviceContext& context) {
    return device_attribute(context, cudaDevAttrMultiProcessorCount);
}

inline bool has_clusters(const DeviceContext& context) {
    return device_attribute(context, cudaDevAttrComputeCapabilityMajor) >= 9;
}

// The dynamic shared memory that a block may request, beside at most 1 KB of static shared memory.
inline int64_t max_dynamic_shared(const DeviceContext& context) {
    return device_attribute(context, cudaDevAttrMaxSharedMemoryPerBlockOptin) - (1 << 10);
}

// A grid as the launch functions take it. It points to its own attribute, so it is not copied.
struct LaunchConfig {
    cudaLaunchAttribute cluster = {};
    cudaLaunchConfig_t config = {};

    LaunchConfig(const DeviceContext& context, int64_t blocks, const Grid& grid) {
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = unsigned(grid.cluster_blocks);
        cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
        config.gridDim = dim3(unsigned(blocks));
        config.blockDim = dim3(unsigned(grid.threads));
        config.dynamicSmemBytes = size_t(grid.shared_bytes);
        config.stream = context.stream;
        config.attrs = &cluster;
        config.numAttrs = grid.cluster_blocks > 1;
    }
    LaunchConfig(const LaunchConfig&) = delete;
};

constexpr int64_t kUnaskedShared = 46 << 10;  // with 2 KB of static shared memory beside it

// The kernel's limit of dynamic shared memory is always set to the same number, because threads of
// the host share it.
template <class... Parameters>
void allow_dynamic_shared(void (*kernel)(Parameters...), const DeviceContext& context) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        int(max_dynamic_shared(context))));
}

template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), const DeviceContext& context, int64_t blocks,
                     const Grid& grid, Arguments... arguments) {
    if (grid.shared_bytes > kUnaskedShared) allow_dynamic_shared(kernel, context);
    const LaunchConfig launch(context, blocks, grid);
    STD_CUDA_CHECK(cudaLaunchKernelEx(&launch.config, kernel, Parameters(arguments)...));
}

// Clusters that the device runs at once: fewer than its multiprocessors would hold, as those of a
// cluster lie in one group of them. With more, the last would run by themselves. The last answer is
// kept, because to ask takes the host several microseconds.
template <class... Parameters>
int64_t resident_clusters(void (*kernel)(Parameters...), const DeviceContext& context,
                          const Grid& grid) {
    struct Answer {
        void (*kernel)(Parameters...);
        int device, cluster_blocks;
        int64_t shared_bytes;
        int clusters;
    };
    thread_local Answer last = {};
    if (last.kernel == kernel && last.device == context.device &&
        last.cluster_blocks == grid.cluster_blocks && last.shared_bytes == grid.shared_bytes)
        return last.clusters;
    allow_dynamic_shared(kernel, context);
    int clusters = 0;
    if (grid.cluster_blocks > 1) {
        const LaunchConfig launch(context, grid.cluster_blocks, grid);
        STD_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config));
    } else {
        STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
            &clusters, kernel, grid.threads, size_t(grid.shared_bytes)));
        clusters *= multiprocessor_count(context);
    }
    last = {kernel, context.device, grid.cluster_blocks, grid.shared_bytes, std::max(clusters, 1)};
    return last.clusters;
}
#endif

constexpr int kThreadsPerMultiprocessor = 2048;

// As many blocks as the device runs at once, if only their threads are counted.
inline int64_t max_blocks(const DeviceContext& context, int threads) {
    return int64_t(multiprocessor_count(context)) * (kThreadsPerMultiprocessor / threads);
}

// Short rows share a grid of max_blocks: to start a block costs as much as to read 1000 classes.
// Long rows get a block each, else a multiprocessor would idle while the last blocks finish their
// share.
inline int64_t blocks_for_rows(const DeviceContext& context, int64_t rows, int threads) {
    return threads == kRowThreads ? rows : std::min(rows, max_blocks(context, threads));
}

// Tensors

template <class T>
T* pointer(const Tensor& tensor) {
    return static_cast<T*>(tensor.data_ptr());
}

template <class T>
T* pointer(const MaybeTensor& tensor) {
    return tensor ? pointer<T>(*tensor) : nullptr;
}

inline ScalarType compute_dtype(const Tensor& tensor) {
    const bool wide = tensor.scalar_type() == ScalarType::Double;
    return wide ? ScalarType::Double : ScalarType::Float;
}

inline Tensor new_compute_tensor(const Tensor& like, const std::vector<int64_t>& shape) {
    return torch::stable::new_empty(like, shape, compute_dtype(like));
}

inline void check_device(const char* name, const Tensor& tensor, const Tensor& like) {
    STD_TORCH_CHECK(on_device(tensor) && tensor.get_device_index() == like.get_device_index(), name,
                    ": expected a tensor on the device of the first");
}

// A tensor () or (size,), with any stride, of the dtype that is computed in.
inline void check_numbers(const char* name, const MaybeTensor& tensor, const Tensor& like,
                          int64_t size) {
    if (!tensor) return;
    check_device(name, *tensor, like);
    STD_TORCH_CHECK(tensor->scalar_type() == compute_dtype(like), name,
                    ": expected float32, or float64 for float64 logits");
    const bool fits = tensor->dim() == 1 && tensor->size(0) == size;
    STD_TORCH_CHECK(fits || tensor->dim() == 0, name, ": expected ", size, " numbers");
}

inline bool has_adjacent_columns(const Tensor& rows) {
    return rows.stride(1) == 1 || rows.size(1) == 1;
}

inline Tensor with_adjacent_columns(const Tensor& rows) {
    return has_adjacent_columns(rows) ? rows : torch::stable::contiguous(rows);
}

template <class T>
PerRow<T> per_row(const Tensor& tensor) {
    return {pointer<const T>(tensor), tensor.dim() == 0 ? 0 : tensor.stride(0)};
}

template <class T>
PerRow<T> per_row_or_none(const MaybeTensor& tensor) {
    return tensor ? per_row<T>(*tensor) : PerRow<T>{nullptr, 0};
}

// 0 for none. Beyond the range of what is computed in a cap is none: as inf it would make inf * 0.
// One that rounds to 0 would make 0 / 0, so the smallest normal number takes its place.
inline double softcap_of(ScalarType logits, double softcap) {
    const bool wide = logits == ScalarType::Double;
    if (softcap == 0 || softcap > (wide ? DBL_MAX : FLT_MAX)) return 0;
    return std::max(softcap, wide ? DBL_MIN : double(FLT_MIN));
}

// Calls body with a value whose type is that of the tensor's elements.
template <class Body>
void dispatch_storage(const Tensor& tensor, Body body) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float: return body(float());
        case ScalarType::Double: return body(double());
        case ScalarType::BFloat16: return body(__nv_bfloat16());
        case ScalarType::Half: return body(__half());
        default: STD_TORCH_CHECK(false, "expected a float of 16, 32 or 64 bits");
    }
}

}  // namespace neglog
