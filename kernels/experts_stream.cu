// SPDX-License-Identifier: Apache-2.0
// Grouped product of tiles of at most 16 rows, for decoding: each chosen expert's weights pass once from memory into
// tensor-core operands (packed_stream.cuh), those of other experts not at all.
// Shapes: x [T, I] (GATHERS: row order[i] / TOP_K) or [T * TOP_K, I] in sorted order; weight [E * O, I] (GATED: [E * 2 * O, I],
//     gates first), plain or of packed.cuh with scale [G, rows] float32 and zero [G, rows] int8; tiles [max tiles];
//     out [T * TOP_K, O] in sorted order. I % 8 == 0.
// A block computes ROW_BLOCKS * 16 outputs of one tile (GATED: half as many, a gate and its up on two sides of a row block), its
// warps sharing the k range. Grid: (tiles, outputs over that); tiles come first, so that those of one expert run together and find its
// weights in the second-level cache.
// Defines: SCALAR, CODES, GROUP (a multiple of 32, 0 = the whole row), HAS_ZERO, WHOLE_CHUNKS, NUM_WARPS, ROW_BLOCKS, UNROLL, GATED,
//     ACTIVATION, GATHERS, TOP_K.
// Limits: float32 sums in an order that depends on NUM_WARPS and UNROLL alone; gate and up are rounded before they meet.
// Reference: x @ weight.T of each row's expert in float64.
#include "activation.cuh"
#include "expert_weight.cuh"
#include "launch.cuh"
#include "packed_stream.cuh"

constexpr int TOKEN_TILES = 2;
constexpr int BLOCK_OUTPUTS = GATED ? TILE / 2 : TILE;
constexpr int OUTPUTS = ROW_BLOCKS * BLOCK_OUTPUTS;
constexpr int OUTPUT_SUMS = GATED ? 2 : 4;  // of a lane's four in a row block that become outputs

// The weight row of a block's side.
__device__ __forceinline__ int row_of(const ExpertWeight& weight, int block, int side, int group) {
    const int output = static_cast<int>(blockIdx.y) * OUTPUTS + block * BLOCK_OUTPUTS + group;
    return GATED ? weight.row(output, side == 1) : weight.row(output + side * 8, false);
}

// A warp's share of the products of TILES tiles of tokens, to sums [tile and row block][accumulator][lane].
template <int TILES>
__device__ __forceinline__ void sum_products(const StreamedRows& rows, const scalar* const (&tokens)[TILES], int num_chunks, float (*sums)[4][32]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32 mask = nibble_mask(num_chunks);
    Step steps[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) rows.load(warp + i * NUM_WARPS, num_chunks, steps[i]);
    Accumulators<TILES> total = {}, part = {};
    for (int chunk = warp; chunk < num_chunks; chunk += UNROLL * NUM_WARPS) {
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const int current = chunk + i * NUM_WARPS;
            if (current >= num_chunks) continue;
            multiply<TILES>(total, part, steps[i], tokens, current * CHUNK + lane % 4 * PIECE, rows.in_features, mask);
            rows.load(current + UNROLL * NUM_WARPS, num_chunks, steps[i]);
        }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[tile * ROW_BLOCKS + block][i][lane] = GROUP ? total[tile][block][i] : part[tile][block][i];
}

extern "C" __global__ void __launch_bounds__(NUM_WARPS * 32)
stream(const scalar* __restrict__ x, const unsigned char* __restrict__ values, const float* __restrict__ scale,
       const signed char* __restrict__ zero, const int* __restrict__ order, const ExpertTile* __restrict__ tiles,
       scalar* __restrict__ out, int stacked_rows, int out_features, int in_features) {
    __shared__ float sums[NUM_WARPS][TOKEN_TILES * ROW_BLOCKS][4][32];
    let_next_start();
    wait_for_previous();
    const ExpertTile tile = tiles[blockIdx.x];
    if (tile.expert < 0) return;
    const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
    const ExpertWeight weight(values, scale, zero, stacked_rows, out_features, in_features, tile.expert);
    StreamedRows rows{{}, {}, weight.scale, weight.zero, stacked_rows, in_features};
#pragma unroll
    for (int block = 0; block < ROW_BLOCKS; ++block)
#pragma unroll
        for (int side = 0; side < SIDES; ++side) {
            rows.index[block][side] = row_of(weight, block, side, group);
            rows.codes[block][side] = weight.bytes_of(rows.index[block][side]) + member * 16;
        }
    const scalar* tokens[TOKEN_TILES];
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; ++i) {  // what becomes of tokens that do not exist is not read
        const int position = min(tile.first + i * TOKENS + group, tile.stop - 1);
        tokens[i] = x + static_cast<int64>(GATHERS ? order[position] / TOP_K : position) * in_features;
    }
    const int num_chunks = (in_features + CHUNK - 1) / CHUNK, num_tiles = (tile.stop - tile.first + TOKENS - 1) / TOKENS;
    if (num_tiles == 1)
        sum_products<1>(rows, {tokens[0]}, num_chunks, sums[warp]);
    else
        sum_products<TOKEN_TILES>(rows, tokens, num_chunks, sums[warp]);
    __syncthreads();

    // Accumulator i of lane (group, member): row group + 8 * (i / 2) of the block, token 2 * member + i % 2 of the tile.
    for (int index = threadIdx.x; index < num_tiles * ROW_BLOCKS * OUTPUT_SUMS * 32; index += NUM_WARPS * 32) {
        const int which = index / (OUTPUT_SUMS * 32), i = index / 32 % OUTPUT_SUMS, from = index % 32, block = which % ROW_BLOCKS;
        const int position = tile.first + which / ROW_BLOCKS * TOKENS + 2 * (from % 4) + i % 2;
        const int output = static_cast<int>(blockIdx.y) * OUTPUTS + block * BLOCK_OUTPUTS + from / 4 + i / 2 * 8;
        if (position >= tile.stop || output >= out_features) continue;
        const auto total_of = [&](int i) {
            float value = 0.0f;
#pragma unroll
            for (int other = 0; other < NUM_WARPS; ++other) value += sums[other][which][i][from];
            return __fmul_rn(value, weight.row_scale(row_of(weight, block, i / 2, from / 4)));
        };
        float value = total_of(i);
        if constexpr (GATED) value = ACTIVATION(rounded(value)) * rounded(total_of(i + 2));
        assign(out[static_cast<int64>(position) * out_features + output], value);
    }
}
