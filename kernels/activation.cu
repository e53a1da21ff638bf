// SPDX-License-Identifier: Apache-2.0
// Activations of the feed-forward part.
//     gated: out = f(gate) * up, from x = [gate | up] of [T, 2F] to [T, F].
//     plain: out = f(x) on [T, F]; out may be x.
// Defines: SCALAR, FEATURES (F), VEC (divides F), NUM_THREADS, ACTIVATION (one of activation.cuh).
// Grid: T rows of CHUNKS blocks, one after the other: only the first extent of a grid may exceed 65,535.
// Reference: the same in float64, rounded once. Shazeer 2020 (gated variants); Hendrycks and Gimpel 2016 (GELU).
#include "activation.cuh"
#include "dtype.cuh"
#include "launch.cuh"

constexpr int CHUNKS = (FEATURES + NUM_THREADS * VEC - 1) / (NUM_THREADS * VEC);

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
gated(const scalar* __restrict__ x, scalar* __restrict__ out) {
    let_next_start();
    wait_for_previous();
    const int at = (blockIdx.x % CHUNKS * NUM_THREADS + threadIdx.x) * VEC;
    if (at >= FEATURES) return;
    const int64 row = blockIdx.x / CHUNKS;
    float gate[VEC], up[VEC];
    load(x + row * 2 * FEATURES + at, gate);
    load(x + row * 2 * FEATURES + FEATURES + at, up);
#pragma unroll
    for (int i = 0; i < VEC; ++i) gate[i] = ACTIVATION(gate[i]) * up[i];
    store(out + row * FEATURES + at, gate);
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
plain(const scalar* x, scalar* out) {
    let_next_start();
    wait_for_previous();
    const int at = (blockIdx.x % CHUNKS * NUM_THREADS + threadIdx.x) * VEC;
    if (at >= FEATURES) return;
    const int64 row = blockIdx.x / CHUNKS;
    float value[VEC];
    load(x + row * FEATURES + at, value);
#pragma unroll
    for (int i = 0; i < VEC; ++i) value[i] = ACTIVATION(value[i]);
    store(out + row * FEATURES + at, value);
}
