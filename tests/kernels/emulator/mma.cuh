// SPDX-License-Identifier: Apache-2.0
// kernels/include/mma.cuh for the emulator: operands meet through the warp exchange, by the layout that PTX documents.
#pragma once
#include "dtype.cuh"

struct MmaOperands {
    uint32 a[4];
    uint32 b[2];
};

template <typename T>
inline float half_word(uint32 word, int index) {
    const uint16_t bits = static_cast<uint16_t>(word >> 16 * index);
    T value;
    std::memcpy(&value, &bits, sizeof(bits));
    return to_float(value);
}

// Element (row, k) of a, [16, 16].
template <typename T>
inline float mma_a(int row, int k) {
    const auto from = emulator::offered_by<MmaOperands>(row % 8 * 4 + k % 8 / 2);
    return half_word<T>(from.a[row / 8 + k / 8 * 2], k % 2);
}

// Element (k, column) of b, [16, 8].
template <typename T>
inline float mma_b(int k, int column) {
    const auto from = emulator::offered_by<MmaOperands>(column * 4 + k % 8 / 2);
    return half_word<T>(from.b[k / 8], k % 2);
}

template <typename T>
inline void mma_16x8x16(float (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2], T) {
    MmaOperands own;
    std::memcpy(own.a, a, sizeof(own.a));
    std::memcpy(own.b, b, sizeof(own.b));
    emulator::offer(own);
    const int lane = emulator::current % 32;
    for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 16; ++k) d[i] += mma_a<T>(lane / 4 + i / 2 * 8, k) * mma_b<T>(k, lane % 4 * 2 + i % 2);
}

inline uint32 fma_pair(uint32 a, uint32 b, uint32 c, scalar) {
    uint32 d = 0;
    for (int i = 0; i < 2; ++i) {
        scalar half;
        assign(half, fmaf(half_word<scalar>(a, i), half_word<scalar>(b, i), half_word<scalar>(c, i)));
        uint16_t bits;
        std::memcpy(&bits, &half, sizeof(bits));
        d |= static_cast<uint32>(bits) << 16 * i;
    }
    return d;
}

inline int byte_value(uint32 word, int index) { return static_cast<signed char>(word >> 8 * index & 0xff); }

inline void mma_16x8x32(int (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
    MmaOperands own;
    std::memcpy(own.a, a, sizeof(own.a));
    std::memcpy(own.b, b, sizeof(own.b));
    emulator::offer(own);
    const int lane = emulator::current % 32;
    for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 32; ++k) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            const auto left = emulator::offered_by<MmaOperands>(row % 8 * 4 + k % 16 / 4);
            const auto right = emulator::offered_by<MmaOperands>(column * 4 + k % 16 / 4);
            d[i] += byte_value(left.a[row / 8 + k / 16 * 2], k % 4) * byte_value(right.b[k / 16], k % 4);
        }
}

inline uint4 load_streaming(const void* from) { return *static_cast<const uint4*>(from); }
