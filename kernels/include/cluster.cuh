// SPDX-License-Identifier: Apache-2.0
// CLUSTER blocks that work together and see each other's shared memory (Hopper and later; elsewhere CLUSTER is 1).
#pragma once
#include "reduce.cuh"

#if CLUSTER > 1
#define CLUSTER_DIMENSIONS __cluster_dims__(CLUSTER, 1, 1)

__device__ __forceinline__ int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// The same shared variable of another block.
template <typename T>
__device__ __forceinline__ T* in_block(T* own, int rank) {
    T* remote;
    asm("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(own), "r"(rank));
    return remote;
}
#else
#define CLUSTER_DIMENSIONS
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
template <typename T>
__device__ __forceinline__ T* in_block(T* own, int) { return own; }
#endif

// Over all threads of the cluster; every thread gets the result.
template <int THREADS, typename Operation, typename T>
__device__ __forceinline__ T cluster_reduce(T value, Operation operation) {
    value = block_reduce<THREADS>(value, operation);
    if constexpr (CLUSTER > 1) {
        __shared__ T of_block;
        if (threadIdx.x == 0) of_block = value;
        cluster_sync();
        value = *in_block(&of_block, 0);
#pragma unroll
        for (int rank = 1; rank < CLUSTER; ++rank) value = operation(value, *in_block(&of_block, rank));
        cluster_sync();
    }
    return value;
}
