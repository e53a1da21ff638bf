// SPDX-License-Identifier: Apache-2.0
// Codes of packed.cuh to 16-bit operands of the tensor cores, in registers and exactly.
// After Kim et al. 2022, "Who Says Elephants Can't Run" (integers put into the digits of a float), as Marlin and AutoAWQ use it.
// Defines: those of packed.cuh; GROUP (columns that share a scale, a multiple of 32; 0 = the whole row).
#pragma once
#include "mma.cuh"
#include "packed.cuh"

// Numbers whose lowest bit counts one, so that a small integer can be put into their digits: 1024 and 128.
template <typename T>
struct Digits;
template <>
struct Digits<__half> {
    static constexpr uint32 BASE = 0x6400u, ONE = 0x3c00u, E4M3_SHIFT = 1, E4M3_FACTOR = 0x5c00u;  // 2^8
};
template <>
struct Digits<__nv_bfloat16> {
    static constexpr uint32 BASE = 0x4300u, ONE = 0x3f80u, E4M3_SHIFT = 4, E4M3_FACTOR = 0x7b80u;  // 2^120
};

__device__ __forceinline__ constexpr uint32 both(uint32 bits) { return bits | bits << 16; }

// 8 significant bits do not hold an 8-bit code and a base: int8 goes to bfloat16 by way of float32.
constexpr bool BY_FLOAT = CODES == 8 && Digits<scalar>::BASE == 0x4300u;
constexpr int HALF_RANGE = CODES == 4 ? 8 : 128;

constexpr int SCALES = GROUP == 0 || GROUP % CHUNK == 0 ? 1 : GROUP % (2 * SPREAD) == 0 ? PIECES / 2 : PIECES;  // of a row in a chunk
constexpr int SPAN = PIECES / SCALES;                                                                         // pieces that share one

// The group of the s-th scale of a chunk, or of the last column where that comes before it.
__device__ __forceinline__ uint32 group_of(uint32 chunk, int s, uint32 last_column) {
    if constexpr (GROUP == 0) return 0;
    if constexpr (GROUP >= CHUNK && GROUP % CHUNK == 0) return chunk / (GROUP >= CHUNK ? GROUP / CHUNK : 1);
    return min(chunk * CHUNK + s * SPAN * SPREAD, last_column) / (GROUP ? GROUP : 1);
}

// What `operands` adds to take base and zero point off; e4m3 has no zero point.
__device__ __forceinline__ uint32 zero_offset(int zero) {
    if constexpr (BY_FLOAT) return __float_as_uint(-8388608.0f - static_cast<float>(HALF_RANGE + zero));
    return both((0x8000u | Digits<scalar>::BASE) + static_cast<uint32>(HALF_RANGE + zero));
}

// The lowest nibble of each half, for `operands`. An instruction takes one constant besides registers; two known ones would cost a
// move at every use, so this one depends on a number that only we know to be positive.
__device__ __forceinline__ uint32 nibble_mask(int positive) { return 0x000f000fu - (positive < 0 ? 1u : 0u); }

// Columns 2 i and 2 i + 1 of a piece in operand word i: code - zero, exact.
__device__ __forceinline__ void operands(const uint32* piece, uint32 offset, uint32 mask, uint32 (&pairs)[4]) {
    using D = Digits<scalar>;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32 word = piece[CODES == 4 ? 0 : CODES == 0 ? i : i / 2];
        if constexpr (CODES == 0) {
            pairs[i] = word;
        } else if constexpr (CODES == 4) {
            pairs[i] = fma_pair((word >> 4 * i & mask) | both(D::BASE), both(D::ONE), offset, scalar());
        } else if constexpr (CODES == 1) {
            const uint32 high = __byte_perm(word, 0, i % 2 ? 0x3424u : 0x1404u);  // in the upper byte of each half
            const uint32 digits = (high & 0x80008000u) | (high & 0x7f007f00u) >> D::E4M3_SHIFT;
            pairs[i] = fma_pair(digits, both(D::E4M3_FACTOR), 0x80008000u, scalar());
        } else if constexpr (BY_FLOAT) {
            const uint32 raised = word ^ 0x80808080u;
            const float low = __uint_as_float(__byte_perm(raised, 0x4b000000u, 0x7650u + i % 2 * 2));
            const float high = __uint_as_float(__byte_perm(raised, 0x4b000000u, 0x7651u + i % 2 * 2));
            const float shift = __uint_as_float(offset);
            pairs[i] = __byte_perm(__float_as_uint(low + shift), __float_as_uint(high + shift), 0x7632u);
        } else {
            const uint32 raised = __byte_perm(word ^ 0x80808080u, 0x64646464u, i % 2 ? 0x4342u : 0x4140u);
            pairs[i] = fma_pair(raised, both(D::ONE), offset, scalar());
        }
    }
}
