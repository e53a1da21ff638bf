// SPDX-License-Identifier: Apache-2.0
// Packed weights: codes of 4 or 8 bits in the order in which products with 16-bit inputs stream them (packed_operands.cuh).
// A row is padded to whole chunks of 64 bytes: 16 bytes for each of the four lanes that share a row of an operand, in PIECES pieces
// of 8 columns. Piece q of lane m holds columns 32 q + 8 m to 32 q + 8 m + 7 of the chunk, so the four lanes multiply 32
// neighbouring columns at a time: scales of groups that are multiples of 32 apply to the sum, and reads of x are 64 neighbouring bytes.
// A piece of int4 is one word of code + 8, columns [0, 2, 4, 6, 1, 3, 5, 7] from the lowest nibble on: a shift and a mask leave two
// neighbours in the halves of a word. A piece of 8-bit codes, int8 or e4m3, is two words in order.
// Defines: SCALAR, CODES (4 = int4, 8 = int8, 1 = fp8; 0 = plain values of 16 bits in rows that are not padded, one piece in a chunk).
#pragma once
#include "dtype.cuh"
#include "fp8.cuh"
#include "words.cuh"

constexpr int PIECE = 8;                                    // columns
constexpr int SPREAD = 4 * PIECE;                           // columns of four lanes' pieces
constexpr int PIECES = CODES == 4 ? 4 : CODES == 0 ? 1 : 2;  // of a lane in a chunk
constexpr int PIECE_WORDS = 4 / PIECES;
constexpr int CHUNK = SPREAD * PIECES;  // columns
constexpr int CHUNK_BYTES = 64;

// The value of one code before its zero point; for what is not worth a tensor core.
__device__ __forceinline__ float code_value(const uint32* piece, int column) {
    if constexpr (CODES == 4) return static_cast<float>(static_cast<int>(piece[0] >> (column / 2 + column % 2 * 4) * 4 & 15u) - 8);
    const uint32 byte = piece[CODES == 4 ? 0 : column / 4] >> column % 4 * 8 & 0xffu;
    return CODES == 1 ? e4m3_value(byte) : static_cast<float>(static_cast<signed char>(byte));
}
