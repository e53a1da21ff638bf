// SPDX-License-Identifier: Apache-2.0
// What the two prefill kernels share: how work is cut, and the running softmax of a warp's 16 rows.
//
// Compile-time parameters: those of attention_common.cuh, HEAD_DIM, BLOCK_SIZE, NUM_KV_HEADS, GROUP, CAUSAL, PREFIX (1: keys before
// prefix_lens of the sequence are visible to all its queries), ROWS (query rows of a block) and KEYS (of a tile).
#pragma once
#include "attention_common.cuh"
#include "attention_pages.cuh"
#include "attention_work_split.cuh"

constexpr int PAGE_ROWS = BLOCK_SIZE < KEYS ? BLOCK_SIZE : KEYS;  // rows of one page in one tile
constexpr int PAGES_PER_TILE = KEYS / PAGE_ROWS;

struct Parameters {
    const Element* q;
    long long query_stride;
    const KvElement* k_pages;
    const KvElement* v_pages;
    Element* out;
    const int* block_tables;
    int max_blocks;
    const float* alibi_slopes;
    const float* kv_scales;
    const int* prefix_lens;  // by row; read only with PREFIX
    float query_scale;  // of queries before the product; read only with KV_FP8
    float scale, soft_cap;
    int window;
};

// One past the last key that a causal row sees.
__device__ __forceinline__ int visible_end(int position, int prefix) { return PREFIX ? max(position + 1, prefix) : position + 1; }

// One tile of query rows of one sequence and one kv head, and the key tiles that it sees.
struct Work {
    int kv_head, first_token, num_tokens, history, seq_len, first_packed_row, prefix, begin, end;
    const int* table;

    __device__ __forceinline__ static Work make(const Parameters& p, const PrefillTile& tile, int kv_head) {
        const int history = tile.seq_len - tile.num_tokens;
        const int last_token = min(tile.num_tokens - 1, (tile.first_row + ROWS - 1) / GROUP);
        const int prefix = PREFIX ? min(p.prefix_lens[tile.first_token], tile.seq_len) : 0;
        const int visible = CAUSAL ? visible_end(history + last_token, prefix) : tile.seq_len;
        const int begin = WINDOW ? max(0, history + tile.first_row / GROUP - p.window + 1) / KEYS : 0;
        return {kv_head,
                tile.first_token,
                tile.num_tokens,
                history,
                tile.seq_len,
                tile.first_row,
                prefix,
                begin,
                (visible + KEYS - 1) / KEYS,
                p.block_tables + static_cast<long long>(tile.seq_index) * p.max_blocks};
    }

    __device__ __forceinline__ bool has_row(int row) const { return first_packed_row + row < num_tokens * GROUP; }
    __device__ __forceinline__ int token(int row) const { return min((first_packed_row + row) / GROUP, num_tokens - 1); }
    __device__ __forceinline__ int position(int row) const { return history + token(row); }
    __device__ __forceinline__ int head(int row) const { return kv_head * GROUP + (first_packed_row + row) % GROUP; }

    // Where a row's query and its output begin.
    __device__ __forceinline__ const Element* query(const Parameters& p, int row) const {
        return p.q + (first_token + token(row)) * p.query_stride + head(row) * HEAD_DIM;
    }
    __device__ __forceinline__ Element* out(const Parameters& p, int row) const {
        return p.out + (static_cast<long long>(first_token + token(row)) * NUM_KV_HEADS * GROUP + head(row)) * HEAD_DIM;
    }

    // The `index`-th page of a tile; 0 past the sequence.
    __device__ __forceinline__ int page(int tile, int index) const {
        const int key = tile * KEYS + index * PAGE_ROWS;
        return index < PAGES_PER_TILE && tile < end && key < seq_len ? table[key / BLOCK_SIZE] : 0;
    }
};

constexpr float LARGEST_GROWTH = 8.0f;

// The softmax state of a warp's 16 rows; a thread has rows lane / 4 and lane / 4 + 8, as the tensor cores' results lie.
struct SoftmaxRows {
    float maximum[2], sum[2], slope[2];
    int position[2], first_position, last_position;

    __device__ __forceinline__ void begin(const Parameters& p, const Work& work, int first_row) {
        first_position = work.position(first_row);
        last_position = work.position(first_row + 15);
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            const int row = first_row + threadIdx.x % 32 / 4 + side * 8;
            maximum[side] = NEGATIVE_INFINITY;
            sum[side] = 0.0f;
            position[side] = work.position(row);
            slope[side] = ALIBI ? p.alibi_slopes[work.head(row)] * LOG2_E : 0.0f;
        }
    }

    __device__ __forceinline__ bool needs_mask(const Parameters& p, const Work& work, int tile) const {
        bool needed = (tile + 1) * KEYS > (CAUSAL ? visible_end(first_position, work.prefix) : work.seq_len);
        if (WINDOW) needed = needed || tile * KEYS <= last_position - p.window;
        return needed;
    }

    // Scores of a tile become probabilities, relative to a reference that is the rows' maximum or up to 2 ** LARGEST_GROWTH
    // below it, so that it seldom moves: earlier outputs are to be multiplied by `factor`, mostly one (the sums are, here).
    __device__ __forceinline__ void advance(float (&scores)[KEYS / 8][4], float (&factor)[2], const Parameters& p, const Work& work, int tile) {
        const ScoreTransform to_score = ScoreTransform::make(p.scale, p.soft_cap);
        constexpr bool PLAIN = !SOFT_CAP && !ALIBI;  // then scaling is folded into the exponent
#pragma unroll
        for (int i = 0; i < KEYS / 8; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (!PLAIN) scores[i][j] = to_score(scores[i][j], slope[j / 2], key_of(tile, i, j), position[j / 2]);
            }
        if (needs_mask(p, work, tile)) mask(scores, p, work, tile);
        const float unit = PLAIN ? to_score.scale : 1.0f;
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            float new_maximum = maximum[side];
#pragma unroll
            for (int i = 0; i < KEYS / 8; ++i) new_maximum = fmaxf(new_maximum, fmaxf(scores[i][2 * side], scores[i][2 * side + 1]));
            new_maximum = fmaxf(new_maximum, __shfl_xor_sync(~0u, new_maximum, 1));
            new_maximum = fmaxf(new_maximum, __shfl_xor_sync(~0u, new_maximum, 2));
            const bool moves = !((new_maximum - maximum[side]) * unit <= LARGEST_GROWTH);
            if (!moves) new_maximum = maximum[side];
            // A row that has seen nothing yet keeps weight 0: exp2(-inf - 0), not exp2(-inf + inf).
            const float shift = new_maximum == NEGATIVE_INFINITY ? 0.0f : new_maximum * unit;
            factor[side] = moves ? exp2_fast(maximum[side] * unit - shift) : 1.0f;
            maximum[side] = new_maximum;
            float total = 0.0f;
#pragma unroll
            for (int i = 0; i < KEYS / 8; ++i)
#pragma unroll
                for (int j = 2 * side; j < 2 * side + 2; ++j) {
                    scores[i][j] = exp2_fast(fmaf(scores[i][j], unit, -shift));
                    total += scores[i][j];
                }
            sum[side] = sum[side] * factor[side] + total;
        }
    }

    // One over the sum over all keys; all four lanes of a row call it.
    __device__ __forceinline__ float inverse_sum(int side) const {
        float total = sum[side];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        return __fdividef(1.0f, total);
    }

private:
    __device__ __forceinline__ static int key_of(int tile, int i, int j) {
        return tile * KEYS + i * 8 + threadIdx.x % 4 * 2 + j % 2;
    }

    __device__ __forceinline__ void mask(float (&scores)[KEYS / 8][4], const Parameters& p, const Work& work, int tile) const {
#pragma unroll
        for (int i = 0; i < KEYS / 8; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int key = key_of(tile, i, j);
                bool visible = key < (CAUSAL ? visible_end(position[j / 2], work.prefix) : work.seq_len);
                if (WINDOW) visible = visible && key > position[j / 2] - p.window;
                if (!visible) scores[i][j] = NEGATIVE_INFINITY;
            }
    }
};

// Probabilities of 16 keys as the tensor cores' left operand.
__device__ __forceinline__ void pack_probabilities(unsigned (&packed)[4], const float (&scores)[KEYS / 8][4], int step) {
    packed[0] = pack_operands(scores[2 * step][0], scores[2 * step][1]);
    packed[1] = pack_operands(scores[2 * step][2], scores[2 * step][3]);
    packed[2] = pack_operands(scores[2 * step + 1][0], scores[2 * step + 1][1]);
    packed[3] = pack_operands(scores[2 * step + 1][2], scores[2 * step + 1][3]);
}

// This block's share of the work, one (tile, kv head) after another: longest first, every second round backwards, so that no
// block gets the longest of each round. The next entry is always on its way.
struct WorkQueue {
    const Parameters& p;
    const int4* tiles;
    const int num_items;
    int item, step;
    PrefillTile upcoming;

    __device__ __forceinline__ WorkQueue(const Parameters& p, const int* work_split, const int4* tiles)
        : p(p), tiles(tiles), num_items(work_split[2] * NUM_KV_HEADS), item(blockIdx.x), step(2 * (gridDim.x - blockIdx.x) - 1) {
        prefetch();
    }
    __device__ __forceinline__ bool has_next() const { return item < num_items; }
    __device__ __forceinline__ Work next() {
        const Work work = Work::make(p, upcoming, item % NUM_KV_HEADS);
        item += step;
        step = 2 * gridDim.x - step;
        prefetch();
        return work;
    }

private:
    __device__ __forceinline__ void prefetch() {
        if (has_next()) upcoming = PrefillTile::load(tiles, item / NUM_KV_HEADS);
    }
};
