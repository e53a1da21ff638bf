// SPDX-License-Identifier: Apache-2.0
// Sums and maxima over a warp and over a block of a fixed number of threads; every thread gets the result.
#pragma once

struct Sum {
    template <typename T>
    __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
};

struct Max {
    template <typename T>
    __device__ __forceinline__ T operator()(T a, T b) const { return a > b ? a : b; }
};

template <typename Operation, typename T>
__device__ __forceinline__ T warp_reduce(T value, Operation operation) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        value = operation(value, __shfl_xor_sync(0xffffffffu, value, offset));
    return value;
}

// The order of the additions depends on THREADS alone. Two barriers: the shared words can be used again at once.
template <int THREADS, typename Operation, typename T>
__device__ __forceinline__ T block_reduce(T value, Operation operation) {
    constexpr int NUM_WARPS = THREADS / 32;
    value = warp_reduce(value, operation);
    if constexpr (NUM_WARPS > 1) {
        __shared__ T of_warp[NUM_WARPS];
        if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
        __syncthreads();
        value = of_warp[0];
#pragma unroll
        for (int warp = 1; warp < NUM_WARPS; ++warp) value = operation(value, of_warp[warp]);
        __syncthreads();
    }
    return value;
}

// The sum over the threads before this one. Two barriers, as above.
template <int THREADS, typename T>
__device__ __forceinline__ T block_exclusive_sum(T value) {
    constexpr int NUM_WARPS = THREADS / 32;
    __shared__ T of_warp[NUM_WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    T inclusive = value;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const T below = __shfl_up_sync(0xffffffffu, inclusive, offset);
        if (lane >= offset) inclusive += below;
    }
    if (lane == 31) of_warp[warp] = inclusive;
    __syncthreads();
    T before = inclusive - value;
    for (int other = 0; other < warp; ++other) before += of_warp[other];
    __syncthreads();
    return before;
}
