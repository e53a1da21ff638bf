// SPDX-License-Identifier: Apache-2.0
// Grouped product of tiles of at most 16 rows, for decoding: each chosen expert's weights pass once from memory into
// tensor-core operands (weight_stream.cuh), those of other experts not at all.
// Shapes: x [T, I] (GATHERS: row order[i] / TOP_K) or [T * TOP_K, I] in sorted order; weight [E * O, I] (GATED: [E * 2 * O, I],
//     gates first); tiles [max tiles]; out [T * TOP_K, O] in sorted order. I % 8 == 0.
// A block computes ROW_BLOCKS * 8 outputs of one tile (GATED: 8), its warps sharing the k range. Grid: (tiles, outputs
// over that); tiles come first, so that those of one expert run together and find its weights in the second-level cache.
// Defines: SCALAR, NUM_WARPS, ROW_BLOCKS (GATED: 2), UNROLL, GATED, ACTIVATION, GATHERS, TOP_K.
// Limits: float32 sums in an order that depends on NUM_WARPS and UNROLL alone; gate and up are rounded before they meet.
// Reference: x @ weight.T of each row's expert in float64.
#include "activation.cuh"
#include "experts.cuh"
#include "launch.cuh"
#include "weight_stream.cuh"

constexpr int STRIDE = NUM_WARPS * CHUNK;              // between a warp's steps
constexpr int ROWS = (GATED ? 1 : ROW_BLOCKS) * TILE;  // outputs of a block

__device__ __forceinline__ Words load_words(const scalar* row, int k, int in_features) {
    return row != nullptr && k < in_features ? words(*reinterpret_cast<const uint4*>(row + k)) : Words{};
}

extern "C" __global__ void __launch_bounds__(NUM_WARPS * 32)
stream(const scalar* __restrict__ x, const scalar* __restrict__ weight, const int* __restrict__ order,
       const ExpertTile* __restrict__ tiles, scalar* __restrict__ out, int out_features, int in_features) {
    __shared__ float sums[NUM_WARPS][ROW_BLOCKS][4][32];
    let_next_start();
    wait_for_previous();
    const ExpertTile tile = tiles[blockIdx.x];
    if (tile.expert < 0) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = lane / 4, member = lane % 4;
    const int first_output = static_cast<int>(blockIdx.y) * ROWS;

    const scalar* row[ROW_BLOCKS];
    const int64 first_row = static_cast<int64>(tile.expert) * (GATED ? 2 : 1) * out_features;
#pragma unroll
    for (int block = 0; block < ROW_BLOCKS; ++block) {
        const int output = min(first_output + (GATED ? 0 : block * TILE) + group, out_features - 1);
        row[block] = weight + (first_row + output + (GATED ? block * out_features : 0)) * in_features;
    }
    const scalar* token[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int position = tile.first + group + half * 8;
        token[half] = nullptr;
        if (position < tile.stop) token[half] = x + static_cast<int64>(GATHERS ? order[position] / TOP_K : position) * in_features;
    }

    float sum[ROW_BLOCKS][4] = {};
    for (int base = warp * CHUNK; base < in_features; base += UNROLL * STRIDE) {
        Words streamed[UNROLL][ROW_BLOCKS];
#pragma unroll
        for (int step = 0; step < UNROLL; ++step)
#pragma unroll
            for (int block = 0; block < ROW_BLOCKS; ++block) {
                const int k = base + step * STRIDE + member * LANE_ELEMENTS;
                streamed[step][block] = k < in_features ? words(load_streaming(row[block] + k)) : Words{};
            }
#pragma unroll
        for (int step = 0; step < UNROLL; ++step) {
            const int k = base + step * STRIDE + member * LANE_ELEMENTS;
            if (base + step * STRIDE >= in_features) continue;
            const Words low = load_words(token[0], k, in_features), high = load_words(token[1], k, in_features);
#pragma unroll
            for (int block = 0; block < ROW_BLOCKS; ++block) multiply(sum[block], low, high, streamed[step][block]);
        }
    }
#pragma unroll
    for (int block = 0; block < ROW_BLOCKS; ++block)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[warp][block][i][lane] = sum[block][i];
    __syncthreads();

    // Accumulator i of lane (group, member): row group + 8 * (i / 2) of the tile, output 2 * member + i % 2 of the block.
    constexpr int OUTPUTS = ROWS / TILE * 4 * 32;
    for (int index = threadIdx.x; index < OUTPUTS; index += NUM_WARPS * 32) {
        const int block = index / 128, i = index / 32 % 4, from = index % 32;
        const int position = tile.first + from / 4 + 8 * (i / 2);
        const int output = first_output + block * TILE + 2 * (from % 4) + i % 2;
        if (position >= tile.stop || output >= out_features) continue;
        float value = 0.0f, up = 0.0f;
#pragma unroll
        for (int other = 0; other < NUM_WARPS; ++other) {
            value += sums[other][block][i][from];
            if constexpr (GATED) up += sums[other][ROW_BLOCKS - 1][i][from];
        }
        if constexpr (GATED) value = ACTIVATION(rounded(value)) * rounded(up);
        assign(out[static_cast<int64>(position) * out_features + output], value);
    }
}
