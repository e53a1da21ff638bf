// SPDX-License-Identifier: Apache-2.0
// e4m3, the 8-bit floating point format of weights, activations and KV pages: four exponent bits (bias 7), three mantissa
// bits, no infinities, largest value 448, NaN 0x7f. Micikevicius et al. 2022, "FP8 formats for deep learning".
//
// The hardware converts from sm_89 on; before that, and on the emulator, integer arithmetic gives the same bits.
#pragma once
#include <cuda_fp16.h>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define CONVERTS_E4M3 1
#else
#define CONVERTS_E4M3 0
#endif

#if !CONVERTS_E4M3
// Nearest, ties to even; saturates at 448; NaN stays NaN.
__device__ __forceinline__ unsigned e4m3_bits(float value) {
    unsigned bits = __float_as_uint(value);
    const unsigned sign = bits >> 24 & 0x80u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7fu;
    if (bits >= 0x43e00000u) return sign | 0x7eu;  // 448 and above
    if (bits < 0x3c800000u) return sign | __float2uint_rn(__uint_as_float(bits) * 512.0f);  // below 2^-6: steps of 2^-9
    bits += 0x7ffffu + (bits >> 20 & 1u);
    return sign | ((bits >> 20) - (120u << 3));  // the exponent's bias goes from 127 to 7
}
#endif

// Exact.
__device__ __forceinline__ float e4m3_value(unsigned code) {
    const unsigned sign = (code & 0x80u) << 24, magnitude = code & 0x7fu;
    if (magnitude == 0x7fu) return __uint_as_float(sign | 0x7fc00000u);
    // As a float32 of the same digits, 120 exponents too low; the product is exact for subnormals too.
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 20) * 1.329227995784916e36f));
}

// Two neighbours to two bytes, `low` in the lower one.
__device__ __forceinline__ unsigned short e4m3_pair(float low, float high) {
#if CONVERTS_E4M3
    unsigned short pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return static_cast<unsigned short>(e4m3_bits(low) | e4m3_bits(high) << 8);
#endif
}

// Two codes (the low 16 bits) as a pair of float16 operands, the lower code first. Exact.
__device__ __forceinline__ unsigned e4m3_operands(unsigned short codes) {
#if CONVERTS_E4M3
    unsigned pair;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(codes));
    return pair;
#else
    const __half low = __float2half_rn(e4m3_value(codes & 0xffu)), high = __float2half_rn(e4m3_value(codes >> 8));
    return *reinterpret_cast<const unsigned short*>(&low) | static_cast<unsigned>(*reinterpret_cast<const unsigned short*>(&high)) << 16;
#endif
}

// Four codes as two pairs, the lower codes first.
__device__ __forceinline__ void e4m3_operands(unsigned codes, unsigned (&pairs)[2]) {
    unsigned short low, high;
#if CONVERTS_E4M3
    asm("mov.b32 {%0, %1}, %2;" : "=h"(low), "=h"(high) : "r"(codes));  // the conversion names the upper half; a shift would be one more
#else
    low = static_cast<unsigned short>(codes);
    high = static_cast<unsigned short>(codes >> 16);
#endif
    pairs[0] = e4m3_operands(low);
    pairs[1] = e4m3_operands(high);
}
