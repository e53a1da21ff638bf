// SPDX-License-Identifier: Apache-2.0
// Matrix product of 8-bit codes for 1 to 32 tokens: out = (x @ weight^T) * x_scale[token] * weight_scale[output] (+ bias).
// The weight-streaming scheme of gemv.cu with rows and tokens the other way round, as in packed_stream.cuh: rows of the weight are on
// the tensor core's 16-side and tokens on its 8-side. A lane reads 16 codes of each of two rows, and x with the same permutation of k.
// int8 codes are operands as they are. e4m3 becomes float16 first, exactly: sm_90 has no instruction of its own for mma.sync of e4m3 and
// would convert both operands for every product; this way codes of x are converted once for all rows of a lane.
// Columns of tokens that do not exist repeat the last one's, and what becomes of them is not read.
// Shapes: x [T, I], weight [O, I] codes; x_scale [T], weight_scale [O] float32; bias [O], out [T, O]; T <= 8 TOKEN_TILES, I % 64 == 0.
//     A block computes ROW_BLOCKS * 16 outputs, its warps sharing the k range; grid: outputs over that.
// Defines: SCALAR (of bias and out), NUM_WARPS, ROW_BLOCKS (a power of two), UNROLL, TOKEN_TILES, WHOLE_ROUNDS (I is a multiple of
//     NUM_WARPS * UNROLL * 64), HAS_BIAS, QUANTIZED (1 = fp8, 2 = int8). prefetch_bytes of each row come into the second-level cache
//     ahead of time.
// Limits: int8 sums are exact; fp8 sums are float32 of exact products, in an order that depends on NUM_WARPS alone.
// Reference: the products of the codes in float64, then the scales. Needs sm_80.
#include "fp8.cuh"
#include "launch.cuh"
#include "mma.cuh"
#include "words.cuh"

constexpr int LANE_CODES = 16;                                      // 16 bytes
constexpr int CHUNK = 4 * LANE_CODES;                               // k range of one step of a warp
constexpr int STRIDE = NUM_WARPS * CHUNK;                           // between a warp's steps
constexpr int ROUND = UNROLL * STRIDE;                              // k range of a block's warps between two looks at the end
constexpr int TILE = 16;                                            // weight rows of one mma
constexpr int SIDES = 2;                                            // a lane has rows lane / 4 and lane / 4 + 8 of each tile
constexpr int TOKENS = 8;                                           // of one mma
constexpr int ROWS = ROW_BLOCKS * TILE;                             // outputs of a block
constexpr int NUM_THREADS = NUM_WARPS * 32;
constexpr int SPREAD = NUM_THREADS / ROWS;                          // tokens whose outputs the threads write at a time
constexpr int PASSES = (TOKEN_TILES * TOKENS + SPREAD - 1) / SPREAD;
static_assert(NUM_THREADS % ROWS == 0, "each thread writes one output of several tokens");

// Accumulator i of lane (group, member): row group + 8 * (i / 2) of the tile, token 2 * member + i % 2.
template <typename T>
struct alignas(16) Accumulator {
    T at[4];
};

#if QUANTIZED == 2
using accumulator = Accumulator<int>;
#else
using accumulator = Accumulator<float>;
#endif

// What one 16-byte read is to the tensor cores.
struct Operands {
    uint32 at[QUANTIZED == 2 ? 4 : 8];
};

__device__ __forceinline__ Operands operands(const Words& codes) {
    Operands result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (QUANTIZED == 2) {
            result.at[i] = codes.at[i];
        } else {
            uint32 pairs[2];
            e4m3_operands(codes.at[i], pairs);
            result.at[2 * i] = pairs[0];
            result.at[2 * i + 1] = pairs[1];
        }
    }
    return result;
}

__device__ __forceinline__ void multiply(int (&sum)[4], const uint32 (&a)[4], const uint32 (&b)[2]) { mma_16x8x32(sum, a, b); }
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32 (&a)[4], const uint32 (&b)[2]) { mma_16x8x16(sum, a, b, __half()); }

// A lane's codes of one step. Those of x come with the weight's, a round ahead; of more tokens they would take too many registers.
constexpr bool INPUTS_AHEAD = TOKEN_TILES == 1;
struct Step {
    Words rows[ROW_BLOCKS][SIDES];
    Words inputs[INPUTS_AHEAD ? TOKEN_TILES : 1];
};

__device__ __forceinline__ void load_rows(const unsigned char* const (&row)[ROW_BLOCKS][SIDES], int offset, Step& step) {
#pragma unroll
    for (int block = 0; block < ROW_BLOCKS; ++block)
#pragma unroll
        for (int side = 0; side < SIDES; ++side) step.rows[block][side] = words(load_streaming(row[block][side] + offset));
}

__device__ __forceinline__ Words load_inputs(const unsigned char* from) { return words(*reinterpret_cast<const uint4*>(from)); }

// Sums of the warps lie so that threads that write neighbouring outputs read different banks.
__device__ __forceinline__ int place(int lane) { return lane ^ lane / 8; }

// x and its scales are not __restrict__: compilers move loads of what nothing in the kernel writes to before wait_for_previous.
extern "C" __global__ void __launch_bounds__(NUM_THREADS)
gemv8(const unsigned char* x, const float* x_scale, const unsigned char* __restrict__ weight,
      const float* __restrict__ weight_scale, const scalar* __restrict__ bias, scalar* __restrict__ out, int num_tokens,
      int out_features, int in_features, int prefetch_bytes) {
    __shared__ accumulator sums[NUM_WARPS][TOKEN_TILES][ROW_BLOCKS][32];
    static_assert(sizeof(sums) <= 48 * 1024, "more than a block has on most GPUs unless it is asked for");
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = lane / 4, member = lane % 4;
    const int first_output = blockIdx.x * ROWS, own = threadIdx.x % ROWS;
    int k = warp * CHUNK;  // of the warp's first chunk in this round

    const unsigned char* row[ROW_BLOCKS][SIDES];
#pragma unroll
    for (int block = 0; block < ROW_BLOCKS; ++block)
#pragma unroll
        for (int side = 0; side < SIDES; ++side) {
            const int output = min(first_output + block * TILE + side * 8 + group, out_features - 1);
            row[block][side] = weight + static_cast<int64>(output) * in_features + (k + member * LANE_CODES);
        }
    const auto is_inside = [&](int from, int step) { return from + step * STRIDE < in_features; };

    // Weights do not depend on the previous kernel: the first loads start before it ends.
    let_next_start();
    Step steps[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; ++i)
        if (WHOLE_ROUNDS || is_inside(k, i)) load_rows(row, i * STRIDE, steps[i]);
    const int num_bytes = min(in_features - ROUND, prefetch_bytes);
    if (const int ahead = lane * NUM_WARPS + warp; ahead < ROWS && num_bytes > 0)
        prefetch(weight + static_cast<int64>(min(first_output + ahead, out_features - 1)) * in_features + ROUND, num_bytes);
    const int output = min(first_output + own, out_features - 1);
    const int first_token = threadIdx.x / ROWS;
    float own_scale = 0.0f, own_bias = 0.0f, token_scale[PASSES] = {};
    if (first_token < num_tokens) {
        own_scale = load_weight(weight_scale + output);
        if constexpr (HAS_BIAS) own_bias = to_float(load_weight(bias + output));
    }
    const unsigned char* tokens[TOKEN_TILES];
#pragma unroll
    for (int tile = 0; tile < TOKEN_TILES; ++tile)
        tokens[tile] = x + static_cast<int64>(min(tile * TOKENS + group, num_tokens - 1)) * in_features + (k + member * LANE_CODES);
    wait_for_previous();
    if constexpr (INPUTS_AHEAD)
#pragma unroll
        for (int i = 0; i < UNROLL; ++i)
            if (WHOLE_ROUNDS || is_inside(k, i)) steps[i].inputs[0] = load_inputs(tokens[0] + i * STRIDE);
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass)
        if (first_token + pass * SPREAD < num_tokens) token_scale[pass] = x_scale[first_token + pass * SPREAD];

    accumulator sum[TOKEN_TILES][ROW_BLOCKS] = {};
#pragma unroll 1
    for (; k < in_features; k += ROUND) {
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            if (!WHOLE_ROUNDS && !is_inside(k, i)) continue;
            Operands weights[ROW_BLOCKS][SIDES];
#pragma unroll
            for (int block = 0; block < ROW_BLOCKS; ++block)
#pragma unroll
                for (int side = 0; side < SIDES; ++side) weights[block][side] = operands(steps[i].rows[block][side]);
#pragma unroll
            for (int tile = 0; tile < TOKEN_TILES; ++tile) {
                const Operands inputs = operands(INPUTS_AHEAD ? steps[i].inputs[0] : load_inputs(tokens[tile] + i * STRIDE));
#pragma unroll
                for (int block = 0; block < ROW_BLOCKS; ++block)
#pragma unroll
                    for (int pair = 0; pair < static_cast<int>(sizeof(Operands) / sizeof(uint32)); pair += 2) {
                        const uint32 a[4] = {weights[block][0].at[pair], weights[block][1].at[pair], weights[block][0].at[pair + 1],
                                             weights[block][1].at[pair + 1]};
                        const uint32 b[2] = {inputs.at[pair], inputs.at[pair + 1]};
                        multiply(sum[tile][block].at, a, b);
                    }
            }
            if (!is_inside(k + ROUND, WHOLE_ROUNDS ? 0 : i)) continue;
            load_rows(row, ROUND + i * STRIDE, steps[i]);
            if constexpr (INPUTS_AHEAD) steps[i].inputs[0] = load_inputs(tokens[0] + ROUND + i * STRIDE);
        }
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block)
#pragma unroll
            for (int side = 0; side < SIDES; ++side) row[block][side] += ROUND;
#pragma unroll
        for (int tile = 0; tile < TOKEN_TILES; ++tile) tokens[tile] += ROUND;
    }
#pragma unroll
    for (int tile = 0; tile < TOKEN_TILES; ++tile)
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block) sums[warp][tile][block][place(lane)] = sum[tile][block];
    __syncthreads();

#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        const int token = first_token + pass * SPREAD;
        if (token >= num_tokens || first_output + own >= out_features) return;
        const int from = place(own % 8 * 4 + token % TOKENS / 2), i = own % TILE / 8 * 2 + token % 2;
        auto total = sums[0][token / TOKENS][own / TILE][from].at[i];
#pragma unroll
        for (int other = 1; other < NUM_WARPS; ++other) total += sums[other][token / TOKENS][own / TILE][from].at[i];
        float value = __fmul_rn(__fmul_rn(static_cast<float>(total), token_scale[pass]), own_scale);
        if constexpr (HAS_BIAS) value = __fadd_rn(value, own_bias);
        assign(out[static_cast<int64>(token) * out_features + output], value);
    }
}
