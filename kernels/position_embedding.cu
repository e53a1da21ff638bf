// SPDX-License-Identifier: Apache-2.0
// Learned positions (GPT-2): x[t] += table[positions[t]], in place.
// Shapes: x [T, D], positions [T] int32 (each < rows of table), table [max_positions, D]. One block a token.
// Defines: SCALAR, HIDDEN_SIZE (D), VEC (divides D), NUM_THREADS.
// Reference: x + table[positions] in float32, rounded once.
#include "dtype.cuh"
#include "launch.cuh"

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
add_position_embedding(scalar* __restrict__ x, const int* __restrict__ positions, const scalar* __restrict__ table) {
    let_next_start();
    wait_for_previous();
    scalar* const row = x + static_cast<int64>(blockIdx.x) * HIDDEN_SIZE;
    const scalar* const addend = table + static_cast<int64>(positions[blockIdx.x]) * HIDDEN_SIZE;
    for (int at = threadIdx.x * VEC; at < HIDDEN_SIZE; at += NUM_THREADS * VEC) {
        float value[VEC], other[VEC];
        load(row + at, value);
        load(addend + at, other);
#pragma unroll
        for (int i = 0; i < VEC; ++i) value[i] += other[i];
        store(row + at, value);
    }
}
