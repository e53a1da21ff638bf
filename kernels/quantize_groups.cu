// SPDX-License-Identifier: Apache-2.0
// Inputs of a product of fp8 blocks as cuBLASLt takes them: e4m3 codes with a scale for each token and GROUP columns (a power of two with
// POWERS_OF_TWO). Columns are in the order of the packed weight (packed.cuh): a sum over columns is the same in any order that keeps groups
// together, so the kernels that stream a weight and cuBLASLt read one copy of it.
// Shapes: x [T, COLUMNS]; codes [rows, ROW_BYTES], rows = T or more, zeros beyond T and COLUMNS; scale [GROUPS, rows] float32, tokens side by
//     side. A warp has EACH groups of one token, a block neighbouring tokens, whose scales are neighbours. Grid: (rows over TOKENS, GROUPS over EACH).
// Defines: SCALAR, COLUMNS, VEC (elements loaded at once, divides COLUMNS; at most 4), POWERS_OF_TWO, CODES = 1, QUANTIZED = 1, STATIC_SCALE = 0.
// Reference: quantize_groups in checkpoints/quantization/numbers.py, equal bit for bit.
#include "launch.cuh"
#include "packed.cuh"
#include "quantize.cuh"
#include "reduce.cuh"

constexpr int GROUP = 128;
constexpr int WIDTH = GROUP / 32;  // columns of a lane
constexpr int TOKENS = 8, EACH = 4;
constexpr int GROUPS = (COLUMNS + GROUP - 1) / GROUP;
constexpr int ROW_BYTES = (COLUMNS + CHUNK - 1) / CHUNK * CHUNK_BYTES;

extern "C" __global__ void __launch_bounds__(TOKENS * 32)
quantize_groups(const scalar* __restrict__ x, unsigned char* __restrict__ codes, float* __restrict__ scale, int num_tokens, int rows) {
    let_next_start();
    wait_for_previous();
    const int token = blockIdx.x * TOKENS + threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_group = blockIdx.y * EACH, own = lane * WIDTH;
    float value[EACH][WIDTH] = {};
#pragma unroll
    for (int i = 0; i < EACH; ++i)
#pragma unroll
        for (int j = 0; j < WIDTH; j += VEC) {
            const int column = (first_group + i) * GROUP + own + j;
            if (token >= num_tokens || column >= COLUMNS) continue;
            float part[VEC];
            load(x + static_cast<int64>(token) * COLUMNS + column, part);
#pragma unroll
            for (int k = 0; k < VEC; ++k) value[i][j + k] = part[k];
        }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        unsigned amax = 0;
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) amax = Max()(amax, magnitude_bits(value[i][j]));
        RowScale of_group = row_scale(warp_reduce(amax, Max()), __uint_as_float(0x7f800000u));
        if constexpr (POWERS_OF_TWO) of_group = power_of_two(of_group);
        const int group = first_group + i, column = group * GROUP + own;
        if (token >= rows || group >= GROUPS) continue;
        if (lane == 0) scale[static_cast<int64>(group) * rows + token] = of_group.scale;
        if (column < ROW_BYTES) store_codes(codes + static_cast<int64>(token) * ROW_BYTES + byte_place(column), value[i], of_group.inverse);
    }
}
