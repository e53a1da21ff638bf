// SPDX-License-Identifier: Apache-2.0
// Products that stream a weight of packed.cuh, codes or plain values, from memory into tensor-core operands: a warp's chunks of some rows.
// Rows of the weight are on the tensor core's 16-side and tokens on its 8-side: making operands of 4-bit codes is most of the work, and
// this way an instruction takes twice as many of them, and what a lane reads of a token is two operands as it is. Codes become operands
// exactly; a scale multiplies the float32 sum over its columns, so that nothing is rounded but the result.
// Defines: those of packed_operands.cuh; HAS_ZERO, ROW_BLOCKS (of 16 rows), WHOLE_CHUNKS (I % CHUNK == 0).
#pragma once
#include "packed_operands.cuh"

constexpr int TILE = 16;   // weight rows of one mma
constexpr int TOKENS = 8;  // of one mma
constexpr int SIDES = 2;   // a lane has rows lane / 4 and lane / 4 + 8 of each block

// What a lane holds of one chunk of its rows.
struct Step {
    Words codes[ROW_BLOCKS][SIDES];
    uint32 offset[SCALES][ROW_BLOCKS][SIDES];
    float scale[SCALES][ROW_BLOCKS][SIDES];
};

// A lane's rows.
struct StreamedRows {
    const unsigned char* codes[ROW_BLOCKS][SIDES];  // the lane's bytes of the first chunk
    uint32 index[ROW_BLOCKS][SIDES];                // of their scales
    const float* __restrict__ scale;
    const signed char* __restrict__ zero;
    int count, in_features;  // rows that have scales; columns

    __device__ __forceinline__ void load(int chunk, int num_chunks, Step& step) const {
        if (chunk >= num_chunks) return;
        const bool is_inside = CODES || WHOLE_CHUNKS || chunk * CHUNK + static_cast<int>(threadIdx.x) % 4 * PIECE < in_features;
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block)
#pragma unroll
            for (int side = 0; side < SIDES; ++side)
                step.codes[block][side] =
                    is_inside ? words(load_streaming(codes[block][side] + static_cast<uint32>(chunk) * CHUNK_BYTES)) : Words{};
        if constexpr (GROUP == 0 && !HAS_ZERO) return;
#pragma unroll
        for (int s = 0; s < SCALES; ++s) {
            const uint32 first = group_of(chunk, s, WHOLE_CHUNKS ? ~0u : in_features - 1) * static_cast<uint32>(count);
#pragma unroll
            for (int block = 0; block < ROW_BLOCKS; ++block)
#pragma unroll
                for (int side = 0; side < SIDES; ++side) {
                    if constexpr (HAS_ZERO) step.offset[s][block][side] = zero_offset(zero[first + index[block][side]]);
                    if constexpr (GROUP != 0) step.scale[s][block][side] = scale[first + index[block][side]];
                }
        }
    }
};

// Of TILES tiles of tokens; with groups those of the current one in a second set.
template <int TILES>
using Accumulators = float[TILES][ROW_BLOCKS][4];

template <int TILES>
__device__ __forceinline__ void add_scaled(Accumulators<TILES>& total, Accumulators<TILES>& part, const float (&scale)[ROW_BLOCKS][SIDES]) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                total[tile][block][i] += part[tile][block][i] * scale[block][i / 2];
                part[tile][block][i] = 0.0f;
            }
}

// `x`: the lane's token of each tile; `first_column`: of the lane's first piece.
template <int TILES>
__device__ __forceinline__ void multiply(Accumulators<TILES>& total, Accumulators<TILES>& part, const Step& step, const scalar* const (&x)[TILES],
                                         int first_column, int in_features, uint32 mask) {
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        const int column = first_column + piece * SPREAD;
        Words inputs[TILES] = {};
        if (WHOLE_CHUNKS || column < in_features)
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) inputs[tile] = words(*reinterpret_cast<const uint4*>(x[tile] + column));
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block) {
            uint32 pairs[SIDES][4];
#pragma unroll
            for (int side = 0; side < SIDES; ++side)
                operands(step.codes[block][side].at + piece * PIECE_WORDS,
                         HAS_ZERO ? step.offset[piece / SPAN][block][side] : zero_offset(0), mask, pairs[side]);
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                for (int half = 0; half < 4; half += 2) {
                    const uint32 a[4] = {pairs[0][half], pairs[1][half], pairs[0][half + 1], pairs[1][half + 1]};
                    const uint32 b[2] = {inputs[tile].at[half], inputs[tile].at[half + 1]};
                    mma_16x8x16(part[tile][block], a, b, scalar());
                }
        }
        if (GROUP != 0 && piece % SPAN == SPAN - 1) add_scaled<TILES>(total, part, step.scale[piece / SPAN]);
    }
}
