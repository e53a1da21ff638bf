// SPDX-License-Identifier: Apache-2.0
// Weights that go from memory straight into tensor-core operands: a lane reads 16 bytes of one weight row, and because the
// tokens are read with the same permutation of k, no shuffle or shared memory is needed.
#pragma once
#include "mma.cuh"
#include "words.cuh"

constexpr int LANE_ELEMENTS = 8;          // 16 bytes
constexpr int CHUNK = 4 * LANE_ELEMENTS;  // k range of one step of a warp: two mma
constexpr int TILE = 8;                   // weight rows of one mma

// sum [16, 8] += tokens [16, CHUNK] * weight^T; `low` of token lane / 4, `high` of token lane / 4 + 8.
__device__ __forceinline__ void multiply(float (&sum)[4], const Words& low, const Words& high, const Words& weight) {
#pragma unroll
    for (int half = 0; half < 4; half += 2) {
        const uint32 a[4] = {low.at[half], high.at[half], low.at[half + 1], high.at[half + 1]};
        const uint32 b[2] = {weight.at[half], weight.at[half + 1]};
        mma_16x8x16(sum, a, b, scalar());
    }
}
