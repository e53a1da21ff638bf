// SPDX-License-Identifier: Apache-2.0
// The storage type of a kernel (-DSCALAR=float, __half or __nv_bfloat16) and wide loads of it. Arithmetic is float32.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

using scalar = SCALAR;
using uint32 = unsigned int;
using uint64 = unsigned long long;
using int64 = long long;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ float to_float(signed char value) { return value; }

__device__ __forceinline__ void assign(float& to, float value) { to = value; }
__device__ __forceinline__ void assign(signed char& to, float value) { to = static_cast<signed char>(value); }
__device__ __forceinline__ void assign(__half& to, float value) { to = __float2half_rn(value); }
__device__ __forceinline__ void assign(__nv_bfloat16& to, float value) { to = __float2bfloat16_rn(value); }

// What `value` becomes when it is stored: later arithmetic that must equal an unfused kernel's starts from this.
__device__ __forceinline__ float rounded(float value) {
    scalar stored;
    assign(stored, value);
    return to_float(stored);
}

// N neighbours that move in one instruction; N * sizeof(scalar) <= 16, the address a multiple of it.
template <int N>
struct alignas(N * sizeof(scalar)) Vector {
    scalar lane[N];
};

template <int N>
__device__ __forceinline__ void load(const scalar* from, float (&to)[N]) {
    const Vector<N> packed = *reinterpret_cast<const Vector<N>*>(from);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = to_float(packed.lane[i]);
}

template <int N>
__device__ __forceinline__ void store(scalar* to, const float (&from)[N]) {
    Vector<N> packed;
#pragma unroll
    for (int i = 0; i < N; ++i) assign(packed.lane[i], from[i]);
    *reinterpret_cast<Vector<N>*>(to) = packed;
}
