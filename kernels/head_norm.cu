// SPDX-License-Identifier: Apache-2.0
// Norm of every query and key head before rotation, in place; one warp a head.
// Shapes: qkv [T, (H + 2K) * C] = [queries | keys | values]; query_weight, key_weight [C], or with OWN_WEIGHTS [H, C], [K, C];
// query_bias, key_bias like them.
// Defines: SCALAR, NUM_HEADS (H), NUM_KV_HEADS (K), HEAD_DIM (C), NUM_THREADS, and 0 or 1: OWN_WEIGHTS, LAYER_NORM (else RMSNorm), HAS_BIAS.
// Reference: the same in float64, rounded once. Henry et al. 2020 (query-key normalisation).
#include "dtype.cuh"
#include "launch.cuh"
#include "reduce.cuh"

constexpr int EACH = (HEAD_DIM + 31) / 32;
constexpr int NORMED = NUM_HEADS + NUM_KV_HEADS;

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
head_norm(scalar* __restrict__ qkv, const scalar* __restrict__ query_weight, const scalar* __restrict__ key_weight,
          const scalar* __restrict__ query_bias, const scalar* __restrict__ key_bias, int num_tokens, float epsilon, float weight_offset) {
    let_next_start();
    wait_for_previous();
    const int lane = threadIdx.x % 32;
    const int64 item = static_cast<int64>(blockIdx.x) * (NUM_THREADS / 32) + threadIdx.x / 32;
    if (item >= static_cast<int64>(num_tokens) * NORMED) return;
    const int head = static_cast<int>(item % NORMED);
    scalar* const row = qkv + (item / NORMED * (NUM_HEADS + 2 * NUM_KV_HEADS) + head) * HEAD_DIM;
    const int first = OWN_WEIGHTS ? (head < NUM_HEADS ? head : head - NUM_HEADS) * HEAD_DIM : 0;
    const scalar* const weight = (head < NUM_HEADS ? query_weight : key_weight) + first;
    const scalar* const bias = HAS_BIAS ? (head < NUM_HEADS ? query_bias : key_bias) + first : nullptr;
    float value[EACH] = {}, total = 0.0f;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        if (i * 32 + lane < HEAD_DIM) value[i] = to_float(row[i * 32 + lane]);
        total += LAYER_NORM ? value[i] : value[i] * value[i];
    }
    if constexpr (LAYER_NORM) {
        const float mean = warp_reduce(total, Sum()) / HEAD_DIM;
        total = 0.0f;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            if (i * 32 + lane < HEAD_DIM) value[i] -= mean;
            total += value[i] * value[i];
        }
    }
    const float factor = rsqrtf(warp_reduce(total, Sum()) / HEAD_DIM + epsilon);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int at = i * 32 + lane;
        if (at >= HEAD_DIM) continue;
        const float shift = HAS_BIAS ? to_float(bias[at]) : 0.0f;
        assign(row[at], value[i] * factor * (weight_offset + to_float(weight[at])) + shift);
    }
}
