// SPDX-License-Identifier: Apache-2.0
// Natural log-probabilities under the model's own distribution (no temperature, no filters): of one given token a row,
// and of the num_top most probable ones, best first, ties by the lower token. CLUSTER blocks a row.
// Shapes: logits [R, S, V_local] as in sample_rows.cu; token_ids [S] int32; logprobs [S] float32;
//     top_ids [S, num_top] int32; top_logprobs [S, num_top] float32. num_top <= min(1024, vocab_size).
//     NaN (and top_ids -1) where a logit is NaN or infinite; NaN for a negative token.
// Defines: SCALAR, VEC (divides V_local), NUM_THREADS (512; a power of two up to 1024), CLUSTER (1 before Hopper).
// Limits: 41 KiB of shared memory a block.
// Reference: log-softmax in float64.
#include "launch.cuh"
#include "row_select.cuh"

#define NOT_A_NUMBER __int_as_float(0x7fffffff)

extern "C" __global__ void CLUSTER_DIMENSIONS __launch_bounds__(NUM_THREADS, 2)
log_probabilities(const scalar* __restrict__ logits, const int* __restrict__ token_ids, float* __restrict__ logprobs,
                  int* __restrict__ top_ids, float* __restrict__ top_logprobs, int num_parts, int part_size,
                  int vocab_size, int num_top) {
    let_next_start();
    wait_for_previous();
    __shared__ RowSelect::Storage storage;
    const int64 index = blockIdx.x / CLUSTER;
    const int64 part_stride = static_cast<int64>(gridDim.x / CLUSTER) * part_size;
    const Row row = {logits + index * part_size, part_stride, num_parts, part_size, vocab_size};
    const uint64 best = row.best();
    if (best == NOT_FINITE) {
        for (int rank = threadIdx.x; rank < num_top; rank += NUM_THREADS) {
            top_ids[index * num_top + rank] = -1;
            top_logprobs[index * num_top + rank] = NOT_A_NUMBER;
        }
        if (threadIdx.x == 0) logprobs[index] = NOT_A_NUMBER;
        return;
    }
    const float maximum = score_of(best);
    uint64 mass = 0;
    row.for_each(-LARGEST_SCORE, [&](float logit, int) {
        mass += static_cast<uint64>(expf(logit - maximum) * 0x1p40f);
    });
    mass = cluster_reduce<NUM_THREADS>(mass, Sum());
    const float log_total = maximum + logf(static_cast<float>(mass) * 0x1p-40f);

    if (threadIdx.x == 0 && cluster_rank() == 0) {
        const int token = token_ids[index];
        const int64 at = token / part_size * part_stride + token % part_size;
        logprobs[index] = token < 0 ? NOT_A_NUMBER : to_float(row.logits[at]) - log_total;
    }
    if (num_top == 0) return;
    RowSelect select(row, maximum, 1.0f, false, storage);
    select.collect(select.best_tokens(num_top).key);
    if (cluster_rank() != 0) return;
    for (int rank = threadIdx.x; rank < num_top; rank += NUM_THREADS) {
        const uint64 key = storage.candidates[rank];
        top_ids[index * num_top + rank] = token_of(key);
        top_logprobs[index * num_top + rank] = score_of(key) - log_total;
    }
}
