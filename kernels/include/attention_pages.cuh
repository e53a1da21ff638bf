// SPDX-License-Identifier: Apache-2.0
// What the attention kernels do differently when pages hold e4m3 (KV_FP8): conversion to float16 operands, and the scales.
//
// A cached value is code * scale, with one scale for the keys and one for the values of each key/value head. Codes convert to
// float16 exactly; the key scale goes into the queries, together with the model's scale on scores, before they are rounded to
// float16, and the value scale into the output. Products with float32 accumulators are exact in each term, so attention over
// fp8 pages differs from attention over the values they stand for by float16's rounding of queries and probabilities alone.
//
// kv_scales: [2, NUM_KV_HEADS] float32, keys then values; null without KV_FP8.
#pragma once
#include "attention_instructions.cuh"
#include "fp8.cuh"

// Two codes (the low 16 bits) as two float16 operands.
__device__ __forceinline__ unsigned operands_of(unsigned codes) { return e4m3_operands(static_cast<unsigned short>(codes)); }

// Eight codes as eight float16 operands.
__device__ __forceinline__ uint4 operands_of(unsigned low, unsigned high) {
    unsigned first[2], second[2];
    e4m3_operands(low, first);
    e4m3_operands(high, second);
    return make_uint4(first[0], first[1], second[0], second[1]);
}

// Two query elements as operands, multiplied by `factor`.
__device__ __forceinline__ unsigned scaled_operands(unsigned elements, float factor) {
    return pack_operands(unpack(elements, 0) * factor, unpack(elements, 1) * factor);
}

__device__ __forceinline__ uint4 scaled_operands(uint4 elements, float factor) {
    return make_uint4(scaled_operands(elements.x, factor), scaled_operands(elements.y, factor), scaled_operands(elements.z, factor),
                      scaled_operands(elements.w, factor));
}

// What queries of a key/value head are multiplied by, and its outputs.
__device__ __forceinline__ float query_factor(const float* kv_scales, int kv_head, float scale) { return kv_scales[kv_head] * scale; }
__device__ __forceinline__ float output_factor(const float* kv_scales, int kv_head) {
    return KV_FP8 ? kv_scales[NUM_KV_HEADS + kv_head] : 1.0f;
}
