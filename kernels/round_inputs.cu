// SPDX-License-Identifier: Apache-2.0
// Inputs of packed weights as their scheme has them: times a factor for each column (SmoothQuant, AWQ), then what e4m3 codes with one scale
// for each GROUP columns stand for (fp8 blocks), a power of two with POWERS_OF_TWO; either may be off. Each step is rounded to the compute type.
// Shapes: x, out [T, COLUMNS]; factors [COLUMNS] float32. Grid: (T, COLUMNS over SPAN); SPAN is GROUP where there is one.
// Defines: SCALAR, COLUMNS, SPAN, GROUP (0 = none), POWERS_OF_TWO, HAS_FACTORS, NUM_THREADS.
// Reference: quantize_groups in checkpoints/quantization/numbers.py, equal bit for bit.
#define QUANTIZED 1
#define STATIC_SCALE 0
#include "dtype.cuh"
#include "launch.cuh"
#include "quantize.cuh"
#include "reduce.cuh"

constexpr int EACH = (SPAN + NUM_THREADS - 1) / NUM_THREADS;

// The smallest power of two that is not below the scale; what is not finite stays.
__device__ __forceinline__ RowScale power_of_two(RowScale group) {
    const unsigned bits = __float_as_uint(group.scale);
    if (bits >= 0x7f800000u) return group;
    const float scale = __uint_as_float((bits + 0x7fffffu) & 0xff800000u);
    return {scale, __fdiv_rn(1.0f, scale)};
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
round_inputs(const scalar* __restrict__ x, const float* __restrict__ factors, scalar* __restrict__ out) {
    let_next_start();
    wait_for_previous();
    const int first = blockIdx.y * SPAN;
    const int64 row = static_cast<int64>(blockIdx.x) * COLUMNS;
    float value[EACH] = {};
    unsigned amax = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int offset = i * NUM_THREADS + threadIdx.x, column = first + offset;
        if (offset >= SPAN || column >= COLUMNS) continue;
        value[i] = to_float(x[row + column]);
        if constexpr (HAS_FACTORS) value[i] = rounded(__fmul_rn(value[i], factors[column]));
        amax = Max()(amax, magnitude_bits(value[i]));
    }
    RowScale group = {1.0f, 1.0f};
    if constexpr (GROUP > 0) group = row_scale(block_reduce<NUM_THREADS>(amax, Max()), __uint_as_float(0x7f800000u));
    if constexpr (GROUP > 0 && POWERS_OF_TWO) group = power_of_two(group);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int offset = i * NUM_THREADS + threadIdx.x, column = first + offset;
        if (offset >= SPAN || column >= COLUMNS) continue;
        if constexpr (GROUP > 0) {
            const unsigned code = e4m3_pair(__fmul_rn(value[i], group.inverse), 0.0f) & 0xffu;
            value[i] = __fmul_rn(e4m3_value(code), group.scale);
        }
        assign(out[row + column], value[i]);
    }
}
