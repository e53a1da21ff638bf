// SPDX-License-Identifier: Apache-2.0
// Grouped product of tiles of at most 16 rows, for decoding: each chosen expert's weights pass once from memory into
// tensor-core operands (weight_stream.cuh), those of other experts not at all. Codes become operands in registers, exactly, and a
// scale multiplies the float32 sum over its columns, so that nothing is rounded but the result.
// Shapes: x [T, I] (GATHERS: row order[i] / TOP_K) or [T * TOP_K, I] in sorted order; weight [E * O, I] (GATED: [E * 2 * O, I],
//     gates first), plain or of packed.cuh with scale [G, rows] float32 and zero [G, rows] int8; tiles [max tiles];
//     out [T * TOP_K, O] in sorted order. I % 8 == 0.
// A block computes ROW_BLOCKS * 8 outputs of one tile (GATED: half as many), its warps sharing the k range. Grid: (tiles, outputs
// over that); tiles come first, so that those of one expert run together and find its weights in the second-level cache.
// Defines: SCALAR, CODES, GROUP (a multiple of 32, 0 = the whole row), HAS_ZERO, NUM_WARPS, ROW_BLOCKS (GATED: even), UNROLL, GATED,
//     ACTIVATION, GATHERS, TOP_K.
// Limits: float32 sums in an order that depends on NUM_WARPS and UNROLL alone; gate and up are rounded before they meet.
// Reference: x @ weight.T of each row's expert in float64.
#include "activation.cuh"
#include "expert_weight.cuh"
#include "launch.cuh"
#include "packed_operands.cuh"
#include "weight_stream.cuh"

constexpr int GATES = GATED ? ROW_BLOCKS / 2 : ROW_BLOCKS;  // row blocks whose sums become outputs
constexpr int OUTPUTS = GATES * TILE;                       // of a block

// What a lane holds of one chunk: of its weight row in each row block, and the scales of the two rows whose sums it has.
struct Step {
    Words weight[ROW_BLOCKS];
    uint32 offset[SCALES][ROW_BLOCKS];
    float scale[SCALES][ROW_BLOCKS][2];
};

struct LaneRows {
    const unsigned char* bytes[ROW_BLOCKS];  // the lane's own of the first chunk
    int read[ROW_BLOCKS], summed[ROW_BLOCKS][2];

    __device__ __forceinline__ LaneRows(const ExpertWeight& weight, int first_output, int group, int member) {
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block) {
            const int first = first_output + block % GATES * TILE;
            read[block] = weight.row(first + group, block >= GATES);
            bytes[block] = weight.bytes_of(read[block]) + member * 16;
#pragma unroll
            for (int i = 0; i < 2; ++i) summed[block][i] = weight.row(first + 2 * member + i, block >= GATES);
        }
    }

    __device__ __forceinline__ void load(const ExpertWeight& weight, int chunk, int member, Step& step) const {
        const bool is_inside = chunk * CHUNK + (CODES ? 0 : member * PIECE) < weight.in_features;
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block)
            step.weight[block] = is_inside ? words(load_streaming(bytes[block] + static_cast<int64>(chunk) * CHUNK_BYTES)) : Words{};
        if constexpr (GROUP == 0 && !HAS_ZERO) return;
#pragma unroll
        for (int s = 0; s < SCALES; ++s) {
            const uint32 group = group_of(chunk, s, weight.in_features - 1);
#pragma unroll
            for (int block = 0; block < ROW_BLOCKS; ++block) {
                if constexpr (HAS_ZERO)
                    step.offset[s][block] = is_inside ? zero_offset(weight.zero[weight.scale_at(group, read[block])]) : 0;
                if constexpr (GROUP != 0)
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        step.scale[s][block][i] = is_inside ? weight.scale[weight.scale_at(group, summed[block][i])] : 0.0f;
            }
        }
    }
};

using Sums = float[ROW_BLOCKS][4];

__device__ __forceinline__ void add_scaled(Sums& total, Sums& part, const float (&scale)[ROW_BLOCKS][2]) {
#pragma unroll
    for (int block = 0; block < ROW_BLOCKS; ++block)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            total[block][i] += part[block][i] * scale[block][i % 2];
            part[block][i] = 0.0f;
        }
}

__device__ __forceinline__ Words load_words(const scalar* row, int k, int in_features) {
    return row != nullptr && k < in_features ? words(*reinterpret_cast<const uint4*>(row + k)) : Words{};
}

// `k`: the first column of the lane's first piece.
__device__ __forceinline__ void multiply(Sums& total, Sums& part, const Step& step, const scalar* const (&token)[2], int k,
                                         int in_features, uint32 mask) {
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        const int column = k + piece * SPREAD;
        const Words low = load_words(token[0], column, in_features), high = load_words(token[1], column, in_features);
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block) {
            Words weight;
            operands(step.weight[block].at + piece * PIECE_WORDS, HAS_ZERO ? step.offset[piece / SPAN][block] : zero_offset(0), mask,
                     weight.at);
            multiply(part[block], low, high, weight);
        }
        if (GROUP != 0 && piece % SPAN == SPAN - 1) add_scaled(total, part, step.scale[piece / SPAN]);
    }
}

extern "C" __global__ void __launch_bounds__(NUM_WARPS * 32)
stream(const scalar* __restrict__ x, const unsigned char* __restrict__ values, const float* __restrict__ scale,
       const signed char* __restrict__ zero, const int* __restrict__ order, const ExpertTile* __restrict__ tiles,
       scalar* __restrict__ out, int stacked_rows, int out_features, int in_features) {
    __shared__ float sums[NUM_WARPS][ROW_BLOCKS][4][32];
    let_next_start();
    wait_for_previous();
    const ExpertTile tile = tiles[blockIdx.x];
    if (tile.expert < 0) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = lane / 4, member = lane % 4;
    const int first_output = static_cast<int>(blockIdx.y) * OUTPUTS;
    const ExpertWeight weight(values, scale, zero, stacked_rows, out_features, in_features, tile.expert);
    const LaneRows rows(weight, first_output, group, member);
    const scalar* token[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int position = tile.first + group + half * 8;
        token[half] = nullptr;
        if (position < tile.stop) token[half] = x + static_cast<int64>(GATHERS ? order[position] / TOP_K : position) * in_features;
    }
    const uint32 mask = nibble_mask(in_features);

    Sums total = {}, part = {};
    for (int first = warp; first * CHUNK < in_features; first += UNROLL * NUM_WARPS) {
        Step steps[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) rows.load(weight, first + i * NUM_WARPS, member, steps[i]);
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const int chunk = first + i * NUM_WARPS;
            if (chunk * CHUNK < in_features) multiply(total, part, steps[i], token, chunk * CHUNK + member * PIECE, in_features, mask);
        }
    }
#pragma unroll
    for (int block = 0; block < ROW_BLOCKS; ++block)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[warp][block][i][lane] = GROUP ? total[block][i] : part[block][i];
    __syncthreads();

    // Accumulator i of lane (group, member): row group + 8 * (i / 2) of the tile, output 2 * member + i % 2 of the block.
    for (int index = threadIdx.x; index < GATES * 128; index += NUM_WARPS * 32) {
        const int block = index / 128, i = index / 32 % 4, from = index % 32;
        const int position = tile.first + from / 4 + 8 * (i / 2);
        const int output = first_output + block * TILE + 2 * (from % 4) + i % 2;
        if (position >= tile.stop || output >= out_features) continue;
        const auto total_of = [&](int block) {
            float value = 0.0f;
#pragma unroll
            for (int other = 0; other < NUM_WARPS; ++other) value += sums[other][block][i][from];
            return __fmul_rn(value, weight.row_scale(weight.row(output, block >= GATES)));
        };
        float value = total_of(block);
        if constexpr (GATED) value = ACTIVATION(rounded(value)) * rounded(total_of(block + GATES));
        assign(out[static_cast<int64>(position) * out_features + output], value);
    }
}
