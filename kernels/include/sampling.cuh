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

// Philox4x32-10 (Salmon et al. 2011) and Gumbel noise from it: argmax(score + noise) is a draw from softmax(score).
class Noise {
  public:
    __device__ Noise(uint64 seed, int position) : seed_(seed), position_(position), quad_(-1) {}

    // -log(-log(u)), u uniform on the odd multiples of 2^-24: all exact in float32, none of them 0 or 1.
    __device__ __forceinline__ float gumbel(int token) {
        if (token >> 2 != quad_) draw(token >> 2);
        const uint32 word = token & 2 ? (token & 1 ? word3_ : word2_) : (token & 1 ? word1_ : word0_);
        const float u = (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f;
        return -logf(-logf(u));
    }

  private:
    // Four neighbouring tokens share a draw: visiting them in order costs one.
    __device__ __forceinline__ void draw(int quad) {
        quad_ = quad;
        uint32 c0 = quad, c1 = position_, c2 = 0, c3 = 0;
        uint32 k0 = static_cast<uint32>(seed_), k1 = static_cast<uint32>(seed_ >> 32);
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
        word0_ = c0;
        word1_ = c1;
        word2_ = c2;
        word3_ = c3;
    }

    uint64 seed_;
    int position_;
    int quad_;
    uint32 word0_, word1_, word2_, word3_;
};

// Division, not a product with the reciprocal: the NumPy sampler divides, and both must round alike.
__device__ __forceinline__ float scaled(float logit, float temperature) {
    return temperature > 0.0f ? __fdiv_rn(logit, temperature) : logit;
}
