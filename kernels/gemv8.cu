// SPDX-License-Identifier: Apache-2.0
// Matrix product of 8-bit codes for 1 to 32 tokens: out = (x @ weight^T) * x_scale[token] * weight_scale[output] (+ bias).
// The weight-streaming scheme of gemv.cu with bytes: a lane reads 16 codes of one weight row, which are the operands of two
// tensor-core instructions, and x with the same permutation of k.
// Shapes: x [T, I], weight [O, I] codes; x_scale [T], weight_scale [O] float32; bias [O], out [T, O]; T <= 16 TOKEN_TILES,
//     I % 64 == 0. A block computes ROW_BLOCKS * 8 outputs, its warps sharing the k range; grid: outputs over that.
// Defines: SCALAR (of bias and out), NUM_WARPS, ROW_BLOCKS, UNROLL, PREFETCH_BYTES (of each row into the second-level cache ahead
//     of time), TOKEN_TILES, MANY (T > 8), HAS_BIAS, QUANTIZED (1 = fp8, 2 = int8).
// Limits: int8 sums are exact. fp8 sums are float32 of a warp's share of k, which the tensor cores of sm_90 accumulate with about
//     13 bits; the shares are short enough (k / NUM_WARPS) that this stays far below the noise of the codes.
// Reference: the products of the codes in float64, then the scales. Needs sm_89 for fp8, sm_80 for int8.
#include "launch.cuh"
#include "mma.cuh"

constexpr int LANE_CODES = 16;                 // 16 bytes
constexpr int CHUNK = 4 * LANE_CODES;          // k range of one step of a warp: two mma
constexpr int TILE = 8;                        // weight rows of one mma
constexpr int STRIDE = NUM_WARPS * CHUNK;      // between a warp's steps
constexpr int ROWS = ROW_BLOCKS * TILE;        // outputs of a block
constexpr int SUMS = TOKEN_TILES * ROW_BLOCKS; // accumulators of a warp

#if QUANTIZED == 2
using accumulator = int;
#else
using accumulator = float;
#endif

struct Words {
    uint32 at[4];
};

__device__ __forceinline__ Words words(uint4 bits) { return {{bits.x, bits.y, bits.z, bits.w}}; }

__device__ __forceinline__ Words load_tokens(const unsigned char* x, int token, int num_tokens, int in_features, int k) {
    if (token >= num_tokens) return {};
    return words(*reinterpret_cast<const uint4*>(x + static_cast<int64>(token) * in_features + k));
}

using Streamed = Words[UNROLL][ROW_BLOCKS];

__device__ __forceinline__ void load_weights(const unsigned char* const (&row)[ROW_BLOCKS], int first, int in_features,
                                             Streamed& streamed) {
#pragma unroll
    for (int step = 0; step < UNROLL; ++step)
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block)
            if (first + step * STRIDE < in_features)
                streamed[step][block] = words(load_streaming(row[block] + first + step * STRIDE));
}

extern "C" __global__ void __launch_bounds__(NUM_WARPS * 32)
gemv8(const unsigned char* __restrict__ x, const float* __restrict__ x_scale, const unsigned char* __restrict__ weight,
      const float* __restrict__ weight_scale, const scalar* __restrict__ bias, scalar* __restrict__ out, int num_tokens,
      int out_features, int in_features) {
    __shared__ accumulator sums[NUM_WARPS][SUMS][4][32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = lane / 4, member = lane % 4;

    const unsigned char* row[ROW_BLOCKS];
#pragma unroll
    for (int block = 0; block < ROW_BLOCKS; ++block) {
        const int output = min(static_cast<int>(blockIdx.x) * ROWS + block * TILE + group, out_features - 1);
        row[block] = weight + static_cast<int64>(output) * in_features;
    }

    // Weights do not depend on the previous kernel: the first loads start before it ends.
    let_next_start();
    int k = warp * CHUNK + member * LANE_CODES;
    Streamed streamed;
    load_weights(row, k, in_features, streamed);
    if (warp == 0 && member == 0) {
        const int from = min(UNROLL * STRIDE, in_features);
        const int num_bytes = min(in_features - from, PREFETCH_BYTES);
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block)
            if (num_bytes > 0) prefetch(row[block] + from, num_bytes);
    }
    wait_for_previous();

    accumulator sum[TOKEN_TILES][ROW_BLOCKS][4] = {};
    while (k < in_features) {
#pragma unroll
        for (int step = 0; step < UNROLL; ++step, k += STRIDE) {
            if (k >= in_features) continue;
#pragma unroll
            for (int tile = 0; tile < TOKEN_TILES; ++tile) {
                const Words low = load_tokens(x, tile * 16 + group, num_tokens, in_features, k);
                Words high = {};
                if constexpr (MANY) high = load_tokens(x, tile * 16 + group + 8, num_tokens, in_features, k);
#pragma unroll
                for (int block = 0; block < ROW_BLOCKS; ++block)
#pragma unroll
                    for (int half = 0; half < 4; half += 2) {
                        const uint32 a[4] = {low.at[half], high.at[half], low.at[half + 1], high.at[half + 1]};
                        const uint32 b[2] = {streamed[step][block].at[half], streamed[step][block].at[half + 1]};
                        mma_16x8x32(sum[tile][block], a, b);
                    }
            }
        }
        load_weights(row, k, in_features, streamed);
    }
#pragma unroll
    for (int tile = 0; tile < TOKEN_TILES; ++tile)
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[warp][tile * ROW_BLOCKS + block][i][lane] = sum[tile][block][i];
    __syncthreads();

    // Accumulator i of lane (group, member): token group + 8 * (i / 2), row 2 * member + i % 2 of the tile.
    for (int index = threadIdx.x; index < SUMS * 128; index += NUM_WARPS * 32) {
        const int which = index / 128, i = index / 32 % 4, from = index % 32;
        const int token = which / ROW_BLOCKS * 16 + from / 4 + 8 * (i / 2);
        const int output = blockIdx.x * ROWS + which % ROW_BLOCKS * TILE + 2 * (from % 4) + i % 2;
        if (token >= num_tokens || output >= out_features) continue;
        accumulator total = 0;
#pragma unroll
        for (int other = 0; other < NUM_WARPS; ++other) total += sums[other][which][i][from];
        float value = __fmul_rn(__fmul_rn(static_cast<float>(total), x_scale[token]), weight_scale[output]);
        if constexpr (HAS_BIAS) value = __fadd_rn(value, to_float(bias[output]));
        assign(out[static_cast<int64>(token) * out_features + output], value);
    }
}
