// SPDX-License-Identifier: Apache-2.0
// Inputs of a product of fp8 blocks as cuBLASLt takes them (group_codes.cuh): of x, or with GATED of f(gate) * up, rounded to storage.
// Shapes: x [T, COLUMNS] (GATED: [gate | up] [T, 2 COLUMNS]); codes [rows, ROW_BYTES], rows = T or more, zeros beyond T and COLUMNS;
//     scale [GROUPS, rows] float32. A warp has EACH groups of one token, a block neighbouring tokens, whose scales are neighbours.
//     Grid: (rows over TOKENS, GROUPS over EACH).
// Defines: SCALAR, COLUMNS, VEC (elements loaded at once, divides COLUMNS; at most 4), GATED, ACTIVATION (one of activation.cuh); those of
//     group_codes.cuh.
// Reference: quantize_groups in checkpoints/quantization/numbers.py, equal bit for bit; of activation.cu's gated.
#include "activation.cuh"
#include "dtype.cuh"
#include "group_codes.cuh"
#include "launch.cuh"

constexpr int WIDTH = GROUP / 32;  // columns of a lane
constexpr int TOKENS = 8, EACH = 4;
constexpr int ROW_BYTES = (COLUMNS + CHUNK_COLUMNS - 1) / CHUNK_COLUMNS * CHUNK_COLUMNS;

extern "C" __global__ void __launch_bounds__(TOKENS * 32)
quantize_groups(const scalar* __restrict__ x, unsigned char* __restrict__ codes, float* __restrict__ scale, int num_tokens, int rows) {
    let_next_start();
    wait_for_previous();
    const int token = blockIdx.x * TOKENS + threadIdx.x / 32;
    const int first = blockIdx.y * EACH * GROUP + threadIdx.x % 32 * WIDTH;
    const scalar* row = x + static_cast<int64>(token) * COLUMNS * (GATED ? 2 : 1);
    float value[EACH][WIDTH] = {};
#pragma unroll
    for (int i = 0; i < EACH; ++i)
#pragma unroll
        for (int j = 0; j < WIDTH; j += VEC) {
            const int column = first + i * GROUP + j;
            if (token >= num_tokens || column >= COLUMNS) continue;
            float part[VEC], up[VEC] = {};
            load(row + column, part);
            if constexpr (GATED) load(row + COLUMNS + column, up);
#pragma unroll
            for (int k = 0; k < VEC; ++k) part[k] = GATED ? ACTIVATION(part[k]) * up[k] : part[k];
            if constexpr (GATED) round_all(part);
#pragma unroll
            for (int k = 0; k < VEC; ++k) value[i][j + k] = part[k];
        }
    const bool is_row = token < rows;
#pragma unroll
    for (int i = 0; i < EACH; ++i)
        store_group_codes(codes + static_cast<int64>(token) * ROW_BYTES, scale + token, rows, value[i], first + i * GROUP,
                          is_row ? ROW_BYTES : 0, is_row ? COLUMNS : 0);
}
