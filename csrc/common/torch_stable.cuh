// What every op's host half needs: torch's tensors by the stable ABI, checks, and launches.
//
// With NEGLOG_EMULATED the same ops are compiled for the CPU, in the namespace neglog_emulated.

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
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/online_softmax.cuh"

namespace neglog {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Launching

#ifdef NEGLOG_EMULATED
#define NEGLOG_IMPL(library) STABLE_TORCH_LIBRARY_IMPL(neglog_emulated, CPU, library)

inline bool on_device(const Tensor& tensor) { return tensor.is_cpu(); }

struct Call {
    explicit Call(const Tensor&) {}
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Call&, int64_t blocks, int threads,
            Arguments... arguments) {
    emulated::launch(unsigned(blocks), unsigned(threads), [&] { kernel(arguments...); });
}

template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), const Call&, int64_t blocks, int threads,
                     int parts, int64_t shared_bytes, Arguments... arguments) {
    emulated::launch_clusters(unsigned(blocks), unsigned(threads), unsigned(parts),
                              size_t(shared_bytes), [&] { kernel(arguments...); });
}

inline bool has_clusters(const Call&) { return true; }
inline int multiprocessors(const Call&) { return 2; }  // so that blocks take several rows in tests
inline int64_t most_dynamic_shared(const Call&) { return 226 << 10; }
#else
#define NEGLOG_IMPL(library) STABLE_TORCH_LIBRARY_IMPL(neglog, CUDA, library)

inline bool on_device(const Tensor& tensor) { return tensor.is_cuda(); }

// The device of a tensor, and its current stream there.
struct Call {
    torch::stable::accelerator::DeviceGuard guard;
    int device;
    cudaStream_t stream;

    explicit Call(const Tensor& tensor)
        : guard(tensor.get_device_index()), device(tensor.get_device_index()) {
        void* current = nullptr;
        TORCH_ERROR_CODE_CHECK(  // the only one that torch 2.10 to 2.12 have
            aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
        stream = static_cast<cudaStream_t>(current);
    }
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Call& call, int64_t blocks, int threads,
            Arguments... arguments) {
    kernel<<<unsigned(blocks), unsigned(threads), 0, call.stream>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
}

inline int device_attribute(const Call& call, cudaDeviceAttr attribute) {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, call.device));
    return value;
}

inline int multiprocessors(const Call& call) {
    return device_attribute(call, cudaDevAttrMultiProcessorCount);
}

inline bool has_clusters(const Call& call) {
    return device_attribute(call, cudaDevAttrComputeCapabilityMajor) >= 9;
}

// What a block may ask for beside the kilobyte that its kernel has at most by itself.
inline int64_t most_dynamic_shared(const Call& call) {
    return device_attribute(call, cudaDevAttrMaxSharedMemoryPerBlockOptin) - (1 << 10);
}

// In clusters of `parts` blocks, each with dynamic shared memory; alone where `parts` is 1. The
// kernel's limit is always set to the same: two threads of the host share it.
template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), const Call& call, int64_t blocks, int threads,
                     int parts, int64_t shared_bytes, Arguments... arguments) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        int(most_dynamic_shared(call))));
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = unsigned(parts);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared_bytes);
    config.stream = call.stream;
    config.attrs = &cluster;
    config.numAttrs = parts > 1;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}
#endif

// Tensors

template <class T>
T* pointer(const Tensor& tensor) {
    return static_cast<T*>(tensor.data_ptr());
}

template <class T>
T* pointer(const MaybeTensor& tensor) {
    return tensor ? pointer<T>(*tensor) : nullptr;
}

inline ScalarType real_dtype(const Tensor& tensor) {
    const bool wide = tensor.scalar_type() == ScalarType::Double;
    return wide ? ScalarType::Double : ScalarType::Float;
}

inline Tensor new_real(const Tensor& like, const std::vector<int64_t>& shape) {
    return torch::stable::new_empty(like, shape, real_dtype(like));
}

inline void check_device(const char* name, const Tensor& tensor, const Tensor& like) {
    STD_TORCH_CHECK(
        on_device(tensor) && tensor.get_device_index() == like.get_device_index(), name,
        ": expected a tensor on the device of the first");
}

// Calls body with a value of the tensor's storage type, for its type.
template <class Body>
void with_storage(const Tensor& tensor, Body body) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float: return body(float());
        case ScalarType::Double: return body(double());
        case ScalarType::BFloat16: return body(__nv_bfloat16());
        case ScalarType::Half: return body(__half());
        default: STD_TORCH_CHECK(false, "expected a float of 16, 32 or 64 bits");
    }
}

}  // namespace neglog
