// SPDX-License-Identifier: Apache-2.0
// Codes of a weight to plain values: out = (code - zero) * scale, each scale (and zero point) for GROUP columns of a row.
// Shapes: codes [O, I] bytes (int8, or e4m3 with FP8); scale [O, G] float32; zero [O, G] int8 with HAS_ZERO; out [O, I].
// Defines: SCALAR, FP8, HAS_ZERO, NUM_THREADS. Grid: (chunks of NUM_THREADS columns, O). Runs once, when weights are loaded.
// Reference: checkpoints/quantization/group_codes.py; the float32 product is exact but for its own rounding.
#include "dtype.cuh"
#include "fp8.cuh"
#include "launch.cuh"

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
dequantize(const unsigned char* __restrict__ codes, const float* __restrict__ scale, const signed char* __restrict__ zero,
           scalar* __restrict__ out, int columns, int groups, int group) {
    let_next_start();
    wait_for_previous();
    const int column = blockIdx.x * NUM_THREADS + threadIdx.x;
    if (column >= columns) return;
    const int64 row = blockIdx.y, at = row * columns + column, of_group = row * groups + column / group;
    float value = FP8 ? e4m3_value(codes[at]) : static_cast<float>(static_cast<signed char>(codes[at]));
    if constexpr (HAS_ZERO) value -= static_cast<float>(zero[of_group]);
    assign(out[at], __fmul_rn(value, scale[of_group]));
}
