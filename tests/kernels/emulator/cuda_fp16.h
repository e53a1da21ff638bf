// SPDX-License-Identifier: Apache-2.0
// The part of CUDA's half type that the kernels use, for the emulator.
#pragma once
struct __half {
    _Float16 value;
};
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
struct alignas(4) __half2 {
    __half x, y;
};
inline __half2 __floats2half2_rn(float low, float high) { return {__float2half_rn(low), __float2half_rn(high)}; }
inline float __low2float(__half2 pair) { return __half2float(pair.x); }
inline float __high2float(__half2 pair) { return __half2float(pair.y); }
