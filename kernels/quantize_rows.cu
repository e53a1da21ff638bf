// SPDX-License-Identifier: Apache-2.0
// Rows to 8-bit codes with one scale a row, in one pass over the row, which stays in registers.
// Shapes: x [T, COLUMNS]; codes [T, COLUMNS] bytes; scale [T] float32. One block a row.
// Defines: SCALAR, COLUMNS, VEC (divides COLUMNS), NUM_THREADS, QUANTIZED (1 = fp8, 2 = int8), STATIC_SCALE.
// Reference: checkpoints/quantization/numbers.py, equal bit for bit.
#include "dtype.cuh"
#include "launch.cuh"
#include "quantize.cuh"

constexpr int CHUNK = NUM_THREADS * VEC, NUM_CHUNKS = (COLUMNS + CHUNK - 1) / CHUNK;

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
quantize_rows(const scalar* __restrict__ x, unsigned char* __restrict__ codes, float* __restrict__ scale, float bound) {
    let_next_start();
    wait_for_previous();
    const int64 row = static_cast<int64>(blockIdx.x) * COLUMNS;
    Packed<VEC> value[NUM_CHUNKS];
    LargestMagnitude largest;
#pragma unroll
    for (int chunk = 0; chunk < NUM_CHUNKS; ++chunk) {
        const int at = chunk * CHUNK + threadIdx.x * VEC;
        value[chunk] = is_in_row<COLUMNS, CHUNK>(chunk, at) ? load_packed<VEC>(x + row + at) : Packed<VEC>{};
    }
#pragma unroll
    for (int chunk = 0; chunk < NUM_CHUNKS; ++chunk) largest.add(value[chunk]);
    const RowScale own = block_row_scale<NUM_THREADS>(largest.bits(), bound);
    if (threadIdx.x == 0) scale[blockIdx.x] = own.scale;
#pragma unroll
    for (int chunk = 0; chunk < NUM_CHUNKS; ++chunk) {
        const int at = chunk * CHUNK + threadIdx.x * VEC;
        if (is_in_row<COLUMNS, CHUNK>(chunk, at)) store_codes(codes + row + at, value[chunk], own.inverse);
    }
}
