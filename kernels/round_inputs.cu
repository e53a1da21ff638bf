// SPDX-License-Identifier: Apache-2.0
// Inputs of packed weights and of experts as their scheme has them: times a factor for each column (SmoothQuant, AWQ), then what 8-bit
// codes stand for that have one scale for each SPAN columns (fp8 blocks, or the whole row; a power of two with POWERS_OF_TWO), or `bound` for
// all of them; either may be off. Each step is rounded to the compute type.
// Shapes: x, out [T, COLUMNS]; factors [COLUMNS] float32. Grid: (T, COLUMNS over SPAN).
// Defines: SCALAR, COLUMNS, SPAN, QUANTIZED (0 = no codes, 1 = fp8, 2 = int8), STATIC_SCALE, POWERS_OF_TWO, HAS_FACTORS, NUM_THREADS.
// Reference: quantize_groups and quantize_static in checkpoints/quantization/numbers.py, equal bit for bit.
#include "dtype.cuh"
#include "launch.cuh"
#include "quantize.cuh"
#include "reduce.cuh"

constexpr int EACH = (SPAN + NUM_THREADS - 1) / NUM_THREADS;

// What the code of a value that was divided by its scale stands for, less the scale.
__device__ __forceinline__ float value_of_code(float scaled) {
    if constexpr (QUANTIZED == 2) return static_cast<float>(static_cast<signed char>(int8_code(scaled)));
    return e4m3_value(e4m3_pair(scaled, 0.0f) & 0xffu);
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
round_inputs(const scalar* __restrict__ x, const float* __restrict__ factors, scalar* __restrict__ out, float bound) {
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
    if constexpr (QUANTIZED > 0) group = block_row_scale<NUM_THREADS>(amax, bound);
    if constexpr (POWERS_OF_TWO) group = power_of_two(group);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int offset = i * NUM_THREADS + threadIdx.x, column = first + offset;
        if (offset >= SPAN || column >= COLUMNS) continue;
        if constexpr (QUANTIZED > 0) value[i] = __fmul_rn(value_of_code(__fmul_rn(value[i], group.inverse)), group.scale);
        assign(out[row + column], value[i]);
    }
}
