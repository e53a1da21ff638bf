// SPDX-License-Identifier: Apache-2.0
// Codes of a weight, one byte each, to the layout of packed.cuh, and back to plain values: out = (code - zero) * scale.
// Shapes: codes [O, I] bytes (int8, or e4m3), columns beyond I are codes of 0; packed [O, ceil(I / CHUNK) * 4] pieces of 16 bytes;
//     scale [G, O] float32 and zero [G, O] int8, for GROUP columns each (0 = the whole row); out [O, I]. A thread has one lane's 16 bytes.
// Defines: those of packed.cuh; GROUP, HAS_ZERO, NUM_THREADS, VEC (elements stored at once, divides I; at most 8). Grid: (O, lanes of a row
//     over NUM_THREADS). pack_weight runs when weights are loaded, unpack_weight before products of many tokens.
// Reference: checkpoints/quantization/group_codes.py; float32 products are exact but for their own rounding.
#include "launch.cuh"
#include "packed.cuh"

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
pack_weight(const unsigned char* __restrict__ codes, uint4* __restrict__ packed, int columns, int lanes) {
    wait_for_previous();  // and no let_next_start: what comes next may read the packed weight before it waits
    const int lane = blockIdx.y * NUM_THREADS + threadIdx.x;
    if (lane >= lanes) return;
    Words result = {};
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece)
#pragma unroll
        for (int i = 0; i < PIECE; ++i) {
            const int column = lane / 4 * CHUNK + piece * 4 * PIECE + lane % 4 * PIECE + i;
            const unsigned char code = column < columns ? codes[static_cast<int64>(blockIdx.x) * columns + column] : 0;
            if constexpr (CODES == 4)
                result.at[piece] |= (code + 8u & 15u) << (i / 2 + i % 2 * 4) * 4;
            else
                result.at[piece * PIECE_WORDS + i / 4] |= static_cast<uint32>(code) << i % 4 * 8;
        }
    packed[static_cast<int64>(blockIdx.x) * lanes + lane] = uint4{result.at[0], result.at[1], result.at[2], result.at[3]};
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
unpack_weight(const uint4* __restrict__ packed, const float* __restrict__ scale, const signed char* __restrict__ zero,
              scalar* __restrict__ out, int columns, int lanes) {
    let_next_start();
    const int lane = blockIdx.y * NUM_THREADS + threadIdx.x, row = blockIdx.x, rows = gridDim.x;
    const Words own = lane < lanes ? words(packed[static_cast<int64>(row) * lanes + lane]) : Words{};
    wait_for_previous();
    if (lane >= lanes) return;
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        const int column = lane / 4 * CHUNK + piece * 4 * PIECE + lane % 4 * PIECE;
#pragma unroll
        for (int i = 0; i < PIECE; i += VEC) {
            if (column + i >= columns) continue;
            float values[VEC];
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                const int64 of_group = (GROUP ? static_cast<int64>((column + i + j) / (GROUP ? GROUP : 1)) * rows : 0) + row;
                const float code = code_value(own.at + piece * PIECE_WORDS, i + j);
                values[j] = __fmul_rn(HAS_ZERO ? code - static_cast<float>(zero[of_group]) : code, scale[of_group]);
            }
            store(out + static_cast<int64>(row) * columns + column + i, values);
        }
    }
}
