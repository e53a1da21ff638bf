// SPDX-License-Identifier: Apache-2.0
// A weight whose columns belong to groups in any order (GPTQ's activation order) as plain values: out = (code - zero) * scale of the
// column's group, rounded once. Runs when weights are loaded.
// Shapes: codes [O, I] int8; group_index [N, I] int32, each in [0, G), a row for every O / N rows; scale [O, G] float32; zero [O, G] int8; out [O, I].
// Defines: SCALAR, HAS_ZERO, NUM_THREADS. Grid: (O, I over NUM_THREADS).
// Reference: checkpoints/quantization/group_codes.py, equal bit for bit.
#include "dtype.cuh"
#include "launch.cuh"

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
unpack_ordered(const signed char* __restrict__ codes, const int* __restrict__ group_index, const float* __restrict__ scale,
               const signed char* __restrict__ zero, scalar* __restrict__ out, int columns, int groups, int rows_each) {
    wait_for_previous();
    const int column = blockIdx.y * NUM_THREADS + threadIdx.x;
    if (column >= columns) return;
    const int64 at = static_cast<int64>(blockIdx.x) * columns + column;
    const int group = group_index[static_cast<int64>(blockIdx.x / rows_each) * columns + column];
    const int64 of_group = static_cast<int64>(blockIdx.x) * groups + group;
    const float code = static_cast<float>(codes[at]);
    assign(out[at], __fmul_rn(HAS_ZERO ? code - static_cast<float>(zero[of_group]) : code, scale[of_group]));
}
