// Copies from global to shared memory that run while the thread computes, 16 bytes each. A thread
// collects them in groups, and waits for the oldest groups; after that it may read what it has
// copied itself.

#pragma once

#include "common/vector_io.cuh"

namespace neglog {

#ifdef NEGLOG_EMULATED
inline void copy_async(uint4* to, const uint4* from) { emulated::copy_async(to, from); }
inline void end_copy_group() { emulated::end_copy_group(); }

// Until at most `pending` of the groups are under way.
template <int pending>
void wait_for_copies() {
    emulated::wait_for_copies(pending);
}
#else
__device__ inline void copy_async(uint4* to, const uint4* from) {
    const auto shared = unsigned(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}

__device__ inline void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int pending>
__device__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
#endif

}  // namespace neglog
