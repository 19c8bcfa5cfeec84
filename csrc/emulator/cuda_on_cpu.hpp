// The part of CUDA that the kernels use, on the CPU, so that they are tested where there is no GPU.
//
// (a) Each thread of a block is a fiber. It runs until it must wait, for its block or its warp, and
//     then the next one does. Blocks follow one another; those of a cluster run at once, each on a
//     thread of the CPU, whose own memory is the block's shared memory.
// (b) NEGLOG_REVERSED in the environment turns the order round. Code that lacks a barrier, and is
//     right in one order by luck, gives other numbers in the other.
// (c) A barrier that not all threads reach ends the program and says so, where a GPU would hang.
//
// It shows arithmetic, indices, bounds (with -fsanitize=address) and barriers. It does not show
// what happens at once, such as two warps' writes to one place, or what the device's compiler does.

#pragma once

#include <setjmp.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__ static thread_local
#define __launch_bounds__(...)

struct Dimension {
    unsigned x;
};
inline thread_local Dimension threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

using __nv_bfloat16 = c10::BFloat16;
using __half = c10::Half;
using cudaStream_t = void*;

inline float __bfloat162float(__nv_bfloat16 x) { return float(x); }
inline float __half2float(__half x) { return float(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }

namespace neglog::emulated {

// As inexact as the device's may be, and as it 0 below the smallest normal number.
inline float power_of_two(float x) {
    const float y = std::exp2(x);
    uint32_t bits;
    std::memcpy(&bits, &y, sizeof(bits));
    if (std::isfinite(y)) bits &= y < 0x1p-126f ? 0 : ~3u;
    float rounded;
    std::memcpy(&rounded, &bits, sizeof(bits));
    return rounded;
}

}  // namespace neglog::emulated

using std::exp;
using std::expm1;
using std::fabs;
using std::fma;
using std::fmax;
using std::isfinite;
using std::isnan;
using std::log;
using std::log1p;
using std::tanh;

namespace neglog::emulated {

constexpr unsigned kLanesOfWarp = 32;
constexpr size_t kStack = 256 << 10;

// Threads that wait for each other.
struct Group {
    unsigned size = 0, arrived = 0;
    uint64_t generation = 0;
};

struct Copy {
    void* to;
    const void* from;
};

struct Fiber {
    ucontext_t start;
    std::deque<std::vector<Copy>> copies;  // groups, the last of them open
    jmp_buf place;
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool begun = false, done = false;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Group> warps;
    Group all;
    std::vector<uint64_t> slots;  // by thread: what it shows to its warp
    const std::function<void()>* body = nullptr;
    jmp_buf scheduler;
    uint64_t progress = 0;  // arrivals and ends
    int votes = 0;
};

struct Cluster {
    std::barrier<> all;
    std::vector<std::vector<uint4>> dynamic;  // by block: its dynamic shared memory

    Cluster(unsigned blocks, size_t bytes)
        : all(blocks), dynamic(blocks, std::vector<uint4>(bytes / sizeof(uint4) + 1)) {}
};

inline thread_local Block* block = nullptr;
inline thread_local Cluster* cluster = nullptr;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "csrc/emulator/cuda_on_cpu.hpp: %s in block %u\n", what, blockIdx.x);
    std::abort();
}

inline void pause() {
    Fiber& own = block->fibers[threadIdx.x];
    if (_setjmp(own.place) == 0) _longjmp(block->scheduler, 1);
}

inline void wait(Group& group) {
    const uint64_t generation = group.generation;
    ++block->progress;
    if (++group.arrived == group.size) {
        group.arrived = 0;
        ++group.generation;
        return;
    }
    while (group.generation == generation) pause();
}

inline Group& own_warp() { return block->warps[threadIdx.x / kLanesOfWarp]; }

// What `lane` of the own warp shows.
template <class T>
T from_lane(T value, unsigned lane) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    std::memcpy(&block->slots[threadIdx.x], &value, sizeof(T));
    wait(own_warp());
    const unsigned first = threadIdx.x / kLanesOfWarp * kLanesOfWarp;
    std::memcpy(&value, &block->slots[first + lane], sizeof(T));
    wait(own_warp());
    return value;
}

// Nothing is copied before the thread waits for it, and until then there is no number.
inline void copy_async(uint4* to, const uint4* from) {
    std::memset(reinterpret_cast<char*>(to), 0xff, sizeof(uint4));
    block->fibers[threadIdx.x].copies.back().push_back({to, from});
}

inline void end_copy_group() { block->fibers[threadIdx.x].copies.emplace_back(); }

inline void wait_for_copies(unsigned pending) {
    auto& copies = block->fibers[threadIdx.x].copies;
    for (; copies.size() > pending + 1; copies.pop_front())
        for (const Copy& copy : copies.front()) std::memcpy(copy.to, copy.from, sizeof(uint4));
}

// Not inlined: `enter` never returns, and the address sanitizer would take its next use of the stack
// for one of this loop's variables.
[[gnu::noinline]] inline void check_that_copies_came() {
    for (const auto& group : block->fibers[threadIdx.x].copies)
        if (!group.empty()) fail("a copy that nobody waits for");
}

inline void enter() {
    (*block->body)();
    check_that_copies_came();
    block->fibers[threadIdx.x].done = true;
    ++block->progress;
    _longjmp(block->scheduler, 1);
}

// The fiber of threadIdx, until it waits or ends.
inline void resume() {
    Fiber& fiber = block->fibers[threadIdx.x];
    if (_setjmp(block->scheduler) != 0) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    makecontext(&fiber.start, enter, 0);
    setcontext(&fiber.start);
}

inline void run_block(bool reversed) {
    const auto threads = unsigned(block->fibers.size());
    for (Fiber& fiber : block->fibers) {
        fiber.begun = fiber.done = false;
        fiber.copies.assign(1, {});
    }
    unsigned left = threads;
    while (left > 0) {
        const uint64_t before = block->progress;
        left = 0;
        for (unsigned i = 0; i < threads; ++i) {
            threadIdx.x = reversed ? threads - 1 - i : i;
            if (!block->fibers[threadIdx.x].done) resume();
            left += !block->fibers[threadIdx.x].done;
        }
        if (left > 0 && block->progress == before) fail("a barrier that not all threads reach");
    }
}

// Every `step`-th block from `first` on, on this thread of the CPU.
inline void run_blocks(unsigned blocks, unsigned first, unsigned step, unsigned threads,
                       const std::function<void()>& body) {
    if (threads % kLanesOfWarp != 0) fail("a block that is no whole number of warps");
    Block own;
    own.fibers = std::vector<Fiber>(threads);
    own.warps.assign(threads / kLanesOfWarp, Group{kLanesOfWarp});
    own.all.size = threads;
    own.slots.resize(threads);
    own.body = &body;
    block = &own;
    blockDim = {threads};
    gridDim = {blocks};
    const bool reversed = std::getenv("NEGLOG_REVERSED") != nullptr;
    const unsigned count = blocks / step;
    for (unsigned i = 0; i < count; ++i) {
        blockIdx.x = first + (reversed ? count - 1 - i : i) * step;
        if (cluster) {  // what the last block left is not this one's
            auto& memory = cluster->dynamic[first];
            std::memset(memory.data(), 0xff, memory.size() * sizeof(uint4));
            cluster->all.arrive_and_wait();
        }
        run_block(reversed);
    }
    block = nullptr;
}

inline std::mutex one_at_a_time;

inline void launch(unsigned blocks, unsigned threads, const std::function<void()>& body) {
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    run_blocks(blocks, 0, 1, threads, body);
}

inline void launch_clusters(unsigned blocks, unsigned threads, unsigned parts, size_t shared_bytes,
                            const std::function<void()>& body) {
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    Cluster own(parts, shared_bytes);
    std::vector<std::thread> running;
    for (unsigned part = 0; part < parts; ++part)
        running.emplace_back([&, part] {
            cluster = &own;
            run_blocks(blocks, part, parts, threads, body);
        });
    for (std::thread& one : running) one.join();
}

inline uint4* dynamic_shared() {
    return cluster->dynamic[blockIdx.x % cluster->dynamic.size()].data();
}

inline unsigned cluster_size() { return unsigned(cluster->dynamic.size()); }
inline unsigned cluster_rank() { return blockIdx.x % cluster_size(); }

inline void cluster_sync() {
    wait(block->all);
    if (threadIdx.x == 0) cluster->all.arrive_and_wait();
    wait(block->all);
}

// Where another block of the cluster has what this one has at `own`.
template <class T>
T* shared_of_block(T* own, unsigned rank) {
    const auto offset =
        reinterpret_cast<const char*>(own) - reinterpret_cast<const char*>(dynamic_shared());
    return reinterpret_cast<T*>(reinterpret_cast<char*>(cluster->dynamic[rank].data()) + offset);
}

}  // namespace neglog::emulated

inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }

inline void __syncthreads() { neglog::emulated::wait(neglog::emulated::block->all); }

inline uint32_t atomicOr(uint32_t* to, uint32_t bits) {
    const uint32_t before = *to;
    *to |= bits;
    return before;
}

inline int __syncthreads_or(int vote) {
    auto* const block = neglog::emulated::block;
    block->votes += vote != 0;
    __syncthreads();
    const int any = block->votes > 0;
    __syncthreads();
    block->votes = 0;  // by each thread, before any can vote again
    __syncthreads();
    return any;
}

inline int __all_sync(unsigned, int vote) {
    using namespace neglog::emulated;
    block->slots[threadIdx.x] = vote != 0;
    wait(own_warp());
    const unsigned first = threadIdx.x / kLanesOfWarp * kLanesOfWarp;
    int all = 1;
    for (unsigned lane = 0; lane < kLanesOfWarp; ++lane) all &= int(block->slots[first + lane]);
    wait(own_warp());
    return all;
}

inline int __any_sync(unsigned warp, int vote) { return !__all_sync(warp, !vote); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
    return neglog::emulated::from_lane(value, unsigned(lane));
}

template <class T>
T __shfl_down_sync(unsigned, T value, int offset) {
    const unsigned lane = threadIdx.x % neglog::emulated::kLanesOfWarp + unsigned(offset);
    const bool inside = lane < neglog::emulated::kLanesOfWarp;
    return neglog::emulated::from_lane(value, inside ? lane : threadIdx.x % 32);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return neglog::emulated::from_lane(value, threadIdx.x % 32 ^ unsigned(mask));
}
