// SPDX-License-Identifier: Apache-2.0
// One warp's matrix product on tensor cores: d [16, 8] += a [16, 16] * b [16, 8], float32 accumulators.
// With g = lane / 4 and t = lane % 4 (PTX ISA, mma.m16n8k16): a = {(g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)},
// b = {(2t, g), (2t + 8, g)}, each a pair of neighbours along k; d = {(g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)}.
#pragma once
#include "dtype.cuh"

__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2], __half) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2], __nv_bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// a * b + c in both halves of a word, rounded once.
__device__ __forceinline__ uint32 fma_pair(uint32 a, uint32 b, uint32 c, __half) {
    uint32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

__device__ __forceinline__ uint32 fma_pair(uint32 a, uint32 b, uint32 c, __nv_bfloat16) {
    uint32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// d [16, 8] += a [16, 32] * b [32, 8] of int8 (PTX ISA, mma.m16n8k32): a = {(g, 4t), (g + 8, 4t), (g, 4t + 16), (g + 8, 4t + 16)},
// b = {(4t, g), (4t + 16, g)}, each four neighbours along k; d as above, int32.
__device__ __forceinline__ void mma_16x8x32(int (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Sixteen bytes that are read once: past the first-level cache, so that they do not push out what is read again.
__device__ __forceinline__ uint4 load_streaming(const void* from) {
    uint4 bits;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "l"(from));
    return bits;
}
