// SPDX-License-Identifier: Apache-2.0
// Sums of codes' products to results: out = (float(sum) * x_scale[token]) * weight_scale[output] (+ bias), rounded once.
// Shapes: sums [T, rows], a slab of the outputs [first, first + rows) of out [T, O]; x_scale [T], weight_scale [O] float32; bias [O].
// Defines: SUM (int or float), SCALAR, VEC (divides rows, first and O), NUM_THREADS, HAS_BIAS. Grid: T rows of blocks of NUM_THREADS * VEC outputs, as in activation.cu.
// Reference: checkpoints/quantization/row_codes.py, equal bit for bit.
#include "dtype.cuh"
#include "launch.cuh"

struct alignas(4 * VEC) SumVector {
    SUM at[VEC];
};

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
scale_sums(const SUM* __restrict__ sums, const float* __restrict__ x_scale, const float* __restrict__ weight_scale,
           const scalar* __restrict__ bias, scalar* __restrict__ out, int rows, int first, int out_features) {
    let_next_start();
    wait_for_previous();
    const int chunks = (rows + NUM_THREADS * VEC - 1) / (NUM_THREADS * VEC);
    const int row = (blockIdx.x % chunks * NUM_THREADS + threadIdx.x) * VEC;
    if (row >= rows) return;
    const int64 token = blockIdx.x / chunks;
    const SumVector sum = *reinterpret_cast<const SumVector*>(sums + token * rows + row);
    float values[VEC];
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        const int output = first + row + i;
        values[i] = __fmul_rn(__fmul_rn(static_cast<float>(sum.at[i]), x_scale[token]), weight_scale[output]);
        if constexpr (HAS_BIAS) values[i] = __fadd_rn(values[i], to_float(bias[output]));
    }
    store(out + token * out_features + first + row, values);
}
