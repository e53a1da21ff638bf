// SPDX-License-Identifier: Apache-2.0
// Vocabulary-parallel sampling for rows without filters: the best (score, token) of each slice of a rank's logits.
// Greedy rows (temperature 0) score by the logit; others by logit / temperature + Gumbel noise, whose argmax is a draw
// from the softmax. merge_argmax.cu takes the best over slices and ranks.
// Shapes: logits [S, V_local]; temperatures [S] float32, seeds [S] uint64, positions [S] int32;
//     keys [num_splits, S] uint64. Tokens from vocab_size on (padding) never win. Grid (num_splits, S).
// Defines: SCALAR, VEC (divides V_local), NUM_THREADS.
// Reference: argmax in NumPy, ties to the lower token; Philox4x32-10 (Salmon et al. 2011).
#include "launch.cuh"
#include "reduce.cuh"
#include "sampling.cuh"

template <typename Best>
__device__ __forceinline__ void offer_all(const scalar* columns, int vocab_start, int end, Best& best) {
    for (int at = (blockIdx.x * NUM_THREADS + threadIdx.x) * VEC; at < end; at += gridDim.x * NUM_THREADS * VEC) {
        float value[VEC];
        load(columns + at, value);
#pragma unroll
        for (int i = 0; i < VEC; ++i)
            if (at + i < end) best.offer(value[i], vocab_start + at + i);
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
local_argmax(const scalar* __restrict__ logits, const float* __restrict__ temperatures,
             const uint64* __restrict__ seeds, const int* __restrict__ positions, uint64* __restrict__ keys,
             int part_size, int vocab_start, int vocab_size) {
    wait_for_previous();
    let_next_start();
    const int row = blockIdx.y;
    const scalar* const columns = logits + static_cast<int64>(row) * part_size;
    const float temperature = temperatures[row];
    const int end = min(part_size, vocab_size - vocab_start);
    Winner greedy;
    NoisyWinner noisy(seeds[row], positions[row], temperature);
    if (temperature > 0.0f) offer_all(columns, vocab_start, end, noisy);
    else offer_all(columns, vocab_start, end, greedy);
    const uint64 best = block_reduce<NUM_THREADS>(Max()(greedy.key, noisy.key()), Max());
    if (threadIdx.x == 0) keys[static_cast<int64>(blockIdx.x) * gridDim.y + row] = best;
}
