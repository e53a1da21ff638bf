// SPDX-License-Identifier: Apache-2.0
// Vocabulary-parallel sampling for rows without filters: the best (score, token) of each slice of a rank's logits.
// Greedy rows (temperature 0) score by the logit; others by logit / temperature + Gumbel noise, whose argmax is a draw
// from the softmax. merge_argmax.cu takes the best over slices and ranks.
// Shapes: logits [S, V_local]; temperatures [S] float32, seeds [S] uint64, positions [S] int32;
//     keys [num_splits, S] uint64. Tokens from vocab_size on (padding) never win. Grid (num_splits, S).
// Defines: SCALAR, VEC (divides V_local), NUM_THREADS.
// Reference: argmax in NumPy, ties to the lower token; Philox4x32-10 (Salmon et al. 2011).
#include "reduce.cuh"
#include "sampling.cuh"

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
local_argmax(const scalar* __restrict__ logits, const float* __restrict__ temperatures,
             const uint64* __restrict__ seeds, const int* __restrict__ positions, uint64* __restrict__ keys,
             int part_size, int vocab_start, int vocab_size) {
    const int row = blockIdx.y;
    const scalar* const columns = logits + static_cast<int64>(row) * part_size;
    const float temperature = temperatures[row];
    Noise noise(seeds[row], positions[row]);
    const int end = min(part_size, vocab_size - vocab_start);
    uint64 best = 0;
    float best_score = __int_as_float(0x7fffffff);  // NaN: nothing compares below it
    for (int at = (blockIdx.x * NUM_THREADS + threadIdx.x) * VEC; at < end; at += gridDim.x * NUM_THREADS * VEC) {
        float value[VEC];
        load(columns + at, value);
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            if (at + i >= end) continue;
            const int token = vocab_start + at + i;
            float score = scaled(value[i], temperature);
            if (temperature > 0.0f) score += noise.gumbel(token);
            // Tokens come in order, so a tie stays with the lower one. What is not finite fails this test.
            if (score <= best_score && score >= -LARGEST_SCORE) continue;
            best = Max()(best, packed_key(score, token));
            best_score = score;
        }
    }
    best = block_reduce<NUM_THREADS>(best, Max());
    if (threadIdx.x == 0) keys[static_cast<int64>(blockIdx.x) * gridDim.y + row] = best;
}
