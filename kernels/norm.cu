// SPDX-License-Identifier: Apache-2.0
// Residual add and normalisation in one pass over the row, which stays in registers:
//     sum = x + residual, rounded to storage and written back to residual;
//     out = (sum - mean) * rsqrt(variance + epsilon) * (weight_offset + weight) + bias.
// RMSNorm has no mean and no bias, and takes the mean square for the variance; without a weight, factors are 1. Without a residual
// nothing is written back. Shapes: x, residual, out [T, D]; weight, bias [D]. out may be x. One block a row.
// Defines: SCALAR, HIDDEN_SIZE (D), VEC (divides D), NUM_THREADS, and 0 or 1: LAYER_NORM, HAS_RESIDUAL, HAS_WEIGHT, HAS_BIAS.
//     QUANTIZED (1 = fp8, 2 = int8): instead of out, codes [T, D] of out rounded to storage, and scale [T]; see quantize.cuh, also for
//     STATIC_SCALE and bound. GROUPS: codes [rows, D] and scale [D / 128, rows] of group_codes.cuh, zeros beyond T; a block for each of
//     the rows, VEC >= 4, D % 64 == 0.
// Limits: D <= 64 * VEC * 1024 by registers; the variance is taken about the mean, so it does not cancel.
// Reference: the same in float64 from the rounded sum. Zhang and Sennrich 2019 (RMSNorm); Ba et al. 2016 (LayerNorm).
#include "dtype.cuh"
#include "launch.cuh"
#include "quantize.cuh"
#include "reduce.cuh"
#if GROUPS
#include "group_codes.cuh"
#endif

constexpr int NUM_CHUNKS = (HIDDEN_SIZE + NUM_THREADS * VEC - 1) / (NUM_THREADS * VEC);

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
residual_norm(const scalar* x, scalar* residual, const scalar* __restrict__ weight,
     const scalar* __restrict__ bias, scalar* out, unsigned char* __restrict__ codes,
     float* __restrict__ scale, float epsilon, float weight_offset, float bound, int num_tokens) {
    let_next_start();
    wait_for_previous();
#if GROUPS
    if (static_cast<int>(blockIdx.x) >= num_tokens) {
        for (int at = threadIdx.x; at < HIDDEN_SIZE; at += NUM_THREADS) {
            codes[static_cast<int64>(blockIdx.x) * HIDDEN_SIZE + at] = 0;
            if (at % GROUP == 0) scale[static_cast<int64>(at / GROUP) * gridDim.x + blockIdx.x] = 0.0f;
        }
        return;
    }
#endif
    const int64 row = static_cast<int64>(blockIdx.x) * HIDDEN_SIZE;
    float value[NUM_CHUNKS][VEC] = {};
    float total = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < NUM_CHUNKS; ++chunk) {
        const int at = (chunk * NUM_THREADS + threadIdx.x) * VEC;
        if (at >= HIDDEN_SIZE) continue;
        load(x + row + at, value[chunk]);
        if constexpr (HAS_RESIDUAL) {
            float addend[VEC];
            load(residual + row + at, addend);
#pragma unroll
            for (int i = 0; i < VEC; ++i) value[chunk][i] += addend[i];
            round_all(value[chunk]);
            store(residual + row + at, value[chunk]);
        }
#pragma unroll
        for (int i = 0; i < VEC; ++i) total += LAYER_NORM ? value[chunk][i] : value[chunk][i] * value[chunk][i];
    }
    total = block_reduce<NUM_THREADS>(total, Sum());

    float mean = 0.0f;
    if constexpr (LAYER_NORM) {
        mean = total / HIDDEN_SIZE;
        total = 0.0f;
#pragma unroll
        for (int chunk = 0; chunk < NUM_CHUNKS; ++chunk) {
            if ((chunk * NUM_THREADS + threadIdx.x) * VEC >= HIDDEN_SIZE) continue;
#pragma unroll
            for (int i = 0; i < VEC; ++i) total += (value[chunk][i] - mean) * (value[chunk][i] - mean);
        }
        total = block_reduce<NUM_THREADS>(total, Sum());
    }
    const float factor = rsqrtf(total / HIDDEN_SIZE + epsilon);

    unsigned amax = 0;
#pragma unroll
    for (int chunk = 0; chunk < NUM_CHUNKS; ++chunk) {
        const int at = (chunk * NUM_THREADS + threadIdx.x) * VEC;
        if (at >= HIDDEN_SIZE) continue;
        float gain[VEC] = {}, shift[VEC] = {};
        if constexpr (HAS_WEIGHT) load(weight + at, gain);
        if constexpr (HAS_BIAS) load(bias + at, shift);
#pragma unroll
        for (int i = 0; i < VEC; ++i)
            value[chunk][i] = (value[chunk][i] - mean) * factor * (HAS_WEIGHT ? weight_offset + gain[i] : 1.0f) + shift[i];
        if constexpr (!QUANTIZED) store(out + row + at, value[chunk]);
        if constexpr (QUANTIZED) {
            round_all(value[chunk]);
#pragma unroll
            for (int i = 0; i < VEC; ++i) amax = Max()(amax, magnitude_bits(value[chunk][i]));
        }
    }
#if GROUPS
#pragma unroll
    for (int chunk = 0; chunk < NUM_CHUNKS; ++chunk)
        store_group_codes(codes + row, scale + blockIdx.x, gridDim.x, value[chunk], (chunk * NUM_THREADS + threadIdx.x) * VEC, HIDDEN_SIZE,
                          HIDDEN_SIZE);
#else
    if constexpr (QUANTIZED) {
        const RowScale own = block_row_scale<NUM_THREADS>(amax, bound);
        if (threadIdx.x == 0) scale[blockIdx.x] = own.scale;
#pragma unroll
        for (int chunk = 0; chunk < NUM_CHUNKS; ++chunk) {
            const int at = (chunk * NUM_THREADS + threadIdx.x) * VEC;
            if (at < HIDDEN_SIZE) store_codes(codes + row + at, value[chunk], own.inverse);
        }
    }
#endif
}
