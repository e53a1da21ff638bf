// SPDX-License-Identifier: Apache-2.0
// Sampling with filters: temperature, then top-k, then top-p over what is left, then min-p.
// CLUSTER blocks a row: one where rows fill the device, more where few rows would leave it idle.
// The row's parts come from the ranks (a gather leaves one after the other).
// Shapes: logits [R, S, V_local], token = part * V_local + column; records [S] of Sampling; positions [S] int32;
//     token_ids [S] int32 (-1: not finite).
// Tie rules: equal logits rank by the lower token; top-p keeps the smallest set that reaches p, at least one token.
// Noise as in local_argmax.cu, so a filter that keeps everything changes nothing.
// Defines: SCALAR, VEC (divides V_local), NUM_THREADS (512; a power of two up to 1024), CLUSTER (1 before Hopper),
//     SAMPLING_STRUCT (members of a record).
// Limits: 41 KiB of shared memory a block.
// Reference: sort, cumulative sums and argmax in NumPy.
#include "launch.cuh"
#include "row_select.cuh"
#include "sampling_record.cuh"

// The winner with noise among tokens at or above `threshold` and `lowest`. The best token comes first: whatever cannot
// beat it is dismissed with a comparison.
__device__ uint64 draw(const Row& row, uint64 best, uint64 threshold, float lowest, NoisyWinner winner) {
    winner.offer(score_of(best), token_of(best));
    row.for_each_vector([&](const Vector<VEC>& packed, int token, int count) {
        if (largest_of(packed) >= lowest) {
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
                const float logit = to_float(packed.lane[i]);
                if (i >= count || logit < lowest) continue;
                if (logit == lowest && packed_key(logit, token + i) < threshold) continue;
                winner.offer(logit, token + i);
            }
        }
        winner.share();
    });
    return cluster_reduce<NUM_THREADS>(winner.key(), Max());
}

extern "C" __global__ void CLUSTER_DIMENSIONS __launch_bounds__(NUM_THREADS, 2)
sample_rows(const scalar* __restrict__ logits, const Sampling* records, const int* positions,
            int* __restrict__ token_ids, int num_parts, int part_size, int vocab_size) {
    let_next_start();
    wait_for_previous();
    __shared__ RowSelect::Storage storage;
    const int index = blockIdx.x / CLUSTER;
    const int64 part_stride = static_cast<int64>(gridDim.x / CLUSTER) * part_size;
    const Sampling sampling = records[index];
    const float temperature = sampling.temperature;
    const Row row = {logits + static_cast<int64>(index) * part_size, part_stride, num_parts, part_size, vocab_size};
    uint64 best = row.best();
    if (temperature > 0.0f && best != NOT_FINITE) {
        const float maximum = score_of(best);
        const int top_k = sampling.top_k;
        const float top_p = sampling.top_p, min_p = sampling.min_p;
        const bool limits_tokens = top_k > 0 && top_k < vocab_size;
        uint64 threshold = 0;
        if (limits_tokens || top_p < 1.0f) {
            RowSelect select(row, maximum, temperature, top_p < 1.0f, storage);
            const Threshold kept = select.best_tokens(limits_tokens ? top_k : ~0ull);
            threshold = kept.key;
            if (top_p < 1.0f) {
                const uint64 target = static_cast<uint64>(ceil(static_cast<double>(top_p) * kept.mass));
                threshold = select.best_mass(Max()(target, static_cast<uint64>(1))).key;
            }
        }
        float lowest = threshold == 0 ? -LARGEST_SCORE : score_of(threshold);
        if (min_p > 0.0f) lowest = Max()(lowest, maximum + logf(min_p) * temperature);
        best = draw(row, best, threshold, lowest, NoisyWinner(seed_of(sampling), positions[index], temperature));
    }
    if (threadIdx.x == 0 && cluster_rank() == 0) token_ids[index] = token_of(best);
}
