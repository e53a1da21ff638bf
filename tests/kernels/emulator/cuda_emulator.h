// SPDX-License-Identifier: Apache-2.0
// Runs this project's CUDA kernels on a CPU, for tests: one fiber a thread, one cluster at a time. Barriers and warp
// exchanges are where a fiber stops until the others have come; a block whose threads wait at different places, or in
// which some have left a warp exchange to the others, is reported as a deadlock. It says nothing about speed,
// and memory is as strongly ordered as a CPU's: races that need a GPU's ordering are for compute-sanitizer.
//
// Shared variables of kernels lie in one section, of which every block of a cluster has a copy that is swapped in while
// the block runs. A block runs until all its threads wait for the cluster, so shared variables of templates, which
// compilers keep out of the section, serve one block after the other; they must not live across a cluster barrier.
//
// This is what kernels are compiled with: few and small headers, since every specialisation pays for them. The
// scheduler is cuda_emulator.cpp.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cstring>
#include <utility>

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

constexpr int EXCHANGED_WORDS = 4;

// What a launch needs to know of one kernel.
struct Kernel {
    void (*body)(void* context);
    void* context;
    char *shared_begin, *shared_end;
};

extern Dimensions grid_dim, block_dim, block_index, thread_index;
extern unsigned char* dynamic_shared;
extern unsigned int current, current_block;  // thread of the cluster, block of the cluster
extern uint64_t* exchanged;                  // [threads, EXCHANGED_WORDS], stable until the warp's next exchange

void wait(State state);
uint64_t* offered();                   // the running thread's words for the next exchange
char* shared_copy(unsigned int rank);  // another block's shared section
int launch(Dimensions grid, Dimensions block, size_t shared_bytes, unsigned int cluster, const Kernel& kernel);

template <typename T>
inline void offer(const T& value) {
    static_assert(sizeof(T) <= EXCHANGED_WORDS * sizeof(uint64_t));
    memcpy(offered(), &value, sizeof(T));
    wait(State::IN_EXCHANGE);
}

template <typename T>
inline T offered_by(unsigned int lane) {
    T value;
    memcpy(&value, &exchanged[EXCHANGED_WORDS * (current / 32 * 32 + lane)], sizeof(T));
    return value;
}

template <typename... Parameters, size_t... Index>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<Index...>) {
    kernel(*static_cast<Parameters*>(arguments[Index])...);
}

template <auto KERNEL, typename... Parameters>
int launch_with(void (*)(Parameters...), void** arguments, const unsigned int* shape, size_t shared_bytes,
                unsigned int cluster) {
    const auto body = [](void* context) {
        call(KERNEL, static_cast<void**>(context), std::index_sequence_for<Parameters...>());
    };
    return launch({shape[0], shape[1], shape[2]}, {shape[3], shape[4], shape[5]}, shared_bytes, cluster,
                  {body, arguments, __start_emulated_shared, __stop_emulated_shared});
}

}  // namespace emulator

#define EXPORT_KERNEL(name)                                                                                     \
    extern "C" int launch_##name(void** arguments, const unsigned int* shape, size_t shared_bytes) {          \
        return emulator::launch_with<name>(name, arguments, shape, shared_bytes, BLOCKS_PER_CLUSTER);           \
    }

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_dim
#define gridDim emulator::grid_dim
#define DYNAMIC_SHARED(name) unsigned char* const name = emulator::dynamic_shared

struct alignas(8) uint2 {
    unsigned int x, y;
};
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

template <typename T>
constexpr T max(T a, T b) {
    return a < b ? b : a;
}
template <typename T>
constexpr T min(T a, T b) {
    return b < a ? b : a;
}

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

// The larger 16-bit halves.
inline unsigned int __vmaxu2(unsigned int a, unsigned int b) { return max(a >> 16, b >> 16) << 16 | max(a & 0xffffu, b & 0xffffu); }
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

inline unsigned int atomicOr(unsigned int* address, unsigned int value) {
    const unsigned int before = *address;
    *address |= value;
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
// Bytes 0-3 of `low` and 4-7 of `high`, picked by the selector's four nibbles.
inline unsigned int __byte_perm(unsigned int low, unsigned int high, unsigned int selector) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    unsigned int picked = 0;
    for (int i = 0; i < 4; ++i) picked |= static_cast<unsigned int>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return picked;
}
