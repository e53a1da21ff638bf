// SPDX-License-Identifier: Apache-2.0
// Values of 16 bits that packed codes stand for: out = (code - zero) * scale in float32, rounded once.
// Shapes: packed [O, ceil(I / CHUNK) * 4] pieces of 16 bytes (packed.cuh); scale [G, O] float32 and zero [G, O] int8, for GROUP columns each
//     (0 = the whole row); out [O, I], I % 8 == 0. A thread has one lane's 16 bytes and stores 16 bytes for each of their pieces.
// Defines: SCALAR, BFLOAT16, KV_FP8 (0), CODES, GROUP (a multiple of 32), HAS_ZERO, NUM_THREADS. Grid: (O, lanes of a row over NUM_THREADS).
// Why beside pack_weight.cu's, which takes any size: integers become values in pairs here, and a piece shares a scale.
// Reference: checkpoints/quantization/group_codes.py, equal bit for bit: code - zero has 8 bits.
#include "attention_instructions.cuh"
#include "launch.cuh"
#include "packed_operands.cuh"

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
unpack_weight(const uint4* __restrict__ packed, const float* __restrict__ scale, const signed char* __restrict__ zero,
              scalar* out, int columns, int lanes) {
    let_next_start();
    const int lane = blockIdx.y * NUM_THREADS + threadIdx.x, row = blockIdx.x, rows = gridDim.x;
    const Words own = lane < lanes ? words(packed[static_cast<int64>(row) * lanes + lane]) : Words{};
    wait_for_previous();
    if (lane >= lanes) return;
    const uint32 mask = nibble_mask(columns);
    const int first = lane / 4 * CHUNK + lane % 4 * PIECE;
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        const int column = first + piece * SPREAD;
        if (column >= columns) return;
        const int64 at = (GROUP ? static_cast<int64>(column / (GROUP ? GROUP : 1)) * rows : 0) + row;
        const float factor = scale[at];
        uint32 pairs[4];
        operands(own.at + piece * PIECE_WORDS, zero_offset(HAS_ZERO ? zero[at] : 0), mask, pairs);
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[i] = pack(unpack(pairs[i], 0) * factor, unpack(pairs[i], 1) * factor);
        *reinterpret_cast<uint4*>(out + static_cast<int64>(row) * columns + column) = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
    }
}
