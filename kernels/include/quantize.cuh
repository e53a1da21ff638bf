// SPDX-License-Identifier: Apache-2.0
// Rows of values to 8-bit codes with one float32 scale a row, by the definitions of checkpoints/quantization/numbers.py:
//     fp8:  scale = max(amax / 448, 1 / (448 * 512)),  code = e4m3(x * (1 / scale))
//     int8: scale = max(amax / 127, 2^-40),            code = clip(round(x * (1 / scale)), -128, 127)
// amax is the largest |x| of the values as they would have been stored, at most `bound` (infinity = none), so fused and separate
// kernels give the same codes. With STATIC_SCALE all rows have the scale `bound`, and what is beyond its range saturates.
// Compile-time parameters: QUANTIZED (0 = off, 1 = fp8, 2 = int8), STATIC_SCALE.
#pragma once
#include "fp8.cuh"

struct RowScale {
    float scale, inverse;
};

// Magnitudes compare like unsigned integers, and NaN above all: a row with a NaN gets a NaN for its scale.
__device__ __forceinline__ unsigned magnitude_bits(float value) { return __float_as_uint(value) & 0x7fffffffu; }

__device__ __forceinline__ RowScale row_scale(unsigned amax_bits, float bound) {
    if constexpr (STATIC_SCALE) return {bound, __fdiv_rn(1.0f, bound)};
    const float largest = __uint_as_float(amax_bits);
    const float amax = largest > bound ? bound : largest;  // NaN stays
    const float smallest = QUANTIZED == 2 ? 9.094947017729282e-13f : 4.359654017857143e-06f;
    const float scale = __fdiv_rn(amax, QUANTIZED == 2 ? 127.0f : 448.0f);
    const float floored = scale < smallest ? smallest : scale;
    return {floored, __fdiv_rn(1.0f, floored)};
}

// The smallest power of two that is not below the scale; what is not finite stays.
__device__ __forceinline__ RowScale power_of_two(RowScale group) {
    const unsigned bits = __float_as_uint(group.scale);
    if (bits >= 0x7f800000u) return group;
    const float scale = __uint_as_float((bits + 0x7fffffu) & 0xff800000u);
    return {scale, __fdiv_rn(1.0f, scale)};
}

__device__ __forceinline__ unsigned int8_code(float scaled) {
    const float nearest = rintf(scaled);
    return static_cast<unsigned>(static_cast<int>(nearest < -128.0f ? -128.0f : nearest > 127.0f ? 127.0f : nearest)) & 0xffu;
}

template <int N>
struct alignas(N) CodeVector {
    unsigned char at[N];
};

// N neighbours; the address is a multiple of N.
template <int N>
__device__ __forceinline__ void store_codes(unsigned char* to, const float (&values)[N], float inverse) {
    CodeVector<N> packed;
#pragma unroll
    for (int i = 0; i < N; i += 2) {
        const float low = __fmul_rn(values[i], inverse);
        const float high = i + 1 < N ? __fmul_rn(values[i + (N > 1)], inverse) : 0.0f;
        const unsigned pair = QUANTIZED == 2 ? int8_code(low) | int8_code(high) << 8 : e4m3_pair(low, high);
        packed.at[i] = static_cast<unsigned char>(pair);
        if (i + 1 < N) packed.at[i + (N > 1)] = static_cast<unsigned char>(pair >> 8);
    }
    *reinterpret_cast<CodeVector<N>*>(to) = packed;
}
