// The blocks of a thread block cluster, which can read each other's shared memory. Devices before
// sm_90 have no clusters: there each block is a cluster of its own.

#pragma once

#ifndef NEGLOG_EMULATED
#include <cooperative_groups.h>
#endif

#include "common/online_softmax.cuh"

namespace neglog {

#ifdef NEGLOG_EMULATED
#define NEGLOG_DYNAMIC_SHARED(name) uint4* const name = neglog::emulated::dynamic_shared()

inline unsigned cluster_rank() { return emulated::cluster_rank(); }
inline unsigned cluster_size() { return emulated::cluster_size(); }
inline void cluster_sync() { emulated::cluster_sync(); }

// Where the block of that rank has in its shared memory what this block has at `own`.
template <class T>
const T* shared_of_block(const T* own, unsigned rank) {
    return emulated::shared_of_block(own, rank);
}
#else
#define NEGLOG_DYNAMIC_SHARED(name) extern __shared__ uint4 name[]

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ inline unsigned cluster_rank() {
    return cooperative_groups::this_cluster().block_rank();
}
__device__ inline unsigned cluster_size() {
    return cooperative_groups::this_cluster().num_blocks();
}
__device__ inline void cluster_sync() { cooperative_groups::this_cluster().sync(); }

template <class T>
__device__ const T* shared_of_block(const T* own, unsigned rank) {
    return cooperative_groups::this_cluster().map_shared_rank(own, rank);
}
#else
__device__ inline unsigned cluster_rank() { return 0; }
__device__ inline unsigned cluster_size() { return 1; }
__device__ inline void cluster_sync() {}

template <class T>
__device__ const T* shared_of_block(const T* own, unsigned) {
    return own;
}
#endif
#endif

// The states of the cluster's blocks, merged in the order of their ranks: every thread gets the
// same bits. `slot` lies in dynamic shared memory. Two consecutive calls need two different slots,
// else a fast block would overwrite what a slow one still reads.
template <class T>
__device__ SoftmaxState<T> cluster_reduce(const SoftmaxState<T>& own, SoftmaxState<T>* slot) {
    const unsigned blocks = cluster_size();
    if (blocks == 1) return own;
    if (threadIdx.x == 0) *slot = own;
    cluster_sync();
    SoftmaxState<T> total = *shared_of_block(slot, 0);
    for (unsigned rank = 1; rank < blocks; ++rank)
        total = MergeStates{}(total, *shared_of_block(slot, rank));
    return total;
}

}  // namespace neglog
