// SPDX-License-Identifier: Apache-2.0
// Products of 8-bit codes for many tokens on Hopper's warpgroup matrix instructions, with what follows in the epilogue.
// Shapes: x codes [T, I], x_scale [T]; weight codes [O, I], weight_scale [O]; bias [O]; out [T, O]:
//     out = (x @ weight.T) * x_scale * weight_scale + bias.
// With GATED weight = [gate; up], O = 2 F, out [T, F] = f(gate product) * up product, both rounded to storage first.
// Defines: SCALAR (16 bits), QUANTIZED (1 = fp8, 2 = int8), GATED, ACTIVATION, HAS_BIAS (not with GATED), CLUSTER (2), SHARED_BYTES.
// I % 16 == 0; columns of out % 8 == 0. Grid: 2 blocks a cluster, as many clusters as there is room for.
//
// A cluster computes 256 tokens by 256 weight rows, each of its two blocks half of the tokens; the copy engine brings a weight tile to both at
// once. A block has a feeding warp and two computing warpgroups of 64 tokens by 256 weight rows each. The second one starts LEAD stages late and
// tends to stay behind, so that one's epilogue runs under the other's products. The ring of operands goes on across tiles.
//
// Tiles run in bands of `band` clusters' tokens, tokens first, so that what runs together shares both operands in the second-level cache.
// Sums of fp8 have the tensor cores' 13 bits, as cuBLASLt's fast accumulation; those of int8 are exact.
// Reference: x @ weight.T in float64; activation.cu's gated after it.
#define BFLOAT16 0  // attention_instructions.cuh wants one; its elements are not used here
#include "activation.cuh"
#include "cluster.cuh"
#include "dtype.cuh"
#include "launch.cuh"
#include "ring_cursor.cuh"
#include "tensor_copy.cuh"
#include "warpgroup.cuh"

constexpr int GROUPS = 2;  // computing warpgroups
constexpr int THREADS = 128 + GROUPS * 128;
constexpr int DEPTH = 128;  // codes of a row in a stage: one swizzled column
constexpr int TOKENS = 64 * GROUPS, WEIGHT_ROWS = 256, HALF = WEIGHT_ROWS / 2;  // of a block; half of the weight rows is what one block copies
constexpr int OUTPUTS = GATED ? HALF : WEIGHT_ROWS;
constexpr int TOKEN_BYTES = TOKENS * DEPTH, HALF_BYTES = HALF * DEPTH, STAGE_BYTES = TOKEN_BYTES + 2 * HALF_BYTES;
constexpr int STAGES = 4, LEAD = 2;
constexpr int LEAD_BARRIER = 1 + GROUPS;  // of the hardware's; 0 is __syncthreads', the next ones are the warpgroups' own
constexpr int STORED_COLUMNS = 64;                       // of a box that is stored: 128 bytes
constexpr int STORED_BYTES = 64 * STORED_COLUMNS * 2;
constexpr int STORED_BOXES = HALF / STORED_COLUMNS;      // that a warpgroup stages at a time
constexpr int FEEDER_REGISTERS = 24, COMPUTE_REGISTERS = 240;
constexpr int REGISTERS = 65536 / THREADS / 8 * 8;  // of each thread at the start
static_assert(FEEDER_REGISTERS + GROUPS * COMPUTE_REGISTERS <= (1 + GROUPS) * REGISTERS, "computing warpgroups would wait for registers forever");

#if QUANTIZED == 2
using Value = int;
#else
using Value = float;
#endif
using Sums = Value[WEIGHT_ROWS / 8][4];

struct Shared {
    alignas(1024) unsigned char ring[STAGES][STAGE_BYTES];  // tokens, then weight rows
    alignas(1024) unsigned char stored[GROUPS][STORED_BOXES][STORED_BYTES];
    float2 weight_scale[GROUPS][WEIGHT_ROWS / 2];  // of the tile that a warpgroup finishes
    alignas(8) unsigned long long full[STAGES], empty[STAGES];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "the wrapper's shared-memory size is too small");

struct Sizes {
    int num_tokens, out_columns, in_features, band;

    __device__ __forceinline__ int token_tiles() const { return (num_tokens + CLUSTER * TOKENS - 1) / (CLUSTER * TOKENS); }
    __device__ __forceinline__ int column_tiles() const { return (out_columns + OUTPUTS - 1) / OUTPUTS; }
    __device__ __forceinline__ int tiles() const { return token_tiles() * column_tiles(); }
    __device__ __forceinline__ int stages() const { return (in_features + DEPTH - 1) / DEPTH; }
};

// What a block computes: TOKENS rows by OUTPUTS columns of out.
struct Tile {
    int first_token, first_column;

    __device__ __forceinline__ Tile(const Sizes& sizes, int index) {
        const int in_band = sizes.band * sizes.column_tiles();
        const int first = index / in_band * sizes.band, rest = index % in_band;
        const int rows = min(sizes.token_tiles() - first, sizes.band);
        first_token = ((first + rest % rows) * CLUSTER + cluster_rank()) * TOKENS;
        first_column = rest / rows * OUTPUTS;
    }
};

// One thread: keeps the ring full. Each block of a cluster copies one half of the weight rows to both.
__device__ __forceinline__ void feed(Shared& shared, const TensorMap& x, const TensorMap& weight, const Sizes& sizes) {
    RingCursor ring;
    const int rank = cluster_rank();
    for (int index = blockIdx.x / CLUSTER; index < sizes.tiles(); index += gridDim.x / CLUSTER) {
        const Tile tile(sizes, index);
        const int weight_row = tile.first_column + rank * (GATED ? sizes.out_columns : HALF);
        for (int stage = 0; stage < sizes.stages(); ++stage) {
            const unsigned full = shared_address(&shared.full[ring.slot]), slot = shared_address(shared.ring[ring.slot]);
            barrier_wait(shared_address(&shared.empty[ring.slot]), ring.parity ^ 1);
            barrier_arrive_expecting(full, STAGE_BYTES);
            copy_box(slot, x, stage * DEPTH, tile.first_token, full);
            copy_box_to_blocks(slot + TOKEN_BYTES + rank * HALF_BYTES, weight, stage * DEPTH, weight_row, full, (1 << CLUSTER) - 1);
            ring.advance(STAGES);
        }
    }
}

struct Consumer {
    Shared& shared;
    const TensorMap& out;
    const float *x_scale, *weight_scale;
    const scalar* bias;
    const Sizes& sizes;
    const int group, thread, warp, lane;  // thread and warp within the group
    RingCursor ring;
    bool leads;              // whether the other warpgroup still waits for this one
    float2 row_scales;       // of this thread's two weight rows of WEIGHT_ROWS, until `store` shares them
    float2 token_scales;     // of this thread's two tokens

    // The slot is free for the feeders of both blocks.
    __device__ __forceinline__ void release(int slot) {
        if (lane < CLUSTER) barrier_arrive_in_block(shared_address(&shared.empty[slot]), lane);
    }

    // Loads what the epilogue needs ahead of the products.
    __device__ __forceinline__ void load_scales(const Tile& tile) {
        const int local = 2 * thread, is_second = local / HALF;
        const int column = tile.first_column + (GATED ? local % HALF : local);
        const int row = column + (GATED ? is_second * sizes.out_columns : 0);
        row_scales = column < sizes.out_columns ? float2{weight_scale[row], weight_scale[row + 1]} : float2{0.0f, 0.0f};
        const int token = tile.first_token + group * 64 + warp * 16 + lane / 4;
        token_scales = {token < sizes.num_tokens ? x_scale[token] : 0.0f, token + 8 < sizes.num_tokens ? x_scale[token + 8] : 0.0f};
    }

    __device__ __forceinline__ void multiply(Sums& sums) {
        int last = 0;
        pin_registers(sums);
        for (int stage = 0; stage < sizes.stages(); ++stage) {
            barrier_wait(shared_address(&shared.full[ring.slot]), ring.parity);
            const unsigned slot = shared_address(shared.ring[ring.slot]);
            const auto tokens = matrix_descriptor(slot + group * 64 * DEPTH, 16, 8 * DEPTH);
            const auto weights = matrix_descriptor(slot + TOKEN_BYTES, 16, 8 * DEPTH);
            warpgroup_fence();
#pragma unroll
            for (int step = 0; step < DEPTH / 32; ++step) multiply_codes(sums, moved(tokens, step * 32), moved(weights, step * 32), stage + step > 0);
            warpgroup_commit();
            warpgroup_wait<1>();
            if (stage > 0) release(last);
            if (leads && stage == min(LEAD, sizes.stages()) - 1) {
                group_barrier_arrive(LEAD_BARRIER, GROUPS * 128);
                leads = false;
            }
            last = ring.slot;
            ring.advance(STAGES);
        }
        warpgroup_wait<0>();
        pin_registers(sums);
        release(last);
    }

    // Two neighbouring results of a token, scaled, with the bias.
    __device__ __forceinline__ float2 scaled(Value first, Value second, float token_scale, float2 weight_scales, float2 biases) const {
        float2 values = {__fmul_rn(__fmul_rn(static_cast<float>(first), token_scale), weight_scales.x),
                         __fmul_rn(__fmul_rn(static_cast<float>(second), token_scale), weight_scales.y)};
        if constexpr (HAS_BIAS) values = {__fadd_rn(values.x, biases.x), __fadd_rn(values.y, biases.y)};
        return values;
    }

    __device__ __forceinline__ static unsigned rounded_pair(float2 values) { return Pair<scalar>::of(values.x, values.y); }

    // Columns 8 block .. 8 block + 7 of the tile's part `part` of HALF columns: this lane's words of its two rows.
    __device__ __forceinline__ uint2 finished(const Sums& sums, const Tile& tile, int part, int block) const {
        const int local = part * HALF / 2 + block * 4 + lane % 4;
        const Value(&first)[4] = sums[part * HALF / 8 + block];
        const float2 scales = shared.weight_scale[group][local];
#if GATED
        const Value(&second)[4] = sums[HALF / 8 + block];
        const float2 up_scales = shared.weight_scale[group][HALF / 2 + local];
        unsigned words[2];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const float token_scale = row ? token_scales.y : token_scales.x;
            const unsigned gate = rounded_pair(scaled(first[2 * row], first[2 * row + 1], token_scale, scales, {}));
            const unsigned up = rounded_pair(scaled(second[2 * row], second[2 * row + 1], token_scale, up_scales, {}));
            words[row] = rounded_pair({ACTIVATION(Pair<scalar>::low(gate)) * Pair<scalar>::low(up),
                                       ACTIVATION(Pair<scalar>::high(gate)) * Pair<scalar>::high(up)});
        }
        return {words[0], words[1]};
#else
        float2 biases = {};
        if constexpr (HAS_BIAS) {
            const int column = tile.first_column + 2 * local;
            if (column < sizes.out_columns) biases = {to_float(bias[column]), to_float(bias[column + 1])};
        }
        return {rounded_pair(scaled(first[0], first[1], token_scales.x, scales, biases)),
                rounded_pair(scaled(first[2], first[3], token_scales.y, scales, biases))};
#endif
    }

    __device__ __forceinline__ void store(const Sums& sums, const Tile& tile) {
        const int first_token = tile.first_token + group * 64;
        const int row = warp * 16 + lane % 16;  // whose address this lane gives
        const bool is_storer = thread == 0;
        shared.weight_scale[group][thread] = row_scales;
#pragma unroll
        for (int part = 0; part < OUTPUTS / HALF; ++part) {
            if (is_storer) wait_until_stores_have_read();
            group_barrier(1 + group, 128);
#pragma unroll
            for (int block = 0; block < HALF / 8; block += 2) {
                const uint2 left = finished(sums, tile, part, block);
                const uint2 right = finished(sums, tile, part, block + 1);
                const unsigned box = shared_address(shared.stored[group][block / (STORED_COLUMNS / 8)]);
                const int piece = (block % (STORED_COLUMNS / 8) + lane / 16) ^ row % 8;
                store_matrices(box + row * 128 + piece * 16, left.x, left.y, right.x, right.y);
            }
            fence_for_async_readers();
            group_barrier(1 + group, 128);
            if (!is_storer) continue;
#pragma unroll
            for (int box = 0; box < STORED_BOXES; ++box) {
                const int column = tile.first_column + part * HALF + box * STORED_COLUMNS;
                if (column < sizes.out_columns && first_token < sizes.num_tokens) {
                    store_box(out, column, first_token, shared_address(shared.stored[group][box]));
                }
            }
            commit_stores();
        }
    }

    __device__ __forceinline__ void run() {
        if (group > 0) group_barrier(LEAD_BARRIER, GROUPS * 128);
        for (int index = blockIdx.x / CLUSTER; index < sizes.tiles(); index += gridDim.x / CLUSTER) {
            const Tile tile(sizes, index);
            load_scales(tile);
            Sums sums;
            multiply(sums);
            store(sums, tile);
        }
        if (thread == 0) wait_for_stores();
    }
};

extern "C" __global__ void CLUSTER_DIMENSIONS __launch_bounds__(THREADS, 1)
gemm8_tiles(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap out,
            const float* x_scale, const float* weight_scale, const scalar* bias, int num_tokens, int out_columns, int in_features, int band) {
    extern __shared__ __align__(1024) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const Sizes sizes = {num_tokens, out_columns, in_features, band};
    let_next_start();
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < STAGES; ++slot) {
            barrier_init(shared_address(&shared.full[slot]), 1);
            barrier_init(shared_address(&shared.empty[slot]), CLUSTER * GROUPS * 4);
        }
        fence_barrier_init();
    }
    cluster_sync();
    wait_for_previous();
    const int group = threadIdx.x / 128 - 1, thread = threadIdx.x % 128;
    if (group < 0) {
        lower_registers<FEEDER_REGISTERS>();
        if (threadIdx.x == 0) {
            prefetch(x);
            prefetch(weight);
            feed(shared, x, weight, sizes);
        }
        __syncwarp();
    } else {
        raise_registers<COMPUTE_REGISTERS>();
        Consumer consumer{shared, out, x_scale, weight_scale, bias, sizes, group, thread, thread / 32, thread % 32, {}, group == 0};
        consumer.run();
        __syncwarp();
    }
    cluster_sync();  // neither block ends while the other may copy into it or arrive at its barriers
}
