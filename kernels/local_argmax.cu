// SPDX-License-Identifier: Apache-2.0
// Vocabulary-parallel sampling for rows without filters: the best (score, token) of each slice of a rank's logits.
// Greedy rows (temperature 0) score by the logit; others by logit / temperature + Gumbel noise, whose argmax is a draw
// from the softmax. merge_argmax.cu takes the best over slices and ranks.
// Shapes: logits [S, V_local]; records [S] of Sampling; positions [S] int32;
//     keys [num_splits, S] uint64. Tokens from vocab_size on (padding) never win. Grid (num_splits, S).
// Defines: SCALAR, VEC (divides V_local), NUM_THREADS, SAMPLING_STRUCT (members of a record).
// Reference: argmax in NumPy, ties to the lower token; Philox4x32-10 (Salmon et al. 2011).
#include "launch.cuh"
#include "reduce.cuh"
#include "sampling.cuh"
#include "sampling_record.cuh"

// Calls visit(logits, first token, how many of them exist) for the block's vectors, all lanes of a warp together.
template <typename Visit>
__device__ __forceinline__ void for_each_vector(const scalar* columns, int vocab_start, int end, Visit visit) {
    for (int first = blockIdx.x * NUM_THREADS * VEC; first < end; first += gridDim.x * NUM_THREADS * VEC) {
        const int at = first + threadIdx.x * VEC;
        float value[VEC] = {};
        if (at < end) load(columns + at, value);
        visit(value, vocab_start + at, end - at);
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
local_argmax(const scalar* __restrict__ logits, const Sampling* __restrict__ records,
             const int* __restrict__ positions, uint64* __restrict__ keys, int part_size, int vocab_start,
             int vocab_size) {
    let_next_start();
    wait_for_previous();
    const int row = blockIdx.y;
    const scalar* const columns = logits + static_cast<int64>(row) * part_size;
    const float temperature = records[row].temperature;
    const int end = min(part_size, vocab_size - vocab_start);
    Winner greedy;
    NoisyWinner noisy(seed_of(records[row]), positions[row], temperature);
    if (temperature > 0.0f) {
        for_each_vector(columns, vocab_start, end, [&](const float (&value)[VEC], int token, int count) {
#pragma unroll
            for (int i = 0; i < VEC; ++i)
                if (i < count) noisy.offer(value[i], token + i);
            noisy.share();
        });
    } else {
        for_each_vector(columns, vocab_start, end, [&](const float (&value)[VEC], int token, int count) {
#pragma unroll
            for (int i = 0; i < VEC; ++i)
                if (i < count) greedy.offer(value[i], token + i);
        });
    }
    const uint64 best = block_reduce<NUM_THREADS>(Max()(greedy.key, noisy.key()), Max());
    if (threadIdx.x == 0) keys[static_cast<int64>(blockIdx.x) * gridDim.y + row] = best;
}
