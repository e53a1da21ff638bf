// SPDX-License-Identifier: Apache-2.0
// The gated activation as 8-bit codes: f(gate) * up rounded to storage, then one scale a row, which stays in registers.
// Shapes: x = [gate | up] [T, 2F]; codes [T, F] bytes; scale [T] float32. One block a row.
// Defines: SCALAR, FEATURES (F), VEC (divides F), NUM_THREADS, ACTIVATION (one of activation.cuh),
//     QUANTIZED (1 = fp8, 2 = int8), STATIC_SCALE.
// Reference: activation.cu's gated, then quantize_rows.cu: equal bit for bit.
#include "activation.cuh"
#include "dtype.cuh"
#include "launch.cuh"
#include "quantize.cuh"
#include "reduce.cuh"

constexpr int NUM_CHUNKS = (FEATURES + NUM_THREADS * VEC - 1) / (NUM_THREADS * VEC);

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
gated_quantized(const scalar* __restrict__ x, unsigned char* __restrict__ codes, float* __restrict__ scale, float bound) {
    let_next_start();
    wait_for_previous();
    const int64 row = blockIdx.x;
    float value[NUM_CHUNKS][VEC] = {};
    unsigned amax = 0;
#pragma unroll
    for (int chunk = 0; chunk < NUM_CHUNKS; ++chunk) {
        const int at = (chunk * NUM_THREADS + threadIdx.x) * VEC;
        if (at >= FEATURES) continue;
        float up[VEC];
        load(x + row * 2 * FEATURES + at, value[chunk]);
        load(x + row * 2 * FEATURES + FEATURES + at, up);
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            value[chunk][i] = rounded(ACTIVATION(value[chunk][i]) * up[i]);
            amax = Max()(amax, magnitude_bits(value[chunk][i]));
        }
    }
    const RowScale own = row_scale(STATIC_SCALE ? 0u : block_reduce<NUM_THREADS>(amax, Max()), bound);
    if (threadIdx.x == 0) scale[row] = own.scale;
#pragma unroll
    for (int chunk = 0; chunk < NUM_CHUNKS; ++chunk) {
        const int at = (chunk * NUM_THREADS + threadIdx.x) * VEC;
        if (at < FEATURES) store_codes(codes + row * FEATURES + at, value[chunk], own.inverse);
    }
}
