// SPDX-License-Identifier: Apache-2.0
// After the qkv projection: rotate queries and keys by their positions and put keys and values into the KV pages.
// Shapes: qkv [T, (H + 2K) * C] = [queries | keys | values] (queries rotated in place);
//     cos, sin [max_positions, R / 2] float32; positions, slot_mapping [T] int32; pages [N, K, P, C].
//     With KV_FP8 pages are e4m3 bytes: code = x / scale, where x is what a 16-bit page would hold; kv_scales [2, K] float32, of
//     keys and of values; saturated [1] int counts values beyond the largest code.
//     A slot is block * P + offset; a negative slot marks a padding row, which is left alone.
// Half style (Llama, GPT-NeoX) pairs (i, i + R/2); INTERLEAVED (GPT-J) pairs (2i, 2i + 1). Channels from R on pass.
// PARTS = 2 (ChatGLM 1): channels from 0 and from R on are rotated, the first by the position in the prefix, at whose last token later ones
//     stay, the second by the position after that token, 0 before it; prefix_lens [T] int32. Channels from 2 R on pass.
// Defines: SCALAR, NUM_HEADS (H), NUM_KV_HEADS (K), HEAD_DIM (C), ROTARY_DIM (R; 0 = no rotation), BLOCK_SIZE (P), VEC,
//     PARTS (1 or 2), INTERLEAVED, KV_FP8, NUM_THREADS. VEC divides C, R / 2 and C - PARTS R.
// One thread an item: a pair of vectors to rotate, or one vector to copy. It loads what depends on no other load before it looks at the slot:
// the time of a large step is that of a few loads one after the other.
// Reference: x1 * cos - x2 * sin, x2 * cos + x1 * sin in float32, rounded once. Su et al. 2021.
#include "dtype.cuh"
#include "fp8.cuh"
#include "launch.cuh"

// The "+ !X" below keep divisors of unused branches from being zero.
constexpr int PAIRS = ROTARY_DIM / 2 / VEC;                       // rotated vector pairs of a part of a head
constexpr int PASSED = (HEAD_DIM - PARTS * ROTARY_DIM) / VEC;            // unrotated vectors a head
constexpr int ROTATED_ITEMS = (NUM_HEADS + NUM_KV_HEADS) * PARTS * PAIRS;
constexpr int PASSED_ITEMS = NUM_KV_HEADS * PASSED;                 // unrotated channels of keys
constexpr int VALUE_ITEMS = NUM_KV_HEADS * (HEAD_DIM / VEC);
constexpr int ITEMS = ROTATED_ITEMS + PASSED_ITEMS + VALUE_ITEMS;
constexpr int ROW = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM;

__device__ __forceinline__ int64 page_offset(int slot, int head) {
    return ((static_cast<int64>(slot / BLOCK_SIZE) * NUM_KV_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM;
}

#if KV_FP8
using page_element = unsigned char;

struct alignas(VEC) Codes {
    unsigned char at[VEC];
};

// What a page slot gets: values that were rounded to storage, or the storage itself.
struct PageWriter {
    float inverse;
    int* saturated;

    __device__ __forceinline__ PageWriter(const float* kv_scales, int kind, int head, int* saturated)
        : inverse(__fdiv_rn(1.0f, kv_scales[kind * NUM_KV_HEADS + head])), saturated(saturated) {}

    __device__ __forceinline__ void write(page_element* to, const float (&from)[VEC]) const {
        Codes packed;
        float scaled[VEC + VEC % 2] = {};
        int beyond = 0;
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            scaled[i] = __fmul_rn(rounded(from[i]), inverse);
            beyond += fabsf(scaled[i]) > 448.0f;
        }
#pragma unroll
        for (int i = 0; i < VEC; ++i)
            packed.at[i] = static_cast<unsigned char>(e4m3_pair(scaled[i & ~1], scaled[i | VEC > 1]) >> i % 2 * 8);
        *reinterpret_cast<Codes*>(to) = packed;
        if (beyond) atomicAdd(saturated, beyond);
    }

    __device__ __forceinline__ void copy(const scalar* from, page_element* to) const {
        float value[VEC];
        load(from, value);
        write(to, value);
    }
};
#else
using page_element = scalar;

struct PageWriter {
    __device__ __forceinline__ PageWriter(const float*, int, int, int*) {}
    __device__ __forceinline__ void write(page_element* to, const float (&from)[VEC]) const { store(to, from); }
    __device__ __forceinline__ void copy(const scalar* from, page_element* to) const {
        *reinterpret_cast<Vector<VEC>*>(to) = *reinterpret_cast<const Vector<VEC>*>(from);
    }
};
#endif
constexpr int KEYS = 0, VALUES = 1;  // rows of kv_scales

struct alignas(VEC % 4 == 0 ? 16 : 4) Angles {
    float at[VEC];
};

__device__ __forceinline__ void rotate(const Angles& cos, const Angles& sin, float (&first)[VEC], float (&second)[VEC]) {
    float merged[2 * VEC];
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        merged[i] = first[i];
        merged[VEC + i] = second[i];
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        const int a = INTERLEAVED ? 2 * i : i;
        const int b = INTERLEAVED ? 2 * i + 1 : VEC + i;
        const float x = merged[a], y = merged[b];
        merged[a] = x * cos.at[i] - y * sin.at[i];
        merged[b] = y * cos.at[i] + x * sin.at[i];
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        first[i] = merged[i];
        second[i] = merged[VEC + i];
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
rotary_kv_write(scalar* __restrict__ qkv, const float* __restrict__ cos_table, const float* __restrict__ sin_table,
                const int* __restrict__ positions, const int* __restrict__ prefix_lens, const int* __restrict__ slot_mapping,
                page_element* __restrict__ key_pages, page_element* __restrict__ value_pages,
                const float* __restrict__ kv_scales, int* __restrict__ saturated, int num_tokens) {
    let_next_start();
    wait_for_previous();
    const unsigned index = blockIdx.x * NUM_THREADS + threadIdx.x;
    const int token = static_cast<int>(index / ITEMS);
    if (token >= num_tokens) return;
    const int slot = slot_mapping[token];
    int item = static_cast<int>(index % ITEMS);
    scalar* const row = qkv + static_cast<int64>(token) * ROW;

    if constexpr (ROTATED_ITEMS > 0) {
        if (item < ROTATED_ITEMS) {
            const int head = item / (PARTS * PAIRS + !PAIRS);
            const int part = item % (PARTS * PAIRS + !PAIRS) / (PAIRS + !PAIRS);
            const int pair = item % (PAIRS + !PAIRS);
            const int a = part * ROTARY_DIM + (INTERLEAVED ? 2 * pair * VEC : pair * VEC);
            const int b = INTERLEAVED ? a + VEC : ROTARY_DIM / 2 + a;
            int position = positions[token];
            if constexpr (PARTS == 2) {
                const int last = max(prefix_lens[token] - 1, 0);
                position = part == 0 ? min(position, last) : max(position - last, 0);
            }
            float first[VEC], second[VEC];
            load(row + head * HEAD_DIM + a, first);
            load(row + head * HEAD_DIM + b, second);
            if (slot < 0) return;
            const int64 angle = static_cast<int64>(position) * (ROTARY_DIM / 2) + pair * VEC;
            rotate(*reinterpret_cast<const Angles*>(cos_table + angle),
                   *reinterpret_cast<const Angles*>(sin_table + angle), first, second);
            if (head < NUM_HEADS) {
                store(row + head * HEAD_DIM + a, first);
                store(row + head * HEAD_DIM + b, second);
            }
            if (head >= NUM_HEADS) {
                page_element* const key = key_pages + page_offset(slot, head - NUM_HEADS);
                const PageWriter writer(kv_scales, KEYS, head - NUM_HEADS, saturated);
                writer.write(key + a, first);
                writer.write(key + b, second);
            }
            return;
        }
    }
    if (slot < 0) return;
    item -= ROTATED_ITEMS;
    if constexpr (PASSED_ITEMS > 0) {
        if (item < PASSED_ITEMS) {
            const int head = item / (PASSED + !PASSED);
            const int at = PARTS * ROTARY_DIM + item % (PASSED + !PASSED) * VEC;
            const PageWriter writer(kv_scales, KEYS, head, saturated);
            writer.copy(row + (NUM_HEADS + head) * HEAD_DIM + at, key_pages + page_offset(slot, head) + at);
            return;
        }
    }
    item -= PASSED_ITEMS;
    const int head = item / (HEAD_DIM / VEC);
    const int at = item % (HEAD_DIM / VEC) * VEC;
    const PageWriter writer(kv_scales, VALUES, head, saturated);
    writer.copy(row + (NUM_HEADS + NUM_KV_HEADS + head) * HEAD_DIM + at, value_pages + page_offset(slot, head) + at);
}
