// SPDX-License-Identifier: Apache-2.0
// Grouped product of tiles of ROWS rows, for prefill: tokens and weights pass through shared memory to the tensor cores.
// Shapes as in experts_stream.cu; I % 8 == 0. A block computes COLUMNS weight rows (GATED: half as many outputs, gates and
// ups) of one tile; 8 warps, two along the rows, four along the columns. Grid: (tiles, outputs over that): tiles come first, so
// that blocks that run together share an expert's weights.
// Defines: SCALAR, ROWS (64 or 128), STAGES, GATED, ACTIVATION, GATHERS, TOP_K, SHARED_BYTES.
// What is odd: a row of shared memory is 128 bytes, its 16-byte pieces permuted by the row's number, so that neither copies
// nor ldmatrix meet a bank twice. With GATED, each warp holds gates and ups of the same outputs.
// Limits: float32 sums in ascending k; gate and up are rounded before they meet.
// Why our own: which rows belong to which expert is known on the device only. cuBLASLt takes sizes from the host, which would
// have to wait for the router in every layer and could not be captured in a graph.
// Reference: x @ weight.T of each row's expert in float64.
#include "activation.cuh"
#include "attention_instructions.cuh"
#include "experts.cuh"
#include "launch.cuh"
#include "mma.cuh"

constexpr int THREADS = 256;
constexpr int COLUMNS = 128;             // weight rows of a block
constexpr int OUTPUTS = GATED ? 64 : 128;
constexpr int DEPTH = 64;                // k range of one stage
constexpr int PIECES = DEPTH / 8;        // of 16 bytes in a row
constexpr int ROW_BYTES = DEPTH * 2;
constexpr int STAGE_BYTES = (ROWS + COLUMNS) * ROW_BYTES;
constexpr int ROW_TILES = ROWS / 32;     // of 16 rows in a warp
constexpr int WARP_COLUMNS = 32;
static_assert(STAGES * STAGE_BYTES + ROW_BYTES <= SHARED_BYTES, "the wrapper's shared-memory size is too small");

// Which output, counted from the block's first, and whether its gate (0) or up (1), the weight row `column` of the block is.
__device__ __forceinline__ int output_of(int column) {
    return GATED ? column / WARP_COLUMNS * 16 + column % 16 : column;
}
__device__ __forceinline__ int kind_of(int column) { return GATED ? column / 16 % 2 : 0; }

__device__ __forceinline__ unsigned piece_offset(int row, int piece) { return row * ROW_BYTES + ((piece ^ (row % 8)) * 16); }

struct Operands {
    const scalar *x, *weight;  // the weight's first row is that of the tile's expert
    const int* source;         // in shared memory: row of x for each row of the tile, -1 past its end
    int first_output, out_features, in_features;
};

__device__ __forceinline__ void copy_stage(const Operands& o, unsigned stage, int k) {
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
        const int row = i / PIECES, piece = i % PIECES, from = k + piece * 8;
        const bool valid = o.source[row] >= 0 && from < o.in_features;
        const scalar* const at = valid ? o.x + static_cast<int64>(o.source[row]) * o.in_features + from : o.x;
        copy_16_bytes(stage + piece_offset(row, piece), at, valid);
    }
#pragma unroll
    for (int i = threadIdx.x; i < COLUMNS * PIECES; i += THREADS) {
        const int column = i / PIECES, piece = i % PIECES, from = k + piece * 8;
        const int output = o.first_output + output_of(column);
        const bool valid = output < o.out_features && from < o.in_features;
        const int64 row = output + static_cast<int64>(kind_of(column)) * o.out_features;
        const scalar* const at = valid ? o.weight + row * o.in_features + from : o.weight;
        copy_16_bytes(stage + ROWS * ROW_BYTES + piece_offset(column, piece), at, valid);
    }
}

using Sums = float[ROW_TILES][WARP_COLUMNS / 8][4];

__device__ __forceinline__ void multiply_stage(unsigned stage, int first_row, int first_column, Sums& sums) {
    const int lane = threadIdx.x % 32;
    const unsigned columns = stage + ROWS * ROW_BYTES;
#pragma unroll
    for (int step = 0; step < DEPTH / 16; ++step) {
        unsigned b[WARP_COLUMNS / 16][4];  // two tiles of 8 columns: their lower and upper halves of k
#pragma unroll
        for (int pair = 0; pair < WARP_COLUMNS / 16; ++pair)
            load_matrices(b[pair], columns + piece_offset(first_column + pair * 16 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
            unsigned a[4];
            load_matrices(a, stage + piece_offset(first_row + tile * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
            for (int column = 0; column < WARP_COLUMNS / 8; ++column) {
                const uint32 pair[2] = {b[column / 2][column % 2 * 2], b[column / 2][column % 2 * 2 + 1]};
                mma_16x8x16(sums[tile][column], a, pair, scalar());
            }
        }
    }
}

__device__ __forceinline__ void store_pair(const Operands& o, scalar* row, int output, float first, float second) {
    if (output < o.out_features) assign(row[output], first);
    if (output + 1 < o.out_features) assign(row[output + 1], second);
}

extern "C" __global__ void __launch_bounds__(THREADS)
multiply_tiles(const scalar* __restrict__ x, const scalar* __restrict__ weight, const int* __restrict__ order,
               const ExpertTile* __restrict__ tiles, scalar* __restrict__ out, int out_features, int in_features) {
    DYNAMIC_SHARED(dynamic);
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
    const unsigned start = (shared_address(dynamic) + ROW_BYTES - 1) / ROW_BYTES * ROW_BYTES;
    const int64 first_row = static_cast<int64>(tile.expert) * (GATED ? 2 : 1) * out_features;
    const Operands operands = {x, weight + first_row * in_features, source, static_cast<int>(blockIdx.y) * OUTPUTS, out_features, in_features};
    const int num_steps = (in_features + DEPTH - 1) / DEPTH;
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < num_steps) copy_stage(operands, start + step * STAGE_BYTES, step * DEPTH);
        commit_copies();
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_row = warp / 4 * (ROWS / 2), warp_column = warp % 4 * WARP_COLUMNS;
    Sums sums = {};
    for (int step = 0; step < num_steps; ++step) {
        wait_for_copies_but<STAGES - 2>();
        __syncthreads();  // the step's stage has landed for all, and nobody reads the one that is filled next
        const int next = step + STAGES - 1;
        if (next < num_steps) copy_stage(operands, start + next % STAGES * STAGE_BYTES, next * DEPTH);
        commit_copies();
        multiply_stage(start + step % STAGES * STAGE_BYTES, warp_row, warp_column, sums);
    }
    const int group = lane / 4, member = lane % 4;
#pragma unroll
    for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int position = tile.first + warp_row + row_tile * 16 + half * 8 + group;
            if (position >= tile.stop) continue;
            scalar* const row = out + static_cast<int64>(position) * out_features;
#pragma unroll
            for (int column = 0; column < (GATED ? 2 : WARP_COLUMNS / 8); ++column) {
                const int output = operands.first_output + output_of(warp_column) + column * 8 + member * 2;
                const float(&sum)[4] = sums[row_tile][column];
                float value[2] = {sum[half * 2], sum[half * 2 + 1]};
                if constexpr (GATED) {
                    const float(&up)[4] = sums[row_tile][column + 2];
#pragma unroll
                    for (int i = 0; i < 2; ++i) value[i] = ACTIVATION(rounded(value[i])) * rounded(up[half * 2 + i]);
                }
                store_pair(operands, row, output, value[0], value[1]);
            }
        }
}
