// SPDX-License-Identifier: Apache-2.0
// x *= sigmoid(y . weight), row by row, in place: how much a shared expert counts for a token (Qwen team 2024).
// Shapes: x, y [T, D]; weight [D]. Defines: SCALAR, FEATURES (D), VEC (divides D), NUM_THREADS. Grid: T.
// Limits: float32 sums in an order that depends on VEC and NUM_THREADS alone, rounded once at the end.
// Reference: the same in float64.
#include "activation.cuh"
#include "dtype.cuh"
#include "launch.cuh"
#include "reduce.cuh"

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
sigmoid_gate(scalar* __restrict__ x, const scalar* __restrict__ y, const scalar* __restrict__ weight) {
    let_next_start();
    wait_for_previous();
    const int64 row = static_cast<int64>(blockIdx.x) * FEATURES;
    float sum = 0.0f;
    for (int at = threadIdx.x * VEC; at < FEATURES; at += NUM_THREADS * VEC) {
        float value[VEC], factor[VEC];
        load(y + row + at, value);
        load(weight + at, factor);
#pragma unroll
        for (int i = 0; i < VEC; ++i) sum += value[i] * factor[i];
    }
    const float share = sigmoid(block_reduce<NUM_THREADS>(sum, Sum()));
    for (int at = threadIdx.x * VEC; at < FEATURES; at += NUM_THREADS * VEC) {
        float value[VEC];
        load(x + row + at, value);
#pragma unroll
        for (int i = 0; i < VEC; ++i) value[i] *= share;
        store(x + row + at, value);
    }
}
