// SPDX-License-Identifier: Apache-2.0
// The winning token over slices and ranks: token_ids[s] = token of max(keys[:, s]); -1 where a logit was NaN or infinite.
// Shapes: keys [num_parts, S] uint64 as local_argmax.cu writes them, gathered over ranks; token_ids [S] int32.
// One warp a row. Defines: SCALAR (unused by the keys), NUM_THREADS.
// Reference: argmax in NumPy.
#include "launch.cuh"
#include "reduce.cuh"
#include "sampling.cuh"

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
merge_argmax(const uint64* __restrict__ keys, int* __restrict__ token_ids, int num_parts, int num_rows) {
    let_next_start();
    wait_for_previous();
    const int row = (blockIdx.x * NUM_THREADS + threadIdx.x) / 32;
    if (row >= num_rows) return;
    uint64 best = 0;
    for (int part = threadIdx.x % 32; part < num_parts; part += 32)
        best = Max()(best, keys[static_cast<int64>(part) * num_rows + row]);
    best = warp_reduce(best, Max());
    if (threadIdx.x % 32 == 0) token_ids[row] = token_of(best);
}
