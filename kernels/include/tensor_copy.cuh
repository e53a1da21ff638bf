// SPDX-License-Identifier: Apache-2.0
// Hopper's copy engine for tensors: one thread copies a box of a matrix between global and shared memory, asynchronously, with the
// 128-byte swizzle of warpgroup.cuh, to one block or to several of a cluster. PTX ISA, "Data Movement and Conversion: Tensor copy".
// What lies outside the matrix is read as zeros and not written. Needs sm_90a.
#pragma once

// A matrix in global memory and the box that a copy moves, as cuTensorMapEncodeTiled encodes them (kernels/tensor_map.py).
struct alignas(64) TensorMap {
    unsigned char opaque[128];
};

__device__ __forceinline__ void prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Declares that this phase of `barrier` completes once `num_bytes` have arrived, and arrives.
__device__ __forceinline__ void barrier_arrive_expecting(unsigned barrier, int num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(num_bytes) : "memory");
}

// Arrives at the barrier that lies in block `rank` of the cluster where `barrier` lies in this one. Orders what this thread's own block sees only:
// it says that shared memory has been read, and release at the cluster's scope is a fence of the whole GPU.
__device__ __forceinline__ void barrier_arrive_in_block(unsigned barrier, int rank) {
    asm volatile(
        "{ .reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(barrier), "r"(rank)
        : "memory");
}

// Barriers that were initialised become visible to the cluster's other blocks and to copies.
__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// The box at (column, row) to `destination`; `barrier` counts its bytes.
__device__ __forceinline__ void copy_box(unsigned destination, const TensorMap& from, int column, int row, unsigned barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(destination),
                 "l"(&from), "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}

// The same to all blocks whose bits are set in `blocks`, at the same place in each, counted by each one's barrier.
__device__ __forceinline__ void copy_box_to_blocks(
    unsigned destination, const TensorMap& from, int column, int row, unsigned barrier, unsigned short blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(
            destination),
        "l"(&from), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
        : "memory");
}

// The box from shared memory, whose writes a fence has made visible to the engine.
__device__ __forceinline__ void store_box(const TensorMap& to, int column, int row, unsigned source) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&to), "r"(column), "r"(row), "r"(source)
                 : "memory");
}
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until the engine has read what this thread's stores take from shared memory.
__device__ __forceinline__ void wait_until_stores_have_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void wait_for_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Four 8x8 matrices of 16-bit elements to shared memory; thread i of the warp gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void store_matrices(unsigned address, unsigned a, unsigned b, unsigned c, unsigned d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
