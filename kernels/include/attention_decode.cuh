// SPDX-License-Identifier: Apache-2.0
// What the parts of attention_decode.cu share: sizes, arguments, shared memory, units of work and an item's running result.
//
// An item is one sequence and at most HEADS_PER_ITEM query heads that share a key/value head; a unit is TILE tokens of it.
// Compile-time parameters: those of attention_decode.cu.
#pragma once
#include "attention_common.cuh"
#include "attention_pages.cuh"
#include "attention_work_split.cuh"
#include "ring_cursor.cuh"

constexpr int TILE = DECODE_TILE;
constexpr int WARPS = 4;
constexpr int CONSUMERS = WARPS * 32;
constexpr int THREADS = CONSUMERS + 32;  // the last warp feeds the ring
constexpr int PIECES = HEAD_DIM / 8;     // of 16 bytes in a row of queries
constexpr int KV_PIECE = 16 / sizeof(KvElement);  // elements of 16 bytes of keys or values
constexpr int KV_PIECES = HEAD_DIM / KV_PIECE;    // of 16 bytes in a row of keys or values
constexpr int STEPS = (HEAD_DIM + 15) / 16;
constexpr int ROW_BYTES = (2 * STEPS + 1) * 16;
constexpr int KV_ROW_BYTES = KV_FP8 ? (STEPS | 1) * 16 : ROW_BYTES;
constexpr int HEAD_TILES = (GROUP + HEADS_PER_ITEM - 1) / HEADS_PER_ITEM;
constexpr int ITEMS = NUM_KV_HEADS * HEAD_TILES;     // per sequence
constexpr int COLUMNS = (HEADS_PER_ITEM + 7) / 8;    // of 8 heads
constexpr int SLICES = (STEPS + WARPS - 1) / WARPS;  // of 16 output dims per warp
constexpr bool QUERY_IN_REGISTERS = STEPS * COLUMNS <= 32;
constexpr int PAGE_ROWS = BLOCK_SIZE < TILE ? BLOCK_SIZE : TILE;  // rows of one page in one tile
constexpr int PAGES_PER_TILE = TILE / PAGE_ROWS;
constexpr int QUERY_SLOTS = 2;

struct Parameters {
    const Element* q;
    long long query_stride;
    const KvElement* k_pages;
    const KvElement* v_pages;
    Element* out;
    const int* seq_lens;
    const int* seq_indices;
    const int* block_tables;
    int max_blocks;
    const int* work_split;
    float* partials;
    int* flags;
    const float* alibi_slopes;
    const float* kv_scales;
    float query_scale;  // of queries before the product; read only with KV_FP8
    float scale, soft_cap;
    int window;
};

// Tile `tile` of those that item `item` of sequence `seq` reads, which begin with the sequence's tile `first_tile` (above 0
// only with a window). `is_first`, `is_last`: of the item within this block's range. `index`: among all units of the step.
struct Unit {
    int seq, item, tile, first_tile, seq_len, is_first, is_last, index;

    __device__ __forceinline__ int kv_head() const { return item / HEAD_TILES; }
    __device__ __forceinline__ int num_heads() const { return min(HEADS_PER_ITEM, GROUP - item % HEAD_TILES * HEADS_PER_ITEM); }
    __device__ __forceinline__ int first_head() const { return kv_head() * GROUP + item % HEAD_TILES * HEADS_PER_ITEM; }
};

// Rows of queries are ROW_BYTES apart, those of keys and values KV_ROW_BYTES. Ring slots alternate between a tile's keys and its values; units[i]
// belongs to the keys in slot i.
struct Shared {
    alignas(16) unsigned char ring[RING][TILE * KV_ROW_BYTES];
    alignas(16) unsigned char query[QUERY_SLOTS][COLUMNS * 8 * ROW_BYTES];
    alignas(16) Element probability[COLUMNS][TILE][8];
    float maximum[WARPS][COLUMNS * 8];
    float sum[WARPS][COLUMNS * 8];
    Unit units[RING];
    alignas(8) unsigned long long full[RING], empty[RING], query_full[QUERY_SLOTS], query_empty[QUERY_SLOTS];

    // Once, by all threads of the block, before anything else; returns when all may use it.
    __device__ __forceinline__ void initialise() {
        clear_padding();
        if (threadIdx.x == 0) {
            for (int slot = 0; slot < RING; ++slot) {
                barrier_init(shared_address(&full[slot]), 32 + 1);
                barrier_init(shared_address(&empty[slot]), WARPS);
            }
            for (int slot = 0; slot < QUERY_SLOTS; ++slot) {
                barrier_init(shared_address(&query_full[slot]), 32);
                barrier_init(shared_address(&query_empty[slot]), WARPS);
            }
        }
        __syncthreads();
    }

    // Rows past the group and columns past HEAD_DIM are read by the tensor cores and never copied to.
    __device__ __forceinline__ void clear_padding() {
        if (HEAD_DIM % 16 || HEADS_PER_ITEM % 8) {
            auto* words = reinterpret_cast<uint4*>(this);
            constexpr int COUNT = (sizeof(ring) + sizeof(query)) / 16;
            const int begin = HEAD_DIM % 16 ? 0 : sizeof(ring) / 16;
            for (int i = begin + threadIdx.x; i < COUNT; i += THREADS) words[i] = make_uint4(0, 0, 0, 0);
        }
    }
};
static_assert(!KV_FP8 || HEAD_DIM % 16 == 0, "rows of codes are copied in pieces of 16");
static_assert(sizeof(Shared) <= SHARED_BYTES, "the wrapper's shared-memory size is too small");

// One thread's registers of an item's result over some of its tokens: out / sum is softmax(scores) V, the exponentials in
// both being relative to `maximum`. The thread's heads are 8 column + 2 (lane % 4) + {0, 1} of the item's.
struct PartialResult {
    float out[SLICES][COLUMNS][4];  // [dim, head] fragments of this warp's slices
    float maximum[COLUMNS][2], sum[COLUMNS][2];

    // Over no tokens.
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column)
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                maximum[column][side] = NEGATIVE_INFINITY;
                sum[column][side] = 0.0f;
            }
#pragma unroll
        for (int slice = 0; slice < SLICES; ++slice)
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column)
#pragma unroll
                for (int i = 0; i < 4; ++i) out[slice][column][i] = 0.0f;
    }
};
