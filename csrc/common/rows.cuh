// What the kernels share that give each row of a matrix a thread block.

#pragma once

#include "common/online_softmax.cuh"

#undef NDEBUG  // setuptools defines it; without assertions a bad target reads outside the row
#include <cassert>

namespace neglog {

// Vectors that a thread loads before it uses the first, where the row is read again. It then comes
// from a cache, and other blocks compute while this one waits.
constexpr int kLoadsInFlightSecondPass = 1;

// Threads of a block, at most.
constexpr int kRowThreads = 256;

// The smallest block whose threads read the row with all their loads in flight once. It depends on
// the vocabulary and the dtype alone, and so do a row's bits.
template <class S>
inline int block_size_for(int64_t vocab) {
    int threads = kWarpSize;
    while (threads < kRowThreads && int64_t(threads) * kLoadsInFlight<S> * kVectorSize<S> < vocab)
        threads *= 2;
    return threads;
}

// A number for each row, or with stride 0 one number for all.
template <class T>
struct PerRow {
    const T* first;
    int64_t stride;
    __device__ T operator[](int64_t row) const { return first[row * stride]; }
};

}  // namespace neglog
