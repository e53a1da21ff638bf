// SPDX-License-Identifier: Apache-2.0
// Rows of values to e4m3 codes with a scale for each GROUP columns (a power of two with POWERS_OF_TWO), as cuBLASLt multiplies them by
// packed fp8 blocks. Codes lie in the order in which a packed weight has its columns (packed.cuh): a sum over columns is the same in any
// order that keeps groups together, so the kernels that stream a weight and cuBLASLt read one copy of it. Scales are [GROUPS, rows]: those of
// neighbouring tokens side by side.
// Compile-time parameters: POWERS_OF_TWO, QUANTIZED = 1, STATIC_SCALE = 0.
#pragma once
#include "quantize.cuh"
#include "reduce.cuh"

constexpr int GROUP = 128;
constexpr int CHUNK_COLUMNS = 64;  // of a packed row, whose order is the same in each

// Where a packed row of 8-bit codes has the one of `column`: lane m of four has 8 columns from 8 m and 8 from 32 + 8 m on.
__device__ __forceinline__ int byte_place(int column) {
    const int within = column % CHUNK_COLUMNS, piece = within / 32, lane = within / 8 % 4;
    return column - within + (lane * 2 + piece) * 8 + column % 8;
}

// Quantises N neighbours from `column` on, a multiple of N; GROUP / N neighbouring lanes have a group, and all lanes of a warp come here.
// Codes are stored below column `num_codes`, scales of groups that begin below `num_columns`.
template <int N>
__device__ __forceinline__ void store_group_codes(unsigned char* codes, float* scale, int rows, const float (&values)[N], int column,
                                                  int num_codes, int num_columns) {
    constexpr int LANES = GROUP / N;
    static_assert(LANES <= 32 && N <= 8, "lanes of one warp have a group, a lane at most a piece");
    unsigned amax = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) amax = Max()(amax, magnitude_bits(values[i]));
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) amax = Max()(amax, __shfl_xor_sync(0xffffffffu, amax, offset));
    RowScale own = row_scale(amax, __uint_as_float(0x7f800000u));
    if constexpr (POWERS_OF_TWO) own = power_of_two(own);
    if (column % GROUP == 0 && column < num_columns) scale[static_cast<long long>(column / GROUP) * rows] = own.scale;
    if (column < num_codes) store_codes(codes + byte_place(column), values, own.inverse);
}
