// SPDX-License-Identifier: Apache-2.0
// Matrix product of 16-bit inputs and packed codes for 1 to 64 tokens: out = x @ w^T (+ bias) with w = (code - zero) * scale, a scale
// (and a zero point) for each GROUP columns of a row; or f(gate) * up when the weight is [gate; up].
// The weight-streaming scheme of gemv.cu. Codes become operands in registers, exactly; a scale multiplies the float32 sum over its
// columns, so that nothing is rounded but the result.
// Shapes: x [T, I], I % 8 == 0; codes [O, ceil(I / CHUNK) * 64] bytes, see packed.cuh; scale [G, O] float32, zero [G, O] int8;
//     bias [O], out [T, O] (GATED: O = 2 F, gates first, out [T, F]); T <= 16 TOKEN_TILES. A block computes ROW_BLOCKS * 8 rows of the
//     weight (GATED: half of them gates), its warps sharing the k range; grid: outputs over those of a block.
// Defines: those of packed.cuh; GROUP (multiple of 32, 0 = the whole row), HAS_ZERO, NUM_WARPS, ROW_BLOCKS, UNROLL, PREFETCH_BYTES (of
//     each row into the second-level cache ahead of time), TOKEN_TILES, MANY (T > 8), GATED, ACTIVATION, HAS_BIAS.
// Limits: float32 sums in an order that depends on NUM_WARPS and UNROLL alone.
// Reference: the values of checkpoints/quantization/group_codes.py, then x @ w.T in float64. Needs sm_80.
#include "activation.cuh"
#include "launch.cuh"
#include "packed_operands.cuh"

constexpr int TILE = 8;                                                 // weight rows of one mma
constexpr int GATES = GATED ? ROW_BLOCKS / 2 : ROW_BLOCKS;              // row blocks whose sums become outputs
constexpr int ROWS = GATES * TILE;                                      // outputs of a block
constexpr int SUMS = TOKEN_TILES * ROW_BLOCKS;                          // accumulators of a warp
constexpr int SCALES = GROUP == 0 || GROUP % CHUNK == 0 ? 1 : GROUP % 64 == 0 ? PIECES / 2 : PIECES;  // of a row in a chunk
constexpr int SPAN = PIECES / SCALES;                                   // pieces that share one

// What a lane holds of one chunk of its rows: codes and zero points of row lane / 4 of each block, scales of the rows of its sums.
struct Step {
    Words codes[ROW_BLOCKS];
    uint32 offset[SCALES][ROW_BLOCKS];
    float scale[SCALES][ROW_BLOCKS][2];
};

struct Weight {
    const unsigned char* __restrict__ codes;
    const float* __restrict__ scale;
    const signed char* __restrict__ zero;
    int rows, in_features, num_chunks;

    // A row of a block, that is, of blocks of gates and then of as many of ups.
    __device__ __forceinline__ int row(int block, int within) const {
        const int output = static_cast<int>(blockIdx.x) * ROWS + block % GATES * TILE + within, outputs = GATED ? rows / 2 : rows;
        return min(output, outputs - 1) + (GATED && block >= GATES ? outputs : 0);
    }

    __device__ __forceinline__ const unsigned char* codes_of(int row) const {
        return codes + static_cast<int64>(row) * num_chunks * CHUNK_BYTES;
    }

    __device__ __forceinline__ void load(int chunk, int group, int member, Step& step) const {
        if (chunk >= num_chunks) return;
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block)
            step.codes[block] = words(load_streaming(codes_of(row(block, group)) + chunk * CHUNK_BYTES + member * 16));
#pragma unroll
        for (int s = 0; s < SCALES; ++s) {
            const int column = min(chunk * CHUNK + s * SPAN * 4 * PIECE, in_features - 1);
            const int64 first = GROUP ? static_cast<int64>(column / (GROUP ? GROUP : 1)) * rows : 0;
#pragma unroll
            for (int block = 0; block < ROW_BLOCKS; ++block) {
                if constexpr (HAS_ZERO) step.offset[s][block] = zero_offset(zero[first + row(block, group)]);
                if constexpr (GROUP != 0)
#pragma unroll
                    for (int i = 0; i < 2; ++i) step.scale[s][block][i] = scale[first + row(block, 2 * member + i)];
            }
        }
    }
};

struct Inputs {
    Words low, high;
};

__device__ __forceinline__ Words load_tokens(const scalar* x, int token, int num_tokens, int in_features, int column) {
    if (token >= num_tokens || column >= in_features) return {};
    return words(*reinterpret_cast<const uint4*>(x + static_cast<int64>(token) * in_features + column));
}

__device__ __forceinline__ void multiply(float (&sum)[4], const Inputs& x, const uint32 (&weight)[4]) {
#pragma unroll
    for (int half = 0; half < 4; half += 2) {
        const uint32 a[4] = {x.low.at[half], x.high.at[half], x.low.at[half + 1], x.high.at[half + 1]};
        const uint32 b[2] = {weight[half], weight[half + 1]};
        mma_16x8x16(sum, a, b, scalar());
    }
}

using Accumulators = float[TOKEN_TILES][ROW_BLOCKS][4];

__device__ __forceinline__ void add_scaled(Accumulators& total, Accumulators& part, const float (&scale)[ROW_BLOCKS][2]) {
#pragma unroll
    for (int tile = 0; tile < TOKEN_TILES; ++tile)
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                total[tile][block][i] += part[tile][block][i] * scale[block][i % 2];
                part[tile][block][i] = 0.0f;
            }
}

extern "C" __global__ void __launch_bounds__(NUM_WARPS * 32)
gemv_packed(const scalar* __restrict__ x, const unsigned char* __restrict__ codes, const float* __restrict__ scale,
            const signed char* __restrict__ zero, const scalar* __restrict__ bias, scalar* __restrict__ out, int num_tokens, int rows,
            int in_features) {
    __shared__ float sums[NUM_WARPS][SUMS][4][32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = lane / 4, member = lane % 4;
    const Weight weight{codes, scale, zero, rows, in_features, (in_features + CHUNK - 1) / CHUNK};

    // Weights do not depend on the previous kernel: the first loads start before it ends.
    let_next_start();
    Step steps[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) weight.load(warp + i * NUM_WARPS, group, member, steps[i]);
    if (warp == 0 && member == 0) {
        const int from = min(UNROLL * NUM_WARPS, weight.num_chunks) * CHUNK_BYTES;
        const int num_bytes = min(weight.num_chunks * CHUNK_BYTES - from, PREFETCH_BYTES);
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block)
            if (num_bytes > 0) prefetch(weight.codes_of(weight.row(block, group)) + from, num_bytes);
    }
    wait_for_previous();

    Accumulators total = {}, part = {};
    for (int chunk = warp; chunk < weight.num_chunks; chunk += UNROLL * NUM_WARPS) {
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const int current = chunk + i * NUM_WARPS;
            if (current >= weight.num_chunks) continue;
            const Step& step = steps[i];
#pragma unroll
            for (int piece = 0; piece < PIECES; ++piece) {
                const int column = current * CHUNK + piece * 4 * PIECE + member * PIECE;
                Inputs inputs[TOKEN_TILES] = {};
#pragma unroll
                for (int tile = 0; tile < TOKEN_TILES; ++tile) {
                    inputs[tile].low = load_tokens(x, tile * 16 + group, num_tokens, in_features, column);
                    if constexpr (MANY) inputs[tile].high = load_tokens(x, tile * 16 + group + 8, num_tokens, in_features, column);
                }
#pragma unroll
                for (int block = 0; block < ROW_BLOCKS; ++block) {
                    uint32 pairs[4];
                    operands(step.codes[block].at + piece * PIECE_WORDS, HAS_ZERO ? step.offset[piece / SPAN][block] : zero_offset(0), pairs);
#pragma unroll
                    for (int tile = 0; tile < TOKEN_TILES; ++tile) multiply(part[tile][block], inputs[tile], pairs);
                }
                if (GROUP != 0 && piece % SPAN == SPAN - 1) add_scaled(total, part, step.scale[piece / SPAN]);
            }
        }
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) weight.load(chunk + (UNROLL + i) * NUM_WARPS, group, member, steps[i]);
    }
#pragma unroll
    for (int tile = 0; tile < TOKEN_TILES; ++tile)
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                sums[warp][tile * ROW_BLOCKS + block][i][lane] = GROUP ? total[tile][block][i] : part[tile][block][i];
    __syncthreads();

    // Accumulator i of lane (group, member): token group + 8 * (i / 2), row 2 * member + i % 2 of the tile.
    const int outputs = GATED ? rows / 2 : rows;
    for (int index = threadIdx.x; index < TOKEN_TILES * GATES * 128; index += NUM_WARPS * 32) {
        const int which = index / 128, i = index / 32 % 4, from = index % 32;
        const int token = which / GATES * 16 + from / 4 + 8 * (i / 2), block = which % GATES, within = 2 * (from % 4) + i % 2;
        const int output = blockIdx.x * ROWS + block * TILE + within;
        if (token >= num_tokens || output >= outputs) continue;
        const auto total_of = [&](int block) {
            float value = 0.0f;
#pragma unroll
            for (int other = 0; other < NUM_WARPS; ++other) value += sums[other][which / GATES * ROW_BLOCKS + block][i][from];
            return GROUP ? value : __fmul_rn(value, scale[weight.row(block, within)]);
        };
        float value = total_of(block);
        if constexpr (HAS_BIAS) value = __fadd_rn(value, to_float(bias[output]));
        if constexpr (GATED) value = ACTIVATION(rounded(value)) * rounded(total_of(block + GATES));
        assign(out[static_cast<int64>(token) * outputs + output], value);
    }
}
