// SPDX-License-Identifier: Apache-2.0
// Vocabulary-parallel embedding: out[t] = scale * table[token_ids[t] - vocab_start], or zeros where another rank holds
// the row, so that a sum over ranks completes it.
// Shapes: token_ids [T] int32, table [V_local, D], out [T, D]. One block a token.
// Defines: SCALAR, HIDDEN_SIZE (D), VEC (divides D), NUM_THREADS.
// Reference: table[ids - vocab_start] * scale in float32, rounded once.
#include "dtype.cuh"
#include "launch.cuh"

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
embedding(const int* __restrict__ token_ids, const scalar* __restrict__ table, scalar* __restrict__ out,
          int vocab_start, int num_rows, float scale) {
    let_next_start();
    wait_for_previous();
    const int64 token = blockIdx.x;
    const int row = token_ids[token] - vocab_start;
    const bool is_local = row >= 0 && row < num_rows;
    for (int at = threadIdx.x * VEC; at < HIDDEN_SIZE; at += NUM_THREADS * VEC) {
        float value[VEC] = {};
        if (is_local) load(table + static_cast<int64>(row) * HIDDEN_SIZE + at, value);
#pragma unroll
        for (int i = 0; i < VEC; ++i) value[i] *= scale;
        store(out + token * HIDDEN_SIZE + at, value);
    }
}
