// SPDX-License-Identifier: Apache-2.0
// Token biases: out = logits, plus for each row the biases of its sequence whose token this rank holds and whose position
// has not come. A token that occurs several times in the list gets the sum. In float32, so that a ban fits.
// Shapes: logits [S, V_local]; records [S] of Sampling; positions [S] int32; biases [sequences, max_biases] of TokenBias;
//     out [S, V_local] float32. Grid (slices, S): a block copies a slice of a row and then changes it.
// Defines: SCALAR, VEC (divides V_local), NUM_THREADS, SLICE (a multiple of VEC), SAMPLING_STRUCT.
// Reference: phalanx.runtime.sampling.biases.add_biases, exactly for logits of float32.
#include "launch.cuh"
#include "sampling_record.cuh"

struct TokenBias {
    int token;
    float bias;
    int until;
};

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
bias_logits(const scalar* __restrict__ logits, const Sampling* __restrict__ records, const int* __restrict__ positions,
            const TokenBias* __restrict__ biases, float* out, int part_size, int vocab_start, int max_biases) {
    let_next_start();
    wait_for_previous();
    const int row = blockIdx.y, position = positions[row], count = records[row].num_biases;
    const int first = blockIdx.x * SLICE, end = min(first + SLICE, part_size);
    const scalar* const from = logits + static_cast<int64>(row) * part_size;
    float* const to = out + static_cast<int64>(row) * part_size;
    for (int at = first + threadIdx.x * VEC; at < end; at += NUM_THREADS * VEC) {
        float value[VEC];
        load(from + at, value);
#pragma unroll
        for (int i = 0; i < VEC; ++i) to[at + i] = value[i];
    }
    if (count == 0) return;
    __syncthreads();
    const TokenBias* const list = biases + static_cast<int64>(records[row].seq_index) * max_biases;
    for (int i = threadIdx.x; i < count; i += NUM_THREADS) {
        const int token = list[i].token, column = token - vocab_start;
        if (column < first || column >= end || position >= list[i].until) continue;
        float value[1];
        load(from + column, value);
        for (int j = 0; j < count; ++j)
            if (list[j].token == token && position < list[j].until) value[0] += list[j].bias;
        to[column] = value[0];
    }
}
