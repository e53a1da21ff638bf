// SPDX-License-Identifier: Apache-2.0
// A token's experts, weighted and summed: out[t] = sum over its choices of share * rows[position], in the order of choices.
// Shapes: rows [T * TOP_K, D] in sorted order, positions (-1 = not here) and shares [T, TOP_K], out [T, D].
// Defines: SCALAR, FEATURES (D), VEC (divides D), NUM_THREADS, TOP_K. Grid: T rows of CHUNKS blocks, as in activation.cu.
// Limits: float32 sums, rounded once; a row without choices becomes zeros.
// Reference: the same in float64.
#include "dtype.cuh"
#include "launch.cuh"

constexpr int CHUNKS = (FEATURES + NUM_THREADS * VEC - 1) / (NUM_THREADS * VEC);

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
combine(const scalar* __restrict__ rows, const int* __restrict__ positions, const float* __restrict__ shares,
        scalar* __restrict__ out) {
    let_next_start();
    wait_for_previous();
    const int at = (blockIdx.x % CHUNKS * NUM_THREADS + threadIdx.x) * VEC;
    if (at >= FEATURES) return;
    const int64 token = blockIdx.x / CHUNKS;
    float sum[VEC] = {};
#pragma unroll
    for (int choice = 0; choice < TOP_K; ++choice) {
        const int position = positions[token * TOP_K + choice];
        if (position < 0) continue;
        const float share = shares[token * TOP_K + choice];
        float value[VEC];
        load(rows + static_cast<int64>(position) * FEATURES + at, value);
#pragma unroll
        for (int i = 0; i < VEC; ++i) sum[i] += share * value[i];
    }
    store(out + token * FEATURES + at, sum);
}
