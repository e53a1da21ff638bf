// SPDX-License-Identifier: Apache-2.0
// Grouped product without tensor cores, for float32 and for widths that are no multiples of 16 bytes.
// Shapes as in experts_stream.cu; a block computes WARPS outputs of a tile of at most ROWS rows, a warp one of them.
// Defines: SCALAR, WARPS, ROWS, VEC (divides I), GATED, ACTIVATION, GATHERS, TOP_K. Grid: (tiles, outputs over WARPS).
// Limits: float32 sums in an order that depends on VEC alone; gate and up are rounded before they meet.
// Reference: x @ weight.T of each row's expert in float64.
#include "activation.cuh"
#include "dtype.cuh"
#include "experts.cuh"
#include "launch.cuh"
#include "reduce.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32)
plain(const scalar* __restrict__ x, const scalar* __restrict__ weight, const int* __restrict__ order,
      const ExpertTile* __restrict__ tiles, scalar* __restrict__ out, int out_features, int in_features) {
    let_next_start();
    wait_for_previous();
    const ExpertTile tile = tiles[blockIdx.x];
    const int lane = threadIdx.x % 32, output = blockIdx.y * WARPS + threadIdx.x / 32;
    if (tile.expert < 0 || output >= out_features) return;
    const int64 first_row = static_cast<int64>(tile.expert) * (GATED ? 2 : 1) * out_features;
    const scalar* const row = weight + (first_row + output) * in_features;
    const scalar* const up_row = row + static_cast<int64>(GATED ? out_features : 0) * in_features;
    float sum[ROWS] = {}, up[ROWS] = {};
    for (int at = lane * VEC; at < in_features; at += 32 * VEC) {
        float factor[VEC], up_factor[VEC];
        load(row + at, factor);
        if constexpr (GATED) load(up_row + at, up_factor);
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            const int position = tile.first + i;
            if (position >= tile.stop) continue;
            float value[VEC];
            load(x + static_cast<int64>(GATHERS ? order[position] / TOP_K : position) * in_features + at, value);
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                sum[i] += value[j] * factor[j];
                if constexpr (GATED) up[i] += value[j] * up_factor[j];
            }
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        float value = warp_reduce(sum[i], Sum());
        if constexpr (GATED) value = ACTIVATION(rounded(value)) * rounded(warp_reduce(up[i], Sum()));
        if (lane == 0 && tile.first + i < tile.stop)
            assign(out[static_cast<int64>(tile.first + i) * out_features + output], value);
    }
}
