// SPDX-License-Identifier: Apache-2.0
// What every sampling kernel shares: an order on (score, token) that has no ties, and noise that depends on the
// sequence's seed, the position and the token alone, so that batch and layout cannot change a token.
#pragma once
#include "dtype.cuh"

// Set by a score that is NaN or infinite; above every real key, so it survives each maximum and becomes token -1.
constexpr uint64 NOT_FINITE = ~0ull;
constexpr float LARGEST_SCORE = 0x1.fffffep127f;

// Unsigned integers that sort as the floats do; -0 counts as +0.
__device__ __forceinline__ uint32 ordered_bits(float value) {
    const uint32 bits = __float_as_uint(value + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float from_ordered_bits(uint32 ordered) {
    return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

// Larger = better: by score, then by the lower token id. All keys of a row are distinct.
__device__ __forceinline__ uint64 packed_key(float score, int token) {
    if (!(fabsf(score) <= LARGEST_SCORE)) return NOT_FINITE;
    return static_cast<uint64>(ordered_bits(score)) << 32 | static_cast<uint32>(~token);
}

__device__ __forceinline__ int token_of(uint64 key) {
    return key == NOT_FINITE ? -1 : static_cast<int>(~static_cast<uint32>(key));
}

__device__ __forceinline__ float score_of(uint64 key) { return from_ordered_bits(static_cast<uint32>(key >> 32)); }

struct Words4 {
    uint32 at[4];
};

// Philox4x32-10 (Salmon et al. 2011) at counter (quad, position, 0, 0). A separate function: it is called from
// unrolled loops.
__device__ __noinline__ Words4 philox(uint64 seed, int position, int quad) {
    uint32 c0 = quad, c1 = position, c2 = 0, c3 = 0;
    uint32 k0 = static_cast<uint32>(seed), k1 = static_cast<uint32>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint32 high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        const uint32 high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// logit / temperature + Gumbel noise, whose argmax is a draw from the softmax: -log(-log(u)) with u uniform on the odd
// multiples of 2^-24, all exact in float32 and none of them 0 or 1. Division, not a product with the reciprocal: the
// NumPy sampler divides, and scores must round alike.
__device__ __noinline__ float noisy_score(float logit, float temperature, uint32 bits) {
    const float u = (static_cast<float>(bits) + 0.5f) * 0x1p-23f;
    return __fdiv_rn(logit, temperature) - logf(-logf(u));
}

// The best of the tokens offered so far, in any order.
struct Winner {
    uint64 key = 0;
    float score = __int_as_float(0x7fffffff);  // NaN: nothing compares below it

    // Equal scores are settled by the keys. What is not finite fails the second test.
    __device__ __forceinline__ void offer(float candidate, int token) {
        if (candidate < score && candidate >= -LARGEST_SCORE) return;
        key = max(key, packed_key(candidate, token));
        score = candidate;
    }
};

// The best of tokens with noise. Logarithms are taken only of the few that could win: -log(u) >= 1 - u, so that
// 1 - u > exp(logit / temperature - best) says that -log(-log(u)) + logit / temperature < best. One per cent of
// slack covers the approximate exponential and the product that stands for the division.
class NoisyWinner {
  public:
    __device__ NoisyWinner(uint64 seed, int position, float temperature)
        : seed_(seed), position_(position), temperature_(temperature), factor_(LOG2_E / temperature) {}

    __device__ __forceinline__ void offer(float logit, int token) {
        if (token >> 2 != quad_) {  // four neighbours share a draw: visiting them in order costs one
            quad_ = token >> 2;
            words_ = philox(seed_, position_, quad_);
        }
        const uint32 word = token & 2 ? (token & 1 ? words_.at[3] : words_.at[2]) : (token & 1 ? words_.at[1] : words_.at[0]);
        const int bits = static_cast<int>(word >> 9);
        const float below_one = static_cast<float>((1 << 23) - 1 - bits) * 0x1p-23f + 0x1p-24f;  // 1 - u, exactly
        const float exponent = logit * factor_ - bound_;
        if (below_one > 1.01f * exp2f(exponent) && exponent >= -LARGEST_SCORE) return;
        winner_.offer(noisy_score(logit, temperature_, bits), token);
        bound_ = winner_.score * LOG2_E;
    }

    // Every lane learns the warp's best. All lanes must call it.
    __device__ __forceinline__ void share() {
        bound_ = from_ordered_bits(__reduce_max_sync(0xffffffffu, ordered_bits(bound_)));
    }

    __device__ uint64 key() const { return winner_.key; }

  private:
    static constexpr float LOG2_E = 1.4426950408889634f;
    uint64 seed_;
    int position_;
    int quad_ = -1;
    Words4 words_;
    Winner winner_;
    float temperature_, factor_;
    float bound_ = -LARGEST_SCORE;  // the best score so far in powers of two; at first everything is above it
};
