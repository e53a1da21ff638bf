// SPDX-License-Identifier: Apache-2.0
// Matrix product of 16-bit inputs and packed codes for 1 to 64 tokens: out = x @ w^T (+ bias) with w = (code - zero) * scale, a scale
// (and a zero point) for each GROUP columns of a row; or f(gate) * up when the weight is [gate; up].
// The weight-streaming scheme of gemv.cu, with rows and tokens the other way round: packed_stream.cuh. Columns of tokens that do not
// exist repeat the last one's, and what becomes of them is not read.
// Shapes: x [T, I], I % 8 == 0; codes [O, ceil(I / CHUNK) * 64] bytes, see packed.cuh; scale [G, O] float32, zero [G, O] int8;
//     bias [O], out [T, O] (GATED: O = 2 F, gates first, out [T, F]); T <= 8 TOKEN_TILES. A block computes ROW_BLOCKS * 16 rows of the
//     weight (GATED: half of them gates), its warps sharing the k range; grid: outputs over those of a block.
// Defines: those of packed.cuh; GROUP (multiple of 32, 0 = the whole row), HAS_ZERO, NUM_WARPS, ROW_BLOCKS, UNROLL, TOKEN_TILES,
//     WHOLE_CHUNKS (I % CHUNK == 0), GATED, ACTIVATION, HAS_BIAS. prefetch_bytes of each row come into the second-level cache ahead of time.
// Limits: float32 sums in an order that depends on NUM_WARPS and UNROLL alone.
// Reference: the values of checkpoints/quantization/group_codes.py, then x @ w.T in float64. Needs sm_80.
#include "activation.cuh"
#include "launch.cuh"
#include "packed_stream.cuh"

constexpr int GATES = GATED ? ROW_BLOCKS / 2 : ROW_BLOCKS;  // row blocks whose sums become outputs
constexpr int ROWS = GATES * TILE;                          // outputs of a block
constexpr int SUMS = TOKEN_TILES * ROW_BLOCKS;              // accumulators of a warp

// The weight row of an output: blocks of gates come before as many of ups.
__device__ __forceinline__ int weight_row(int block, int within, int rows) {
    const int outputs = GATED ? rows / 2 : rows;
    const int output = static_cast<int>(blockIdx.x) * ROWS + block % GATES * TILE + within;
    return min(output, outputs - 1) + (GATED && block >= GATES ? outputs : 0);
}

extern "C" __global__ void __launch_bounds__(NUM_WARPS * 32)
gemv_packed(const scalar* __restrict__ x, const unsigned char* __restrict__ codes, const float* __restrict__ scale,
            const signed char* __restrict__ zero, const scalar* __restrict__ bias, scalar* __restrict__ out, int num_tokens, int rows,
            int in_features, int prefetch_bytes) {
    __shared__ float sums[NUM_WARPS][SUMS][4][32];
    static_assert(sizeof(sums) <= 48 * 1024, "more than a block has on most GPUs unless it is asked for");
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = lane / 4, member = lane % 4;
    const int num_chunks = (in_features + CHUNK - 1) / CHUNK;

    StreamedRows own{{}, {}, scale, zero, rows, in_features};
#pragma unroll
    for (int block = 0; block < ROW_BLOCKS; ++block)
#pragma unroll
        for (int side = 0; side < SIDES; ++side) {
            own.index[block][side] = weight_row(block, group + side * 8, rows);
            own.codes[block][side] = codes + static_cast<int64>(own.index[block][side]) * num_chunks * CHUNK_BYTES + member * 16;
        }

    // Weights do not depend on the previous kernel: the first loads start before it ends.
    let_next_start();
    Step steps[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) own.load(warp + i * NUM_WARPS, num_chunks, steps[i]);
    if (warp == 0 && member == 0) {
        const int from = min(UNROLL * NUM_WARPS, num_chunks) * CHUNK_BYTES;
        const int num_bytes = min(num_chunks * CHUNK_BYTES - from, prefetch_bytes);
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block)
#pragma unroll
            for (int side = 0; side < SIDES; ++side)
                if (num_bytes > 0) prefetch(own.codes[block][side] + from, num_bytes);
    }
    const scalar* tokens[TOKEN_TILES];
#pragma unroll
    for (int tile = 0; tile < TOKEN_TILES; ++tile)
        tokens[tile] = x + static_cast<int64>(min(tile * TOKENS + group, num_tokens - 1)) * in_features;
    const uint32 mask = nibble_mask(num_tokens);
    wait_for_previous();

    Accumulators<TOKEN_TILES> total = {}, part = {};
    for (int chunk = warp; chunk < num_chunks; chunk += UNROLL * NUM_WARPS) {
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const int current = chunk + i * NUM_WARPS;
            if (current >= num_chunks) continue;
            multiply<TOKEN_TILES>(total, part, steps[i], tokens, current * CHUNK + member * PIECE, in_features, mask);
            own.load(current + UNROLL * NUM_WARPS, num_chunks, steps[i]);
        }
    }
#pragma unroll
    for (int tile = 0; tile < TOKEN_TILES; ++tile)
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                sums[warp][tile * ROW_BLOCKS + block][i][lane] = GROUP ? total[tile][block][i] : part[tile][block][i];
    __syncthreads();

    // Accumulator i of lane (group, member): row group + 8 * (i / 2) of the tile, token 2 * member + i % 2.
    const int outputs = GATED ? rows / 2 : rows;
    for (int index = threadIdx.x; index < TOKEN_TILES * GATES * 128; index += NUM_WARPS * 32) {
        const int which = index / 128, i = index / 32 % 4, from = index % 32;
        const int token = which / GATES * TOKENS + 2 * (from % 4) + i % 2, block = which % GATES, within = from / 4 + 8 * (i / 2);
        const int output = blockIdx.x * ROWS + block * TILE + within;
        if (token >= num_tokens || output >= outputs) continue;
        const auto total_of = [&](int block) {
            float value = 0.0f;
#pragma unroll
            for (int other = 0; other < NUM_WARPS; ++other) value += sums[other][which / GATES * ROW_BLOCKS + block][i][from];
            return GROUP ? value : __fmul_rn(value, scale[weight_row(block, within, rows)]);
        };
        float value = total_of(block);
        if constexpr (HAS_BIAS) value = __fadd_rn(value, to_float(bias[output]));
        if constexpr (GATED) value = ACTIVATION(rounded(value)) * rounded(total_of(block + GATES));
        assign(out[static_cast<int64>(token) * outputs + output], value);
    }
}
