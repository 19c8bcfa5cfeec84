// The blocks of a thread block cluster, which can write to each other's shared memory. Devices before
// sm_90 have no clusters: there each block is a cluster of its own.

#pragma once

#ifndef NEGLOG_EMULATED
#include <cooperative_groups.h>
#endif

#include "common/rows.cuh"

namespace neglog {

#ifdef NEGLOG_EMULATED
#define NEGLOG_DYNAMIC_SHARED(name) uint4* const name = neglog::emulated::dynamic_shared()

inline unsigned cluster_rank() { return emulated::cluster_rank(); }
inline unsigned cluster_size() { return emulated::cluster_size(); }
inline void cluster_sync() { emulated::cluster_sync(); }

// A barrier in shared memory that counts bytes that other blocks send.
struct Mailbox {};

inline void open_mailboxes(Mailbox*, int) {}
inline void expect_bytes(Mailbox*, unsigned) {}
inline void wait_for_mail(Mailbox*, unsigned) { emulated::cluster_sync(); }

// To where the block of that rank has in its dynamic shared memory what this block has at `own`.
template <class T>
void send(const T& x, T* own, Mailbox*, unsigned rank) {
    *emulated::shared_of_block(own, rank) = x;
}
#else
#define NEGLOG_DYNAMIC_SHARED(name) extern __shared__ uint4 name[]

struct alignas(8) Mailbox {
    uint64_t bits;
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ inline unsigned cluster_rank() {
    return cooperative_groups::this_cluster().block_rank();
}
__device__ inline unsigned cluster_size() {
    return cooperative_groups::this_cluster().num_blocks();
}
__device__ inline void cluster_sync() { cooperative_groups::this_cluster().sync(); }

__device__ inline unsigned shared_address(const void* p) {
    return unsigned(__cvta_generic_to_shared(p));
}

__device__ inline unsigned address_in_block(const void* own, unsigned rank) {
    unsigned there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(own)), "r"(rank));
    return there;
}

__device__ inline void open_mailboxes(Mailbox* first, int count) {
    if (threadIdx.x != 0) return;
    for (int i = 0; i < count; ++i)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(first + i))
                     : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// By all threads, before they wait: the bytes of this round.
__device__ inline void expect_bytes(Mailbox* mailbox, unsigned bytes) {
    if (threadIdx.x == 0)
        asm volatile(
            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(mailbox)),
            "r"(bytes)
            : "memory");
}

// round: that of the mailbox, modulo 2.
__device__ inline void wait_for_mail(Mailbox* mailbox, unsigned round) {
    unsigned arrived = 0;
    while (!arrived)
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n"
            "}"
            : "=r"(arrived)
            : "r"(shared_address(mailbox)), "r"(round)
            : "memory");
}

template <class T>
__device__ void send(const T& x, const T* own, const Mailbox* mailbox, unsigned rank) {
    static_assert(sizeof(T) == 8 || sizeof(T) == 16);
    unsigned words[sizeof(T) / 4];
    memcpy(words, &x, sizeof(T));
    const unsigned to = address_in_block(own, rank), box = address_in_block(mailbox, rank);
    if constexpr (sizeof(T) == 8)
        asm volatile(
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::
                "r"(to),
            "r"(words[0]), "r"(words[1]), "r"(box)
            : "memory");
    else
        asm volatile(
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
            "[%5];" ::"r"(to),
            "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(box)
            : "memory");
}
#else
__device__ inline unsigned cluster_rank() { return 0; }
__device__ inline unsigned cluster_size() { return 1; }
__device__ inline void cluster_sync() {}

__device__ inline void open_mailboxes(Mailbox*, int) {}
__device__ inline void expect_bytes(Mailbox*, unsigned) {}
__device__ inline void wait_for_mail(Mailbox*, unsigned) {}
template <class T>
__device__ void send(const T&, const T*, const Mailbox*, unsigned) {}
#endif
#endif

// The place of a block in its cluster. Asked for once: the registers that tell it are slow.
struct Cluster {
    unsigned rank, blocks;
};

__device__ inline Cluster this_cluster() { return {cluster_rank(), cluster_size()}; }

__device__ inline bool is_first_of(const Cluster& cluster) {
    return cluster.rank == 0 && threadIdx.x == 0;
}

constexpr int kMaxClusterSize = 8;  // the largest that every device with clusters supports
constexpr int kStatesOfCluster = kMaxClusterSize * kRowThreads / kWarpSize;

// Merges the softmax states of a cluster's threads. Each warp sends its own to every block of the
// cluster, where each warp merges those of all: every thread gets the same bits. Nobody waits but
// for these states. cluster_sync would wait until gradients that were stored before have arrived.
//
// Consecutive merges use two sets of slots in turn. A warp that is one merge ahead writes to the
// other set; it cannot be two ahead, as it needs this warp's state for that.
template <class T>
class ClusterMerge {
    using State = SoftmaxState<T>;

    const Cluster cluster;
    State* const slots;
    Mailbox* const mailboxes;
    unsigned merges = 0;

public:
    // All threads of the cluster. slots: 2 kStatesOfCluster in dynamic shared memory. mailboxes: 2 in
    // static shared memory.
    __device__ ClusterMerge(const Cluster& cluster, State* slots, Mailbox* mailboxes)
        : cluster(cluster), slots(slots), mailboxes(mailboxes) {
        if (cluster.blocks == 1) return;
        open_mailboxes(mailboxes, 2);
        cluster_sync();  // nobody may send to a block that has not begun
    }

    __device__ State operator()(const State& own) {
        const unsigned warps = blockDim.x / kWarpSize, warp = threadIdx.x / kWarpSize;
        const unsigned lane = threadIdx.x % kWarpSize, set = merges % 2;
        const State of_warp = warp_merge(own);
        State* const first = slots + set * kStatesOfCluster;
        if (cluster.blocks == 1) {
            if (lane == 0) first[warp] = of_warp;
            __syncthreads();
        } else {
            Mailbox* const mailbox = mailboxes + set;
            expect_bytes(mailbox, warps * cluster.blocks * unsigned(sizeof(State)));
            if (lane < cluster.blocks)
                send(of_warp, first + cluster.rank * warps + warp, mailbox, lane);
            wait_for_mail(mailbox, merges / 2 % 2);
        }
        ++merges;
        const int count = int(warps * cluster.blocks);
        const State mine = state_of_lane(first, count);
        if (count <= kWarpSize) return warp_merge(mine);
        return warp_merge(mine, state_of_lane(first, count, kWarpSize));
    }
};

}  // namespace neglog
