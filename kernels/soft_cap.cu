// SPDX-License-Identifier: Apache-2.0
// x = cap * tanh(x / cap), in place: the limit on Gemma 2's logits.
// Shapes: x, any, as a row of elements. Defines: SCALAR, VEC (divides the number of elements), NUM_THREADS.
// Reference: the same in float64, rounded once. Gemma team 2024.
#include "dtype.cuh"
#include "launch.cuh"

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
soft_cap(scalar* __restrict__ x, int64 num_vectors, float cap) {
    let_next_start();
    wait_for_previous();
    const int64 index = static_cast<int64>(blockIdx.x) * NUM_THREADS + threadIdx.x;
    if (index >= num_vectors) return;
    float value[VEC];
    load(x + index * VEC, value);
#pragma unroll
    for (int i = 0; i < VEC; ++i) value[i] = cap * tanhf(value[i] / cap);
    store(x + index * VEC, value);
}
