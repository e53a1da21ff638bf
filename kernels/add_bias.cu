// SPDX-License-Identifier: Apache-2.0
// x[t] += bias, in place, for a bias that no GEMM epilogue or norm can take along.
// Shapes: x [T, D], bias [D]. One block a row.
// Defines: SCALAR, HIDDEN_SIZE (D), VEC (divides D), NUM_THREADS.
// Reference: x + bias in float32, rounded once.
#include "dtype.cuh"
#include "launch.cuh"

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
add_bias(scalar* __restrict__ x, const scalar* __restrict__ bias) {
    let_next_start();
    wait_for_previous();
    scalar* const row = x + static_cast<int64>(blockIdx.x) * HIDDEN_SIZE;
    for (int at = threadIdx.x * VEC; at < HIDDEN_SIZE; at += NUM_THREADS * VEC) {
        float value[VEC], addend[VEC];
        load(row + at, value);
        load(bias + at, addend);
#pragma unroll
        for (int i = 0; i < VEC; ++i) value[i] += addend[i];
        store(row + at, value);
    }
}
