// SPDX-License-Identifier: Apache-2.0
// What the attention kernels share besides their instructions: the transform from products to scores.
//
// Compile-time parameters: BFLOAT16 (1 = bfloat16, 0 = float16), SOFT_CAP, ALIBI (0 or 1).
#pragma once
#include "attention_instructions.cuh"

constexpr float LOG2_E = 1.4426950408889634f;

struct ScoreTransform {
    float scale;     // the model's scale, times log2(e) unless a soft cap comes first
    float soft_cap;  // read only with SOFT_CAP

    // A raw product of query and key to a score whose exp2 is the softmax's numerator. `slope` already holds log2(e).
    __device__ __forceinline__ float operator()(float product, float slope, int key_position, int query_position) const {
        float score = product * scale;
#if SOFT_CAP
        // tanh(x) = 1 - 2 / (exp(2 x) + 1): the hardware's tanh.approx is wrong by up to soft_cap / 2048.
        const float exponential = exp2_fast(score * (2.0f * LOG2_E / soft_cap));
        score = soft_cap * LOG2_E * (1.0f - __fdividef(2.0f, exponential + 1.0f));
#endif
#if ALIBI
        score += slope * static_cast<float>(key_position - query_position);
#endif
        return score;
    }

    __device__ __forceinline__ static ScoreTransform make(float scale, float soft_cap) {
#if SOFT_CAP
        return {scale, soft_cap};
#else
        return {scale * LOG2_E, soft_cap};
#endif
    }
};
