// SPDX-License-Identifier: Apache-2.0
// Rows of values to 8-bit codes with one float32 scale a row, by the definitions of checkpoints/quantization/numbers.py:
//     fp8:  scale = max(amax / 448, 1 / (448 * 512)),  code = e4m3(x * (1 / scale))
//     int8: scale = max(amax / 127, 2^-40),            code = clip(round(x * (1 / scale)), -128, 127)
// amax is the largest |x| of the values as they would have been stored, at most `bound` (infinity = none), so fused and separate
// kernels give the same codes. With STATIC_SCALE all rows have the scale `bound`, and what is beyond its range saturates.
// Compile-time parameters: QUANTIZED (0 = off, 1 = fp8, 2 = int8), STATIC_SCALE.
#pragma once
#include "dtype.cuh"
#include "fp8.cuh"
#include "reduce.cuh"

struct RowScale {
    float scale, inverse;
};

// Magnitudes compare like unsigned integers, and NaN above all: a row with a NaN gets a NaN for its scale.
__device__ __forceinline__ unsigned magnitude_bits(float value) { return __float_as_uint(value) & 0x7fffffffu; }

// Whether a row has element `at`, which lies in the given chunk; of chunks that are whole the compiler knows.
template <int COLUMNS_OF_ROW, int CHUNK_SIZE>
__device__ __forceinline__ bool is_in_row(int chunk, int at) {
    return (chunk + 1) * CHUNK_SIZE <= COLUMNS_OF_ROW || at < COLUMNS_OF_ROW;
}

// The largest magnitude of many packed values: word by word, of 16-bit values the two halves by themselves.
struct LargestMagnitude {
    uint32 word = 0;

    template <int N>
    __device__ __forceinline__ void add(const Packed<N>& values) {
#pragma unroll
        for (int i = 0; i < values.NUM_WORDS; ++i) {
            if constexpr (sizeof(scalar) == 4) word = Max()(word, values.word[i] & 0x7fffffffu);
            else word = __vmaxu2(word, values.word[i] & 0x7fff7fffu);
        }
    }

    // As magnitude_bits has it.
    __device__ __forceinline__ unsigned bits() const {
        if constexpr (sizeof(scalar) == 4) return word;
        const uint32 largest = Max()(word & 0xffffu, word >> 16);
        Packed<1> alone;
        alone.word[0] = largest;
        float value[1];
        unpack(alone, value);
        return __float_as_uint(value[0]);
    }
};

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

// The scale of the block's row from the largest magnitude in each thread. The first warp divides, and all threads read its result: divisions in
// every thread are more instructions than the second barrier costs. Call it once: the shared words are not free for another call.
template <int THREADS>
__device__ __forceinline__ RowScale block_row_scale(unsigned amax_bits, float bound) {
    if constexpr (STATIC_SCALE) return row_scale(0u, bound);
    constexpr int NUM_WARPS = THREADS / 32;
    amax_bits = __reduce_max_sync(0xffffffffu, amax_bits);
    if constexpr (NUM_WARPS == 1) return row_scale(amax_bits, bound);
    __shared__ unsigned of_warp[NUM_WARPS];
    __shared__ RowScale of_row;
    const int lane = threadIdx.x % 32;
    if (lane == 0) of_warp[threadIdx.x / 32] = amax_bits;
    __syncthreads();
    if (threadIdx.x < 32) {
        amax_bits = __reduce_max_sync(0xffffffffu, lane < NUM_WARPS ? of_warp[lane] : 0u);
        if (lane == 0) of_row = row_scale(amax_bits, bound);
    }
    __syncthreads();
    return of_row;
}

__device__ __forceinline__ unsigned code_pair(float low, float high) {
    if constexpr (QUANTIZED == 2) return int8_code(low) | int8_code(high) << 8;
    return e4m3_pair(low, high);
}

template <int N>
struct alignas(N) CodeWords {
    unsigned word[N / 4];
};

// N neighbours, a power of two; the address is a multiple of N.
template <int N>
__device__ __forceinline__ void store_codes(unsigned char* to, const float (&values)[N], float inverse) {
    unsigned pair[(N + 1) / 2];
#pragma unroll
    for (int i = 0; i < N; i += 2)
        pair[i / 2] = code_pair(__fmul_rn(values[i], inverse), N > 1 ? __fmul_rn(values[i + (N > 1)], inverse) : 0.0f);
    if constexpr (N == 1) {
        *to = static_cast<unsigned char>(pair[0]);
    } else if constexpr (N == 2) {
        *reinterpret_cast<unsigned short*>(to) = static_cast<unsigned short>(pair[0]);
    } else {
        CodeWords<N> codes;
#pragma unroll
        for (int i = 0; i < N / 4; ++i) codes.word[i] = pair[2 * i] | pair[2 * i + 1] << 16;
        *reinterpret_cast<CodeWords<N>*>(to) = codes;
    }
}

template <int N>
__device__ __forceinline__ void store_codes(unsigned char* to, const Packed<N>& values, float inverse) {
    float wide[N];
    unpack(values, wide);
    store_codes(to, wide, inverse);
}
