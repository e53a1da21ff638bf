// SPDX-License-Identifier: Apache-2.0
// The activation functions by name, so that -DACTIVATION=silu picks one. Hendrycks and Gimpel 2016 (GELU).
#pragma once

// Two instructions of the special function unit instead of an exponential with range scaling and an IEEE division. Exactly 0 and 1 at the
// infinities, NaN at NaN. The result is within 4 units of float32's last place for x >= 0; below that the rounding of the exponent counts too,
// at most 4 + 1.5 |x| units, and what is under 2^-126 becomes 0.
__device__ __forceinline__ float sigmoid(float x) {
    const float exponent = -1.4426950408889634f * x;
#ifdef __CUDA_ARCH__
    float power, inverse;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power));
    return inverse;
#else
    return 1.0f / (1.0f + exp2f(exponent));
#endif
}
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
// 0.5 * (1 + tanh(y)) is sigmoid(2y): one exponential, and no cancellation where tanh nears -1. 2y = 2 sqrt(2 / pi) (x + 0.044715 x^3).
__device__ __forceinline__ float gelu_tanh(float x) {
    return x * sigmoid(x * (1.5957691216057308f + 0.07135481627159834f * (x * x)));
}
__device__ __forceinline__ float gelu_erf(float x) { return 0.5f * x * erfcf(-0.7071067811865476f * x); }
__device__ __forceinline__ float relu(float x) { return x > 0.0f ? x : 0.0f; }
__device__ __forceinline__ float relu2(float x) { return relu(x) * relu(x); }
