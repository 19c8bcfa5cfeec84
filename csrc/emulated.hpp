// What the kernels use of CUDA, on the CPU: so that they run, and are tested, where there is no GPU.
//
// (a) Each thread of a block is a fiber. It runs until it must wait, for its block or its warp, and
//     then the next one does; blocks follow one another.
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

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

struct Dimension {
    unsigned x;
};
inline Dimension threadIdx, blockIdx, blockDim, gridDim;

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

using std::exp;
using std::expm1;
using std::fabs;
using std::fmax;
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

struct Fiber {
    ucontext_t start;
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

inline Block* block = nullptr;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "csrc/emulated.hpp: %s in block %u\n", what, blockIdx.x);
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

inline void enter() {
    (*block->body)();
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
    for (Fiber& fiber : block->fibers) fiber.begun = fiber.done = false;
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

inline void launch(unsigned blocks, unsigned threads, const std::function<void()>& body) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
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
    for (unsigned i = 0; i < blocks; ++i) {
        blockIdx.x = reversed ? blocks - 1 - i : i;
        run_block(reversed);
    }
    block = nullptr;
}

}  // namespace neglog::emulated

inline void __syncthreads() { neglog::emulated::wait(neglog::emulated::block->all); }

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
