// SPDX-License-Identifier: Apache-2.0
// Grouped product of tiles of ROWS rows, for prefill: tokens and weights pass through shared memory to the tensor cores.
// Shapes as in experts_stream.cu; I % 8 == 0. A block computes COLUMNS weight rows (GATED: half as many outputs, gates and
// ups) of one tile; 8 warps, two along the rows, four along the columns. Grid: (tiles, outputs over that): tiles come first, so
// that blocks that run together share an expert's weights.
// Defines: SCALAR, CODES, GROUP (a multiple of 32, 0 = the whole row), HAS_ZERO, ROWS (64 or 128), STAGES, GATED, ACTIVATION, GATHERS,
//     TOP_K, SHARED_BYTES, MIN_BLOCKS (of a multiprocessor, which bounds registers), BFLOAT16, KV_FP8 (0).
// What is odd: weights are the 16-row side of the tensor cores' operands and tokens the 8-row side. So a lane that reads 8 neighbouring
// columns of a token has two operands without moving a register, and the same columns of two weight rows, which are codes, become operands
// in place. Plain values go through ldmatrix. A row of tokens in shared memory is 128 bytes, its 16-byte pieces permuted by the row's number,
// so that neither way of reading meets a bank twice. With GATED, each warp holds gates and ups of the same outputs.
// Limits: float32 sums in an order that does not depend on the step; gate and up are rounded before they meet. Scales of whole rows multiply
//     sums, those of groups codes, whose products are rounded to SCALAR: sums of groups would take as many registers again.
// Why our own: which rows belong to which expert is known on the device only. cuBLASLt takes sizes from the host, which would
// have to wait for the router in every layer and could not be captured in a graph.
// Reference: x @ weight.T of each row's expert in float64.
#include "activation.cuh"
#include "attention_instructions.cuh"
#include "expert_weight.cuh"
#include "launch.cuh"
#include "mma.cuh"
#include "packed_operands.cuh"

constexpr int THREADS = 256;
constexpr int COLUMNS = 128;  // weight rows of a block
constexpr int OUTPUTS = GATED ? 64 : 128;
constexpr int DEPTH = 64;  // k range of one stage
constexpr int ROW_BYTES = DEPTH * 2;
constexpr int WEIGHT_BYTES = DEPTH / PIECE * 16 / (CODES ? PIECES : 1);  // of a weight row in a stage
constexpr int LANE_BYTES = WEIGHT_BYTES / 4;
constexpr int STAGE_BYTES = ROWS * ROW_BYTES + COLUMNS * WEIGHT_BYTES;
constexpr int WARP_COLUMNS = 32;
constexpr int WEIGHT_TILES = WARP_COLUMNS / 16;  // of a warp
constexpr int TOKEN_TILES = ROWS / 2 / 8;
constexpr int STAGE_SPREADS = DEPTH / SPREAD;
constexpr int STAGE_GROUPS = GROUP % DEPTH == 0 ? 1 : STAGE_SPREADS;  // at most, of a row in a stage
static_assert(STAGES * STAGE_BYTES <= SHARED_BYTES, "the wrapper's shared-memory size is too small");

// Which output, counted from the block's first, and whether its gate or up, the weight row `column` of the block is.
__device__ __forceinline__ int output_of(int column) {
    return GATED ? column / WARP_COLUMNS * 16 + column % 16 : column;
}
__device__ __forceinline__ bool is_up(int column) { return GATED && column / 16 % 2; }

// Where 16 bytes of tokens, or of plain weights, are. The same piece of eight consecutive rows is at eight different places, as ldmatrix
// needs it; four consecutive pieces of two neighbouring rows are in different halves, for eight lanes that read 16 bytes each.
__device__ __forceinline__ unsigned piece_offset(int row, int piece) {
    return row * ROW_BYTES + (piece ^ (row % 2 * 4 + row % 8 / 2)) * 16;
}

// What a thread copies of each stage: the same 16 bytes of some rows of x, and the same bytes of some weight rows.
struct Copies {
    static constexpr int ROW_PIECES = ROW_BYTES / 16, WEIGHT_PIECES = CODES ? 4 : ROW_PIECES;
    static constexpr int TOKEN_STEP = THREADS / ROW_PIECES, WEIGHT_STEP = THREADS / WEIGHT_PIECES;  // from one row to the next
    static constexpr int OUTPUT_STEP = GATED ? WEIGHT_STEP / 2 : WEIGHT_STEP;
    static constexpr uint32 NONE = ~0u;
    static_assert(WEIGHT_STEP % WARP_COLUMNS == 0, "weight rows of a thread are as far apart as their outputs");

    const uint4* x;
    uint32 token[ROWS / TOKEN_STEP];  // first piece of a row of x
    const unsigned char* weight;
    uint32 weight_step;
    int outputs, in_features;  // outputs from the first weight row's on
    unsigned token_place, weight_place;

    __device__ __forceinline__ Copies(const scalar* x, const ExpertWeight& from, const ExpertTile& tile, const int* order, int first_output)
        : x(reinterpret_cast<const uint4*>(x)), in_features(from.in_features) {
        const int row = threadIdx.x / ROW_PIECES, piece = threadIdx.x % ROW_PIECES;
#pragma unroll
        for (int i = 0; i < ROWS / TOKEN_STEP; ++i) {
            const int position = tile.first + row + i * TOKEN_STEP;
            const bool is_inside = position < tile.stop;
            token[i] = is_inside ? static_cast<uint32>(GATHERS ? order[position] / TOP_K : position) * (in_features / PIECE) + piece : NONE;
        }
        token_place = piece_offset(row, piece);
        const int column = threadIdx.x / WEIGHT_PIECES, lane = threadIdx.x % WEIGHT_PIECES;
        const int output = first_output + output_of(column);
        outputs = from.out_features - output;
        weight = from.bytes_of(from.row(output, is_up(column))) + lane * 16;
        weight_step = OUTPUT_STEP * from.row_bytes;
        weight_place = ROWS * ROW_BYTES + (CODES ? column * WEIGHT_BYTES + lane * LANE_BYTES : piece_offset(column, lane));
    }

    __device__ __forceinline__ void copy(unsigned stage, int k) const {
        const bool is_column = k + static_cast<int>(threadIdx.x) % ROW_PIECES * PIECE < in_features;
#pragma unroll
        for (int i = 0; i < ROWS / TOKEN_STEP; ++i) {
            const bool valid = is_column && token[i] != NONE;
            copy_16_bytes(stage + token_place + i * TOKEN_STEP * ROW_BYTES, x + (valid ? token[i] + k / PIECE : 0), valid);
        }
        const unsigned char* const from = weight + (CODES ? k / CHUNK * CHUNK_BYTES + k % CHUNK / DEPTH * LANE_BYTES : k * 2);
#pragma unroll
        for (int i = 0; i < COLUMNS / WEIGHT_STEP; ++i) {
            const bool valid = i * OUTPUT_STEP < outputs && (CODES || is_column);
            const unsigned to = stage + weight_place + i * WEIGHT_STEP * WEIGHT_BYTES;
            const unsigned char* const at = valid ? from + i * weight_step : weight;
            if constexpr (CODES && LANE_BYTES == 8)
                copy_8_bytes(to, at, valid);
            else
                copy_16_bytes(to, at, valid);
        }
    }
};

// Rows lane / 4 and lane / 4 + 8 of a warp's weight tiles: where they are, and their scales and zero points in one stage.
struct WeightRows {
    int row[WEIGHT_TILES][2];
    float scale[STAGE_GROUPS][WEIGHT_TILES][2];
    uint32 offset[STAGE_GROUPS][WEIGHT_TILES][2];

    __device__ __forceinline__ WeightRows(const ExpertWeight& weight, int first_output, int first_column) {
#pragma unroll
        for (int tile = 0; tile < WEIGHT_TILES; ++tile)
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const int column = first_column + tile * 16 + side * 8;
                row[tile][side] = weight.row(first_output + output_of(column), is_up(column));
            }
    }

    __device__ __forceinline__ void load_scales(const ExpertWeight& weight, int k) {
        if constexpr (GROUP == 0 && !HAS_ZERO) return;
#pragma unroll
        for (int g = 0; g < STAGE_GROUPS; ++g) {
            const uint32 group = GROUP ? min(k + g * SPREAD, weight.in_features - 1) / (GROUP ? GROUP : 1) : 0;
#pragma unroll
            for (int tile = 0; tile < WEIGHT_TILES; ++tile)
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    const uint32 at = weight.scale_at(group, row[tile][side]);
                    if constexpr (GROUP != 0) scale[g][tile][side] = weight.scale[at];
                    if constexpr (HAS_ZERO) offset[g][tile][side] = zero_offset(weight.zero[at]);
                }
        }
    }
};

using Sums = float[WEIGHT_TILES][TOKEN_TILES][4];
using WeightOperands = uint32[WEIGHT_TILES][2][4];  // two mma for a spread

// A lane's 8 columns of a weight row as operand words.
__device__ __forceinline__ void load_codes(const unsigned char* at, uint32 offset, float scale, uint32 mask, uint32 (&pairs)[4]) {
    uint32 codes[PIECE_WORDS];
#pragma unroll
    for (int i = 0; i < PIECE_WORDS; ++i) codes[i] = reinterpret_cast<const uint32*>(at)[i];
    operands(codes, offset, mask, pairs);
    if constexpr (GROUP != 0)
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[i] = pack(unpack(pairs[i], 0) * scale, unpack(pairs[i], 1) * scale);
}

__device__ __forceinline__ void load_weights(const unsigned char* weights, const WeightRows& rows, int spread, uint32 mask, WeightOperands& to) {
    const int lane = threadIdx.x % 32, g = STAGE_GROUPS == 1 ? 0 : spread;
#pragma unroll
    for (int tile = 0; tile < WEIGHT_TILES; ++tile) {
        if constexpr (CODES == 0) {
#pragma unroll
            for (int half = 0; half < 2; ++half)
                load_matrices(to[tile][half], shared_address(weights + piece_offset(tile * 16 + lane % 16, spread * 4 + half * 2 + lane / 16)));
        } else {
            uint32 pairs[2][4];
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const int row = tile * 16 + side * 8 + lane / 4;
                load_codes(weights + row * WEIGHT_BYTES + lane % 4 * LANE_BYTES + spread * PIECE_WORDS * 4,
                           HAS_ZERO ? rows.offset[g][tile][side] : zero_offset(0), GROUP ? rows.scale[g][tile][side] : 1.0f, mask, pairs[side]);
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) to[tile][i / 4][i % 4] = pairs[i % 2][i / 2];
        }
    }
}

// The same columns of a tile of 8 tokens: word pairs of two mma.
__device__ __forceinline__ Words load_tokens(const unsigned char* tokens, int spread) {
    const int lane = threadIdx.x % 32;
    if constexpr (CODES != 0) return words(*reinterpret_cast<const uint4*>(tokens + piece_offset(lane / 4, spread * 4 + lane % 4)));
    Words result;
    load_matrices(result.at, shared_address(tokens + piece_offset(lane % 8, spread * 4 + lane / 8)));
    return result;
}

__device__ __forceinline__ void multiply_stage(const unsigned char* tokens, const unsigned char* weights, const WeightRows& rows, uint32 mask,
                                               Sums& sums) {
#pragma unroll
    for (int spread = 0; spread < STAGE_SPREADS; ++spread) {
        WeightOperands weight;
        load_weights(weights, rows, spread, mask, weight);
#pragma unroll
        for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
            const Words token = load_tokens(tokens + token_tile * 8 * ROW_BYTES, spread);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint32 b[2] = {token.at[half * 2], token.at[half * 2 + 1]};
#pragma unroll
                for (int tile = 0; tile < WEIGHT_TILES; ++tile) mma_16x8x16(sums[tile][token_tile], weight[tile][half], b, scalar());
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
multiply_tiles(const scalar* __restrict__ x, const unsigned char* __restrict__ values, const float* __restrict__ scale,
               const signed char* __restrict__ zero, const int* __restrict__ order, const ExpertTile* __restrict__ tiles,
               scalar* __restrict__ out, int stacked_rows, int out_features, int in_features) {
    DYNAMIC_SHARED(stages);
    let_next_start();
    wait_for_previous();
    const ExpertTile tile = tiles[blockIdx.x];
    if (tile.expert < 0) return;
    const int first_output = static_cast<int>(blockIdx.y) * OUTPUTS;
    const ExpertWeight weight(values, scale, zero, stacked_rows, out_features, in_features, tile.expert);
    const Copies copies(x, weight, tile, order, first_output);
    const unsigned start = shared_address(stages);
    const int num_steps = (in_features + DEPTH - 1) / DEPTH;
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < num_steps) copies.copy(start + step * STAGE_BYTES, step * DEPTH);
        commit_copies();
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = lane / 4, member = lane % 4;
    const int warp_row = warp / 4 * (ROWS / 2), warp_column = warp % 4 * WARP_COLUMNS;
    const uint32 mask = nibble_mask(in_features);
    WeightRows rows(weight, first_output, warp_column + group);
    Sums sums = {};
    for (int step = 0; step < num_steps; ++step) {
        rows.load_scales(weight, step * DEPTH);
        wait_for_copies_but<STAGES - 2>();
        __syncthreads();  // the step's stage has landed for all, and the one that is filled next is no longer read
        const int next = step + STAGES - 1;
        if (next < num_steps) copies.copy(start + next % STAGES * STAGE_BYTES, next * DEPTH);
        commit_copies();
        const unsigned char* const stage = stages + step % STAGES * STAGE_BYTES;
        multiply_stage(stage + warp_row * ROW_BYTES, stage + ROWS * ROW_BYTES + warp_column * WEIGHT_BYTES, rows, mask, sums);
    }
    // Accumulator i of a lane: weight row lane / 4 + 8 * (i / 2), token 2 * (lane % 4) + i % 2 of the tiles.
#pragma unroll
    for (int weight_tile = 0; weight_tile < (GATED ? 1 : WEIGHT_TILES); ++weight_tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int side = i / 2, output = first_output + output_of(warp_column + group + weight_tile * 16 + side * 8);
            if (output >= out_features) continue;
            const float factor = weight.row_scale(rows.row[weight_tile][side]), up_factor = weight.row_scale(rows.row[WEIGHT_TILES - 1][side]);
#pragma unroll
            for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
                const int position = tile.first + warp_row + token_tile * 8 + member * 2 + i % 2;
                if (position >= tile.stop) continue;
                float value = sums[weight_tile][token_tile][i] * factor;
                if constexpr (GATED) value = ACTIVATION(rounded(value)) * rounded(sums[WEIGHT_TILES - 1][token_tile][i] * up_factor);
                assign(out[static_cast<int64>(position) * out_features + output], value);
            }
        }
}
