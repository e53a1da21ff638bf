// SPDX-License-Identifier: Apache-2.0
// Runs this project's CUDA kernels on a CPU, for tests: one fiber a thread, one cluster at a time. Barriers and warp
// exchanges are where a fiber stops until the others have come; a block whose threads wait at different places, or in
// which some have left a warp exchange to the others, is reported as a deadlock. It says nothing about speed,
// and memory is as strongly ordered as a CPU's: races that need a GPU's ordering are for compute-sanitizer.
//
// Shared variables of kernels lie in one section, of which every block of a cluster has a copy that is swapped in while
// the block runs. A block runs until all its threads wait for the cluster, so shared variables of templates, which
// compilers keep out of the section, serve one block after the other; they must not live across a cluster barrier.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("emulated_shared")))

struct Dimensions {
    unsigned int x, y, z;
};

extern "C" {
extern char __start_emulated_shared[] __attribute__((weak));
extern char __stop_emulated_shared[] __attribute__((weak));
}

namespace emulator {

enum class State { READY, AT_BARRIER, AT_CLUSTER, IN_EXCHANGE, DONE };

struct Fiber {
    ucontext_t start;
    jmp_buf place;
    bool has_started;
    std::unique_ptr<char[]> stack;
    State state;
    uint64_t offered[4];
};

constexpr size_t STACK_BYTES = 128 * 1024;

inline Dimensions grid_dim, block_dim, block_index, thread_index;
inline unsigned char* dynamic_shared = nullptr;
inline std::vector<Fiber> fibers;
inline std::vector<uint64_t> exchanged;  // [threads, 4], stable until the warp's next exchange
inline jmp_buf scheduler;
inline unsigned int current, current_block;
inline std::vector<std::vector<char>> shared_of_block;
inline const std::function<void()>* body;

// swapcontext would do for every switch, but it saves the signal mask with a system call each time.
inline void wait(State state) {
    fibers[current].state = state;
    if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler, 1);
}

inline void run_fiber() {
    (*body)();
    fibers[current].state = State::DONE;
    _longjmp(scheduler, 1);
}

inline void resume(Fiber& fiber) {
    if (_setjmp(scheduler) != 0) return;
    if (fiber.has_started) _longjmp(fiber.place, 1);
    fiber.has_started = true;
    setcontext(&fiber.start);
}

inline bool all_in(unsigned int first, unsigned int end, State state) {
    bool any = false;
    for (unsigned int i = first; i < end; ++i) {
        if (fibers[i].state != state && fibers[i].state != State::DONE) return false;
        any = any || fibers[i].state == state;
    }
    return any;
}

inline void release(unsigned int first, unsigned int end, State state) {
    for (unsigned int i = first; i < end; ++i) {
        if (fibers[i].state != state) continue;
        if (state == State::IN_EXCHANGE) std::copy_n(fibers[i].offered, 4, &exchanged[4 * i]);
        fibers[i].state = State::READY;
    }
}

// Lets the threads from `first` to `end`, one block, go on as far as they can without another block.
inline void run_block(unsigned int first, unsigned int end) {
    for (bool progress = true; progress;) {
        progress = false;
        for (current = first; current < end; ++current) {
            if (fibers[current].state != State::READY) continue;
            const unsigned int thread = current - first;
            thread_index = {thread % block_dim.x, thread / block_dim.x % block_dim.y, thread / block_dim.x / block_dim.y};
            resume(fibers[current]);
            progress = true;
        }
        for (unsigned int warp = first; warp < end; warp += 32) {
            const unsigned int last = std::min(warp + 32, end);
            if (all_in(warp, last, State::IN_EXCHANGE)) release(warp, last, State::IN_EXCHANGE), progress = true;
        }
        if (all_in(first, end, State::AT_BARRIER)) release(first, end, State::AT_BARRIER), progress = true;
    }
}

inline size_t section_bytes() { return __stop_emulated_shared - __start_emulated_shared; }

// False when the cluster's threads wait for each other in vain.
inline bool run_cluster(unsigned int index, unsigned int num_blocks, unsigned int num_threads) {
    const unsigned int count = num_blocks * num_threads;
    for (;;) {
        for (current_block = 0; current_block < num_blocks; ++current_block) {
            const unsigned int block = index + current_block;
            block_index = {block % grid_dim.x, block / grid_dim.x % grid_dim.y, block / grid_dim.x / grid_dim.y};
            auto& shared = shared_of_block[current_block];
            std::copy(shared.begin(), shared.end(), __start_emulated_shared);
            run_block(current_block * num_threads, (current_block + 1) * num_threads);
            std::copy(__start_emulated_shared, __stop_emulated_shared, shared.begin());
        }
        if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return fiber.state == State::DONE; }))
            return true;
        if (!all_in(0, count, State::AT_CLUSTER)) return false;
        release(0, count, State::AT_CLUSTER);
    }
}

inline void start(Fiber& fiber) {
    if (!fiber.stack) fiber.stack.reset(new char[STACK_BYTES]);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = STACK_BYTES;
    makecontext(&fiber.start, run_fiber, 0);
    fiber.has_started = false;
    fiber.state = State::READY;
}

// 0 when every block finished, 1 when one could not.
inline int launch(Dimensions grid, Dimensions block, size_t shared_bytes, unsigned int cluster,
                  const std::function<void()>& kernel) {
    const unsigned int num_threads = block.x * block.y * block.z;
    std::vector<unsigned char> dynamic(shared_bytes + 128, 0xA5);
    dynamic_shared = dynamic.data() + (128 - reinterpret_cast<uintptr_t>(dynamic.data()) % 128);
    grid_dim = grid, block_dim = block, body = &kernel;
    fibers.resize(cluster * num_threads);
    exchanged.resize(4 * fibers.size());
    for (unsigned int index = 0; index < grid.x * grid.y * grid.z; index += cluster) {
        shared_of_block.assign(cluster, std::vector<char>(section_bytes(), 0x5A));
        for (auto& fiber : fibers) start(fiber);
        if (!run_cluster(index, cluster, num_threads)) return 1;
    }
    return 0;
}

template <typename T>
inline void offer(const T& value) {
    static_assert(sizeof(T) <= sizeof(Fiber::offered));
    std::memcpy(fibers[current].offered, &value, sizeof(T));
    wait(State::IN_EXCHANGE);
}

template <typename T>
inline T offered_by(unsigned int lane) {
    T value;
    std::memcpy(&value, &exchanged[4 * (current / 32 * 32 + lane)], sizeof(T));
    return value;
}

template <typename... Parameters, size_t... Index>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<Index...>) {
    kernel(*static_cast<Parameters*>(arguments[Index])...);
}

template <typename... Parameters>
int launch_with(void (*kernel)(Parameters...), void** arguments, const unsigned int* shape, size_t shared_bytes,
                unsigned int cluster) {
    return launch({shape[0], shape[1], shape[2]}, {shape[3], shape[4], shape[5]}, shared_bytes, cluster,
                  [&] { call(kernel, arguments, std::index_sequence_for<Parameters...>()); });
}

}  // namespace emulator

#define EXPORT_KERNEL(name)                                                                            \
    extern "C" int launch_##name(void** arguments, const unsigned int* shape, size_t shared_bytes) { \
        return emulator::launch_with(name, arguments, shape, shared_bytes, BLOCKS_PER_CLUSTER);        \
    }

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_dim
#define gridDim emulator::grid_dim
#define DYNAMIC_SHARED(name) unsigned char* const name = emulator::dynamic_shared

struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned int x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned int x, unsigned int y, unsigned int z, unsigned int w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using std::max;
using std::min;

inline void __syncthreads() { emulator::wait(emulator::State::AT_BARRIER); }
inline void __syncwarp(unsigned int = 0xffffffffu) { emulator::offer(0); }

template <typename T>
T __shfl_xor_sync(unsigned int, T value, int mask) {
    emulator::offer(value);
    return emulator::offered_by<T>((emulator::current % 32) ^ mask);
}

template <typename T>
T __shfl_up_sync(unsigned int, T value, unsigned int offset) {
    emulator::offer(value);
    const unsigned int lane = emulator::current % 32;
    return emulator::offered_by<T>(lane < offset ? lane : lane - offset);
}

template <typename T>
T __shfl_sync(unsigned int, T value, int lane) {
    emulator::offer(value);
    return emulator::offered_by<T>(lane % 32);
}

template <typename T>
unsigned int __match_any_sync(unsigned int, T value) {
    emulator::offer(value);
    unsigned int equal = 0;
    for (unsigned int lane = 0; lane < 32; ++lane) equal |= (emulator::offered_by<T>(lane) == value) << lane;
    return equal;
}

inline bool __all_sync(unsigned int, bool value) {
    emulator::offer(value);
    bool all = true;
    for (unsigned int lane = 0; lane < 32; ++lane) all = all && emulator::offered_by<bool>(lane);
    return all;
}

inline int __popc(unsigned int bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline unsigned int __reduce_max_sync(unsigned int, unsigned int value) {
    emulator::offer(value);
    unsigned int largest = 0;
    for (unsigned int lane = 0; lane < 32; ++lane) largest = max(largest, emulator::offered_by<unsigned int>(lane));
    return largest;
}

template <typename T>
T atomicAdd(T* address, T value) {
    const T before = *address;
    *address += value;
    return before;
}

inline unsigned int __umulhi(unsigned int a, unsigned int b) { return static_cast<uint64_t>(a) * b >> 32; }
inline unsigned int __float2uint_rn(float x) { return static_cast<unsigned int>(rintf(x)); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __expf(float x) { return expf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

template <typename To, typename From>
To reinterpret_bits(From from) {
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}
inline unsigned int __float_as_uint(float value) { return reinterpret_bits<unsigned int>(value); }
inline float __uint_as_float(unsigned int bits) { return reinterpret_bits<float>(bits); }
inline float __int_as_float(int bits) { return reinterpret_bits<float>(bits); }
