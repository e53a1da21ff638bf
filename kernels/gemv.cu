// SPDX-License-Identifier: Apache-2.0
// Matrix product for 1 to 16 tokens: out = x @ weight^T (+ bias), or f(gate) * up when the weight is [gate; up].
// Decoding at small batch reads every weight once and does next to nothing with it, so all that counts is how many
// bytes are under way. The weights go from memory straight into tensor-core operands: a lane reads 16 bytes of one
// weight row, and because x is read with the same permutation of k, no shuffle or shared memory is needed.
// Shapes: x [T, I], weight [O, I] (GATED: [2 * O, I], gates first), bias [O], out [T, O]; T <= 16, I % 32 == 0.
// A block computes ROW_BLOCKS * 8 outputs (GATED: 8), its warps sharing the k range; grid: outputs over that.
// Defines: SCALAR (__half or __nv_bfloat16), NUM_WARPS, ROW_BLOCKS (GATED: 2), UNROLL,
//     PREFETCH_BYTES (of each row into the second-level cache ahead of time), MANY (T > 8), GATED, ACTIVATION,
//     HAS_BIAS.
// Limits: float32 sums in an order that depends on NUM_WARPS and UNROLL alone.
// Reference: x @ weight.T in float64.
#include "activation.cuh"
#include "launch.cuh"
#include "weight_stream.cuh"

constexpr int STRIDE = NUM_WARPS * CHUNK;            // between a warp's steps
constexpr int ROWS = (GATED ? 1 : ROW_BLOCKS) * TILE;  // outputs of a block

__device__ __forceinline__ Words load_tokens(const scalar* x, int token, int num_tokens, int in_features, int k) {
    if (token >= num_tokens) return {};
    return words(*reinterpret_cast<const uint4*>(x + static_cast<int64>(token) * in_features + k));
}

using Streamed = Words[UNROLL][ROW_BLOCKS];

__device__ __forceinline__ void load_weights(const scalar* const (&row)[ROW_BLOCKS], int first, int in_features,
                                             Streamed& streamed) {
#pragma unroll
    for (int step = 0; step < UNROLL; ++step)
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block)
            if (first + step * STRIDE < in_features)
                streamed[step][block] = words(load_streaming(row[block] + first + step * STRIDE));
}

extern "C" __global__ void __launch_bounds__(NUM_WARPS * 32)
gemv(const scalar* __restrict__ x, const scalar* __restrict__ weight, const scalar* __restrict__ bias, scalar* out,
     int num_tokens, int out_features, int in_features) {
    __shared__ float sums[NUM_WARPS][ROW_BLOCKS][4][32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = lane / 4, member = lane % 4;

    const scalar* row[ROW_BLOCKS];
#pragma unroll
    for (int block = 0; block < ROW_BLOCKS; ++block) {
        const int first = static_cast<int>(blockIdx.x) * ROWS + (GATED ? 0 : block * TILE);
        const int output = min(first + group, out_features - 1);
        row[block] = weight + static_cast<int64>(output + (GATED ? block * out_features : 0)) * in_features;
    }

    // Weights do not depend on the previous kernel: start loading them before it finishes.
    let_next_start();
    int k = warp * CHUNK + member * LANE_ELEMENTS;
    Streamed streamed;
    load_weights(row, k, in_features, streamed);
    if (warp == 0 && member == 0) {
        const int from = min(UNROLL * STRIDE, in_features);
        const int num_bytes = min((in_features - from) * static_cast<int>(sizeof(scalar)), PREFETCH_BYTES);
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block)
            if (num_bytes > 0) prefetch(row[block] + from, num_bytes);
    }
    wait_for_previous();

    float sum[ROW_BLOCKS][4] = {};
    while (k < in_features) {
#pragma unroll
        for (int step = 0; step < UNROLL; ++step, k += STRIDE) {
            if (k >= in_features) continue;
            const Words low = load_tokens(x, group, num_tokens, in_features, k);
            Words high = {};
            if constexpr (MANY) high = load_tokens(x, group + 8, num_tokens, in_features, k);
#pragma unroll
            for (int block = 0; block < ROW_BLOCKS; ++block) multiply(sum[block], low, high, streamed[step][block]);
        }
        load_weights(row, k, in_features, streamed);
    }
#pragma unroll
    for (int block = 0; block < ROW_BLOCKS; ++block)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[warp][block][i][lane] = sum[block][i];
    __syncthreads();

    // Accumulator i of lane (group, member): token group + 8 * (i / 2), row 2 * member + i % 2 of the tile.
    constexpr int OUTPUTS = ROWS / TILE * 4 * 32;
    for (int index = threadIdx.x; index < OUTPUTS; index += NUM_WARPS * 32) {
        const int block = index / 128, i = index / 32 % 4, from = index % 32;
        const int token = from / 4 + 8 * (i / 2);
        const int output = blockIdx.x * ROWS + block * TILE + 2 * (from % 4) + i % 2;
        if (token >= num_tokens || output >= out_features) continue;
        float value = 0.0f, up = 0.0f;
#pragma unroll
        for (int other = 0; other < NUM_WARPS; ++other) {
            value += sums[other][block][i][from];
            if constexpr (GATED) up += sums[other][ROW_BLOCKS - 1][i][from];
        }
        scalar* const to = out + static_cast<int64>(token) * out_features + output;
        if constexpr (HAS_BIAS) value += to_float(bias[output]);
        if constexpr (GATED) value = ACTIVATION(rounded(value)) * rounded(up);
        assign(*to, value);
    }
}
