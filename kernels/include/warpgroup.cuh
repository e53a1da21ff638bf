// SPDX-License-Identifier: Apache-2.0
// Hopper's warpgroup matrix instructions: four warps multiply 64 x 16 elements of 16 bits, or 64 x 32 codes, by N rows of as many, asynchronously, from
// shared memory.
//
// Shared operands are columns of 64 elements or 128 codes (128 bytes) with the 128-byte swizzle: 16-byte piece p of row r lies at piece
// p ^ (r % 8); columns start at multiples of 1,024 bytes. Results lie as those of mma.sync m16n8: warp w has rows 16 w ..
// 16 w + 15, d[j] is its 8-column block j. PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate". Needs sm_90a.
#pragma once
#include "attention_instructions.cuh"

// Where a shared operand lies. `stride_bytes` between groups of 8 rows, `leading_bytes` between columns of 64 elements
// (read only for an operand whose rows run along the summed dimension).
__device__ __forceinline__ unsigned long long matrix_descriptor(unsigned address, int leading_bytes, int stride_bytes) {
    return static_cast<unsigned long long>((address & 0x3ffff) >> 4) | static_cast<unsigned long long>(leading_bytes >> 4) << 16 |
           static_cast<unsigned long long>(stride_bytes >> 4) << 32 | 1ull << 62;
}

// The same operand, `bytes` further on (within shared memory, so the address field cannot overflow into the next one).
__device__ __forceinline__ unsigned long long moved(unsigned long long descriptor, int bytes) { return descriptor + (bytes >> 4); }

// Before the first multiplication after registers or shared memory that it reads have changed.
__device__ __forceinline__ void warpgroup_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `PENDING` committed groups are unfinished.
template <int PENDING>
__device__ __forceinline__ void warpgroup_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Makes the compiler treat registers as changed here: wgmma writes them behind its back.
template <int BLOCKS>
__device__ __forceinline__ void pin_registers(float (&d)[BLOCKS][4]) {
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) asm volatile("" : "+f"(d[i][j])::"memory");
}
template <int BLOCKS>
__device__ __forceinline__ void pin_registers(int (&d)[BLOCKS][4]) {
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) asm volatile("" : "+r"(d[i][j])::"memory");
}

// Ordinary writes to shared memory that this thread has seen become visible to its later wgmma instructions, and to copies that are started later.
__device__ __forceinline__ void fence_for_async_readers() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// What other threads of a group_barrier wait for; this one goes on.
__device__ __forceinline__ void group_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int REGISTERS>
__device__ __forceinline__ void raise_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void lower_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

#if OPERANDS_BFLOAT16
#define WGMMA_TYPES ".f32.bf16.bf16 "
#else
#define WGMMA_TYPES ".f32.f16.f16 "
#endif
#define WGMMA_BLOCK(r, d, i) r(d[i][0]), r(d[i][1]), r(d[i][2]), r(d[i][3])
#define WGMMA_BLOCKS_4(r, d, i) WGMMA_BLOCK(r, d, i), WGMMA_BLOCK(r, d, i + 1), WGMMA_BLOCK(r, d, i + 2), WGMMA_BLOCK(r, d, i + 3)
#define WGMMA_BLOCKS_8(r, d, i) WGMMA_BLOCKS_4(r, d, i), WGMMA_BLOCKS_4(r, d, i + 4)
#define WGMMA_BLOCKS_16(r, d, i) WGMMA_BLOCKS_8(r, d, i), WGMMA_BLOCKS_8(r, d, i + 8)
#define WGMMA_BLOCKS_32(r, d, i) WGMMA_BLOCKS_16(r, d, i), WGMMA_BLOCKS_16(r, d, i + 16)
#define WGMMA_REGISTERS_64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_REGISTERS_128 \
    WGMMA_REGISTERS_64 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_REGISTERS_256 \
    WGMMA_REGISTERS_128 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// One instruction each, for d [64, N] of N / 8 blocks.
//
// shared_shared: d = a b^T (+ d where `accumulate`), both from shared memory with rows along the summed dimension.
// register_shared: d += a b, a from registers, b from shared memory with rows across the summed dimension.
template <int N>
struct WarpgroupMultiply;

// The instruction names every register of d, so each N is an instruction of its own. BLOCKS: N / 8. FIRST to FIFTH: the
// operands' numbers after those of d.
#define DEFINE_WARPGROUP_MULTIPLY(N, BLOCKS, FIRST, SECOND, THIRD, FOURTH, FIFTH) \
    template <> \
    struct WarpgroupMultiply<N> { \
        __device__ __forceinline__ static void shared_shared( \
            float (&d)[BLOCKS][4], unsigned long long a, unsigned long long b, bool accumulate) { \
            asm volatile("{ .reg .pred p; setp.ne.b32 p, " THIRD ", 0;\n" \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16" WGMMA_TYPES "{" WGMMA_REGISTERS_##N "}, " \
                         FIRST ", " SECOND ", p, 1, 1, 0, 0; }" \
                         : WGMMA_BLOCKS_##BLOCKS("+f", d, 0) \
                         : "l"(a), "l"(b), "r"(static_cast<int>(accumulate))); \
        } \
        __device__ __forceinline__ static void register_shared( \
            float (&d)[BLOCKS][4], const unsigned (&a)[4], unsigned long long b) { \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16" WGMMA_TYPES "{" WGMMA_REGISTERS_##N "}, " \
                         "{" FIRST ", " SECOND ", " THIRD ", " FOURTH "}, " FIFTH ", 1, 1, 1, 1;" \
                         : WGMMA_BLOCKS_##BLOCKS("+f", d, 0) \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
        } \
    };
DEFINE_WARPGROUP_MULTIPLY(64, 8, "%32", "%33", "%34", "%35", "%36")
DEFINE_WARPGROUP_MULTIPLY(128, 16, "%64", "%65", "%66", "%67", "%68")
DEFINE_WARPGROUP_MULTIPLY(256, 32, "%128", "%129", "%130", "%131", "%132")
#undef DEFINE_WARPGROUP_MULTIPLY

// d [64, 256] = a b^T (+ d where `accumulate`) of 8-bit codes, 32 of a row, both from shared memory with rows along the summed dimension: e4m3, or
// int8 with exact sums. Columns of a shared operand are 128 codes.
#define DEFINE_MULTIPLY_CODES(SUM, CONSTRAINT, TYPES, FACTORS) \
    __device__ __forceinline__ void multiply_codes(SUM (&d)[32][4], unsigned long long a, unsigned long long b, bool accumulate) { \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %130, 0;\n" \
                     "wgmma.mma_async.sync.aligned.m64n256k32" TYPES "{" WGMMA_REGISTERS_256 "}, %128, %129, p" FACTORS "; }" \
                     : WGMMA_BLOCKS_32(CONSTRAINT, d, 0) \
                     : "l"(a), "l"(b), "r"(static_cast<int>(accumulate))); \
    }
DEFINE_MULTIPLY_CODES(float, "+f", ".f32.e4m3.e4m3 ", ", 1, 1")
DEFINE_MULTIPLY_CODES(int, "+r", ".s32.s8.s8 ", "")
#undef DEFINE_MULTIPLY_CODES
