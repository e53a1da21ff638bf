// SPDX-License-Identifier: Apache-2.0
// The activation functions by name, so that -DACTIVATION=silu picks one. Hendrycks and Gimpel 2016 (GELU).
#pragma once

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
// 0.5 * (1 + tanh(y)) is sigmoid(2y): one exponential, and no cancellation where tanh nears -1.
__device__ __forceinline__ float gelu_tanh(float x) {
    return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
}
__device__ __forceinline__ float gelu_erf(float x) { return 0.5f * x * erfcf(-0.7071067811865476f * x); }
__device__ __forceinline__ float relu(float x) { return x > 0.0f ? x : 0.0f; }
__device__ __forceinline__ float relu2(float x) { return relu(x) * relu(x); }
