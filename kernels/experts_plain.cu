// SPDX-License-Identifier: Apache-2.0
// Grouped product without tensor cores, for float32 and for widths that are no multiples of 16 bytes.
// Shapes as in experts_stream.cu; a block computes WARPS outputs of a tile of at most ROWS rows, a warp one of them.
// Defines: SCALAR, CODES, GROUP (any, 0 = the whole row), HAS_ZERO, WARPS, ROWS, VEC (divides I, at most 8), GATED, ACTIVATION, GATHERS,
//     TOP_K. Grid: (tiles, outputs over WARPS).
// Limits: float32 sums in an order that depends on VEC alone; gate and up are rounded before they meet.
// Reference: x @ weight.T of each row's expert in float64.
#include "activation.cuh"
#include "expert_weight.cuh"
#include "launch.cuh"
#include "reduce.cuh"

// Neighbouring columns of a row of the stack; of codes without the scale of whole rows.
__device__ __forceinline__ void load_weight(const ExpertWeight& weight, int row, int column, float (&to)[VEC]) {
    const unsigned char* const bytes = weight.bytes_of(row);
    if constexpr (CODES == 0) {
        load(reinterpret_cast<const scalar*>(bytes) + column, to);
        return;
    }
    const int within = column % CHUNK;
    const uint32* const lane = reinterpret_cast<const uint32*>(bytes + column / CHUNK * CHUNK_BYTES + within % SPREAD / PIECE * 16);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        const uint32 at = weight.scale_at(GROUP ? (column + i) / (GROUP ? GROUP : 1) : 0, row);
        to[i] = code_value(lane + within / SPREAD * PIECE_WORDS, within % PIECE + i);
        if constexpr (HAS_ZERO) to[i] -= static_cast<float>(weight.zero[at]);
        if constexpr (GROUP != 0) to[i] *= weight.scale[at];
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
plain(const scalar* __restrict__ x, const unsigned char* __restrict__ values, const float* __restrict__ scale,
      const signed char* __restrict__ zero, const int* __restrict__ order, const ExpertTile* __restrict__ tiles,
      scalar* __restrict__ out, int stacked_rows, int out_features, int in_features) {
    let_next_start();
    wait_for_previous();
    const ExpertTile tile = tiles[blockIdx.x];
    const int lane = threadIdx.x % 32, output = blockIdx.y * WARPS + threadIdx.x / 32;
    if (tile.expert < 0 || output >= out_features) return;
    const ExpertWeight weight(values, scale, zero, stacked_rows, out_features, in_features, tile.expert);
    const int row = weight.row(output, false), up_row = weight.row(output, true);
    float sum[ROWS] = {}, up[ROWS] = {};
    for (int at = lane * VEC; at < in_features; at += 32 * VEC) {
        float factor[VEC], up_factor[VEC];
        load_weight(weight, row, at, factor);
        if constexpr (GATED) load_weight(weight, up_row, at, up_factor);
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
        float value = warp_reduce(sum[i], Sum()) * weight.row_scale(row);
        if constexpr (GATED) value = ACTIVATION(rounded(value)) * rounded(warp_reduce(up[i], Sum()) * weight.row_scale(up_row));
        if (lane == 0 && tile.first + i < tile.stop)
            assign(out[static_cast<int64>(tile.first + i) * out_features + output], value);
    }
}
