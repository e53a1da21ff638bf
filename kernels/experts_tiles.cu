// SPDX-License-Identifier: Apache-2.0
// Grouped product of tiles of ROWS rows, for prefill: tokens and weights pass through shared memory to the tensor cores.
// Shapes as in experts_stream.cu; I % 8 == 0. A block computes COLUMNS weight rows (GATED: half as many outputs, gates and
// ups) of one tile; 8 warps, two along the rows, four along the columns. Grid: (tiles, outputs over that): tiles come first, so
// that blocks that run together share an expert's weights.
// Defines: SCALAR, CODES, GROUP (a multiple of 32, 0 = the whole row), HAS_ZERO, ROWS (64 or 128), STAGES, GATED, ACTIVATION, GATHERS,
//     TOP_K, SHARED_BYTES, BFLOAT16, KV_FP8 (0).
// What is odd: a lane reads 8 neighbouring columns of tokens and of weights, as in weight_stream.cuh, so that codes are copied as they
// are and become operands in registers. A row of tokens in shared memory is 128 bytes, whose halves odd rows exchange: 8 lanes read 64
// bytes of each of two rows and meet no bank twice. With GATED, each warp holds gates and ups of the same outputs.
// Limits: float32 sums in an order that does not depend on the step; gate and up are rounded before they meet. Scales of whole rows multiply
//     sums, those of groups codes, whose products are rounded to SCALAR: sums of groups would take as many registers again.
// Why our own: which rows belong to which expert is known on the device only. cuBLASLt takes sizes from the host, which would
// have to wait for the router in every layer and could not be captured in a graph.
// Reference: x @ weight.T of each row's expert in float64.
#include "activation.cuh"
#include "attention_instructions.cuh"
#include "expert_weight.cuh"
#include "launch.cuh"
#include "packed_operands.cuh"
#include "weight_stream.cuh"

constexpr int THREADS = 256;
constexpr int COLUMNS = 128;  // weight rows of a block
constexpr int OUTPUTS = GATED ? 64 : 128;
constexpr int DEPTH = 64;  // k range of one stage
constexpr int ROW_BYTES = DEPTH * 2;
constexpr int WEIGHT_BYTES = DEPTH / PIECE * 16 / (CODES ? PIECES : 1);  // of a weight row in a stage
constexpr int LANE_BYTES = WEIGHT_BYTES / 4;
constexpr int STAGE_BYTES = ROWS * ROW_BYTES + COLUMNS * WEIGHT_BYTES;
constexpr int ROW_TILES = ROWS / 32;  // of 16 rows in a warp
constexpr int WARP_COLUMNS = 32;
constexpr int COLUMN_TILES = WARP_COLUMNS / TILE;
constexpr int STAGE_SPREADS = DEPTH / SPREAD;
constexpr int STAGE_GROUPS = GROUP % DEPTH == 0 ? 1 : STAGE_SPREADS;  // at most, of a row in a stage
static_assert(STAGES * STAGE_BYTES <= SHARED_BYTES, "the wrapper's shared-memory size is too small");

// Which output, counted from the block's first, and whether its gate or up, the weight row `column` of the block is.
__device__ __forceinline__ int output_of(int column) {
    return GATED ? column / WARP_COLUMNS * 16 + column % 16 : column;
}
__device__ __forceinline__ bool is_up(int column) { return GATED && column / 16 % 2; }

// Of 16 bytes of tokens, or of plain weights, in a stage.
__device__ __forceinline__ unsigned piece_offset(int row, int piece) { return row * ROW_BYTES + (piece ^ row % 2 * 4) * 16; }

struct Operands {
    const scalar* x;
    const ExpertWeight& weight;
    const int* source;  // in shared memory: row of x for each row of the tile, -1 past its end
    int first_output;

    __device__ __forceinline__ int weight_row(int column) const { return weight.row(first_output + output_of(column), is_up(column)); }
};

__device__ __forceinline__ void copy_stage(const Operands& o, unsigned stage, int k) {
    constexpr int ROW_PIECES = ROW_BYTES / 16, COPIES = CODES ? 4 : ROW_PIECES;
    const int in_features = o.weight.in_features;
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * ROW_PIECES; i += THREADS) {
        const int row = i / ROW_PIECES, piece = i % ROW_PIECES, from = k + piece * PIECE;
        const bool valid = o.source[row] >= 0 && from < in_features;
        const scalar* const at = valid ? o.x + static_cast<int64>(o.source[row]) * in_features + from : o.x;
        copy_16_bytes(stage + piece_offset(row, piece), at, valid);
    }
    const unsigned weights = stage + ROWS * ROW_BYTES;
#pragma unroll
    for (int i = threadIdx.x; i < COLUMNS * COPIES; i += THREADS) {
        const int column = i / COPIES, piece = i % COPIES;
        const bool is_output = o.first_output + output_of(column) < o.weight.out_features;
        const unsigned char* const row = o.weight.bytes_of(o.weight_row(column));
        if constexpr (CODES == 0) {
            const bool valid = is_output && k + piece * PIECE < in_features;
            copy_16_bytes(weights + piece_offset(column, piece), valid ? row + (k + piece * PIECE) * sizeof(scalar) : row, valid);
        } else {
            const unsigned char* const from = row + k / CHUNK * CHUNK_BYTES + piece * 16 + k % CHUNK / DEPTH * LANE_BYTES;
            const unsigned to = weights + column * WEIGHT_BYTES + piece * LANE_BYTES;
            if constexpr (LANE_BYTES == 8)
                copy_8_bytes(to, from, is_output);
            else
                copy_16_bytes(to, from, is_output);
        }
    }
}

// Scales and zero points of a lane's weight rows in one stage.
struct StageScales {
    float scale[STAGE_GROUPS][COLUMN_TILES];
    uint32 offset[STAGE_GROUPS][COLUMN_TILES];

    __device__ __forceinline__ void load(const Operands& o, int first_column, int k) {
        if constexpr (GROUP == 0 && !HAS_ZERO) return;
#pragma unroll
        for (int g = 0; g < STAGE_GROUPS; ++g)
#pragma unroll
            for (int tile = 0; tile < COLUMN_TILES; ++tile) {
                const int column = min(k + g * SPREAD, o.weight.in_features - 1);
                const uint32 at = o.weight.scale_at(GROUP ? column / (GROUP ? GROUP : 1) : 0, o.weight_row(first_column + tile * TILE));
                if constexpr (GROUP != 0) scale[g][tile] = o.weight.scale[at];
                if constexpr (HAS_ZERO) offset[g][tile] = zero_offset(o.weight.zero[at]);
            }
    }
};

using Sums = float[ROW_TILES][COLUMN_TILES][4];

__device__ __forceinline__ Words load_words(const unsigned char* at) { return words(*reinterpret_cast<const uint4*>(at)); }

// A lane's 8 columns of weight row `column`, of those that four lanes have at once.
__device__ __forceinline__ Words load_weight(const unsigned char* weights, int column, int spread, const StageScales& scales, int tile,
                                             uint32 mask) {
    const int member = threadIdx.x % 4, g = STAGE_GROUPS == 1 ? 0 : spread;
    if constexpr (CODES == 0) return load_words(weights + piece_offset(column, spread * 4 + member));
    uint32 codes[PIECE_WORDS];
#pragma unroll
    for (int i = 0; i < PIECE_WORDS; ++i)
        codes[i] = reinterpret_cast<const uint32*>(weights + column * WEIGHT_BYTES + member * LANE_BYTES)[spread * PIECE_WORDS + i];
    Words result;
    operands(codes, HAS_ZERO ? scales.offset[g][tile] : zero_offset(0), mask, result.at);
    if constexpr (GROUP != 0)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            result.at[i] = pack(unpack(result.at[i], 0) * scales.scale[g][tile], unpack(result.at[i], 1) * scales.scale[g][tile]);
    return result;
}

// `first_row`, `first_column`: the lane's own of the warp's first tiles.
__device__ __forceinline__ void multiply_stage(const unsigned char* stage, int first_row, int first_column, const StageScales& scales,
                                               uint32 mask, Sums& sums) {
    const int member = threadIdx.x % 4;
#pragma unroll
    for (int spread = 0; spread < STAGE_SPREADS; ++spread) {
        Words weight[COLUMN_TILES];
#pragma unroll
        for (int tile = 0; tile < COLUMN_TILES; ++tile)
            weight[tile] = load_weight(stage + ROWS * ROW_BYTES, first_column + tile * TILE, spread, scales, tile, mask);
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
            const unsigned char* const row = stage + piece_offset(first_row + tile * 16, spread * 4 + member);
            const Words low = load_words(row), high = load_words(row + 8 * ROW_BYTES);
#pragma unroll
            for (int column = 0; column < COLUMN_TILES; ++column) multiply(sums[tile][column], low, high, weight[column]);
        }
    }
}

__device__ __forceinline__ void store_pair(int out_features, scalar* row, int output, float first, float second) {
    if (output < out_features) assign(row[output], first);
    if (output + 1 < out_features) assign(row[output + 1], second);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
multiply_tiles(const scalar* __restrict__ x, const unsigned char* __restrict__ values, const float* __restrict__ scale,
               const signed char* __restrict__ zero, const int* __restrict__ order, const ExpertTile* __restrict__ tiles,
               scalar* __restrict__ out, int stacked_rows, int out_features, int in_features) {
    DYNAMIC_SHARED(stages);
    __shared__ int source[ROWS];
    let_next_start();
    wait_for_previous();
    const ExpertTile tile = tiles[blockIdx.x];
    if (tile.expert < 0) return;
    for (int row = threadIdx.x; row < ROWS; row += THREADS) {
        const int position = tile.first + row;
        source[row] = position >= tile.stop ? -1 : GATHERS ? order[position] / TOP_K : position;
    }
    __syncthreads();
    const ExpertWeight weight(values, scale, zero, stacked_rows, out_features, in_features, tile.expert);
    const Operands operands = {x, weight, source, static_cast<int>(blockIdx.y) * OUTPUTS};
    const unsigned start = shared_address(stages);
    const int num_steps = (in_features + DEPTH - 1) / DEPTH;
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < num_steps) copy_stage(operands, start + step * STAGE_BYTES, step * DEPTH);
        commit_copies();
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = lane / 4, member = lane % 4;
    const int warp_row = warp / 4 * (ROWS / 2), warp_column = warp % 4 * WARP_COLUMNS;
    const uint32 mask = nibble_mask(in_features);
    StageScales scales;
    Sums sums = {};
    for (int step = 0; step < num_steps; ++step) {
        scales.load(operands, warp_column + group, step * DEPTH);
        wait_for_copies_but<STAGES - 2>();
        __syncthreads();  // the step's stage has landed for all, and the one that is filled next is no longer read
        const int next = step + STAGES - 1;
        if (next < num_steps) copy_stage(operands, start + next % STAGES * STAGE_BYTES, next * DEPTH);
        commit_copies();
        multiply_stage(stages + step % STAGES * STAGE_BYTES, warp_row + group, warp_column + group, scales, mask, sums);
    }
    float factor[COLUMN_TILES][2];
#pragma unroll
    for (int column = 0; column < COLUMN_TILES; ++column)
#pragma unroll
        for (int i = 0; i < 2; ++i) factor[column][i] = weight.row_scale(operands.weight_row(warp_column + column * TILE + member * 2 + i));
#pragma unroll
    for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int position = tile.first + warp_row + row_tile * 16 + half * 8 + group;
            if (position >= tile.stop) continue;
            scalar* const row = out + static_cast<int64>(position) * out_features;
#pragma unroll
            for (int column = 0; column < (GATED ? 2 : COLUMN_TILES); ++column) {
                const int output = operands.first_output + output_of(warp_column) + column * TILE + member * 2;
                float value[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    value[i] = sums[row_tile][column][half * 2 + i] * factor[column][i];
                    if constexpr (GATED) {
                        constexpr int UPS = 2;  // tiles from a gate to its up
                        const float up = sums[row_tile][column + UPS][half * 2 + i] * factor[column + UPS][i];
                        value[i] = ACTIVATION(rounded(value[i])) * rounded(up);
                    }
                }
                store_pair(out_features, row, output, value[0], value[1]);
            }
        }
}
