// SPDX-License-Identifier: Apache-2.0
// x = min(max(x * factor, -limit), limit), in place.
// Shapes: x, any, as a row of elements. Defines: SCALAR, VEC (divides the number of elements), NUM_THREADS.
// Reference: the same in float64, rounded once.
#include "dtype.cuh"
#include "launch.cuh"

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
scale_and_clip(scalar* __restrict__ x, int64 num_vectors, float factor, float limit) {
    let_next_start();
    wait_for_previous();
    const int64 index = static_cast<int64>(blockIdx.x) * NUM_THREADS + threadIdx.x;
    if (index >= num_vectors) return;
    float value[VEC];
    load(x + index * VEC, value);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        const float scaled = value[i] * factor;
        value[i] = scaled > limit ? limit : scaled < -limit ? -limit : scaled;  // fminf would drop a NaN
    }
    store(x + index * VEC, value);
}
