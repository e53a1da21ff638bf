// SPDX-License-Identifier: Apache-2.0
// Rows by index: out[s] = x[rows[s]]; a negative index (padding) gives zeros.
// Shapes: x [T, D], rows [S] int32, out [S, D]. One block a row.
// Defines: SCALAR, HIDDEN_SIZE (D), VEC (divides D), NUM_THREADS.
// Reference: x[rows].
#include "dtype.cuh"
#include "launch.cuh"

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
gather_rows(const scalar* __restrict__ x, const int* __restrict__ rows, scalar* __restrict__ out) {
    let_next_start();
    wait_for_previous();
    const int64 row = rows[blockIdx.x];
    for (int at = threadIdx.x * VEC; at < HIDDEN_SIZE; at += NUM_THREADS * VEC) {
        float value[VEC] = {};
        if (row >= 0) load(x + row * HIDDEN_SIZE + at, value);
        store(out + static_cast<int64>(blockIdx.x) * HIDDEN_SIZE + at, value);
    }
}
