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

// Two 16-bit values in one word, the earlier one in its lower half.
template <typename T>
struct Pair {
    static __device__ uint32 of(float low, float high);
    static __device__ float low(uint32 pair);
    static __device__ float high(uint32 pair);
};

template <>
struct Pair<__nv_bfloat16> {
    static __device__ __forceinline__ uint32 of(float low, float high) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const uint32*>(&pair);
    }
    static __device__ __forceinline__ float low(uint32 pair) { return __uint_as_float(pair << 16); }
    static __device__ __forceinline__ float high(uint32 pair) { return __uint_as_float(pair & 0xffff0000u); }
};

template <>
struct Pair<__half> {
    static __device__ __forceinline__ uint32 of(float low, float high) {
        const __half2 pair = __floats2half2_rn(low, high);
        return *reinterpret_cast<const uint32*>(&pair);
    }
    static __device__ __forceinline__ float low(uint32 pair) { return __low2float(*reinterpret_cast<const __half2*>(&pair)); }
    static __device__ __forceinline__ float high(uint32 pair) { return __high2float(*reinterpret_cast<const __half2*>(&pair)); }
};

// N neighbours as they are stored, word by word: what a kernel keeps of a row takes half of the registers that float32 would. The upper half
// of a lone 16-bit value's word is 0.
template <int N>
struct alignas(N * sizeof(scalar) < 4 ? 4 : N * sizeof(scalar)) Packed {
    static constexpr int NUM_WORDS = (N * sizeof(scalar) + 3) / 4;
    uint32 word[NUM_WORDS];
};

template <int N>
__device__ __forceinline__ Packed<N> load_packed(const scalar* from) {
    if constexpr (N * sizeof(scalar) < 4) return {{*reinterpret_cast<const unsigned short*>(from)}};
    else return *reinterpret_cast<const Packed<N>*>(from);
}

template <int N>
__device__ __forceinline__ Packed<N> pack(const float (&from)[N]) {
    Packed<N> to;
#pragma unroll
    for (int i = 0; i < to.NUM_WORDS; ++i) {
        if constexpr (sizeof(scalar) == 4) to.word[i] = __float_as_uint(from[i]);
        else to.word[i] = Pair<scalar>::of(from[2 * i], N > 1 ? from[2 * i + (N > 1)] : 0.0f);
    }
    return to;
}

template <int N>
__device__ __forceinline__ void unpack(const Packed<N>& from, float (&to)[N]) {
#pragma unroll
    for (int i = 0; i < from.NUM_WORDS; ++i) {
        if constexpr (sizeof(scalar) == 4) {
            to[i] = __uint_as_float(from.word[i]);
        } else {
            to[2 * i] = Pair<scalar>::low(from.word[i]);
            if constexpr (N > 1) to[2 * i + 1] = Pair<scalar>::high(from.word[i]);
        }
    }
}

// As above of N values, two by an instruction.
template <int N>
__device__ __forceinline__ void round_all(float (&values)[N]) {
    unpack(pack(values), values);
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
