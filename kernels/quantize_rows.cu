// SPDX-License-Identifier: Apache-2.0
// Rows to 8-bit codes with one scale a row, in one pass over the row, which stays in registers.
// Shapes: x [T, COLUMNS]; codes [T, COLUMNS] bytes; scale [T] float32. One block a row.
// Defines: SCALAR, COLUMNS, VEC (divides COLUMNS), NUM_THREADS, QUANTIZED (1 = fp8, 2 = int8), STATIC_SCALE.
// Reference: checkpoints/quantization/numbers.py, equal bit for bit.
#include "dtype.cuh"
#include "launch.cuh"
#include "quantize.cuh"
#include "reduce.cuh"

constexpr int NUM_CHUNKS = (COLUMNS + NUM_THREADS * VEC - 1) / (NUM_THREADS * VEC);

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
quantize_rows(const scalar* __restrict__ x, unsigned char* __restrict__ codes, float* __restrict__ scale, float bound) {
    let_next_start();
    wait_for_previous();
    const int64 row = static_cast<int64>(blockIdx.x) * COLUMNS;
    float value[NUM_CHUNKS][VEC] = {};
    unsigned amax = 0;
#pragma unroll
    for (int chunk = 0; chunk < NUM_CHUNKS; ++chunk) {
        const int at = (chunk * NUM_THREADS + threadIdx.x) * VEC;
        if (at >= COLUMNS) continue;
        load(x + row + at, value[chunk]);
#pragma unroll
        for (int i = 0; i < VEC; ++i) amax = Max()(amax, magnitude_bits(value[chunk][i]));
    }
    const RowScale own = row_scale(STATIC_SCALE ? 0u : block_reduce<NUM_THREADS>(amax, Max()), bound);
    if (threadIdx.x == 0) scale[blockIdx.x] = own.scale;
#pragma unroll
    for (int chunk = 0; chunk < NUM_CHUNKS; ++chunk) {
        const int at = (chunk * NUM_THREADS + threadIdx.x) * VEC;
        if (at < COLUMNS) store_codes(codes + row + at, value[chunk], own.inverse);
    }
}
