// SPDX-License-Identifier: Apache-2.0
// Attention of sequences with several new tokens over paged keys and values: prefill, with or without earlier history.
//
// q: packed rows of queries, [H * HEAD_DIM] each, `query_stride` elements apart. k_pages, v_pages: [N, NUM_KV_HEADS,
// BLOCK_SIZE, HEAD_DIM]. out: [T, H * HEAD_DIM]. H = NUM_KV_HEADS * GROUP. work_split, prefill_tiles: from attention_work_split.cu.
//
// A block takes (tile, kv head) pairs of the work_split, longest first: ROWS query rows, a row being one token of one of the GROUP
// heads that share keys, so that short prompts fill tiles too. Each warp keeps 16 rows' scores, softmax state and output in
// registers; keys and values pass through two shared-memory stages, the next tile's copy under this tile's arithmetic.
//
// What is odd:
// - Page numbers are read two tiles ahead, by a few threads, through shared memory: a copy never waits for a table lookup.
// - Rows past the sequence's last token repeat its position, so they compute finite values that are never stored.
// - Tiles that every row of a warp sees in full skip the mask.
//
// Reference: Dao, "FlashAttention-2" (2023). Needs sm_80; attention_prefill_wgmma.cu is the Hopper version. Parameters:
// BFLOAT16, HEAD_DIM (multiple of 8, <= 256), BLOCK_SIZE (16, 32, 64, 128), NUM_KV_HEADS, GROUP, WARPS, KEYS (per tile, a
// multiple of 16; BLOCK_SIZE a multiple or a divisor of it), WINDOW, SOFT_CAP, ALIBI, CAUSAL, PREFIX, KV_FP8 (pages hold e4m3 and become
// float16 on their way into shared memory; HEAD_DIM % 16 == 0).
#define ROWS (WARPS * 16)
#include "attention_instructions.cuh"
#include "attention_prefill.cuh"
#include "launch.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int PIECES = HEAD_DIM / 8;  // of 16 bytes in a row of queries or output
constexpr int KV_PIECE = 16 / sizeof(KvElement);  // elements of 16 bytes of keys or values
constexpr int KV_PIECES = HEAD_DIM / KV_PIECE;    // of 16 bytes in a row of keys or values
constexpr int STEPS = (HEAD_DIM + 15) / 16;
constexpr int ROW_BYTES = (2 * STEPS + 1) * 16;
constexpr int TILE_BYTES = KEYS * ROW_BYTES;
constexpr bool QUERY_IN_REGISTERS = STEPS <= 8;

struct Shared {
    alignas(16) unsigned char query[ROWS * ROW_BYTES];
    alignas(16) unsigned char keys[2][TILE_BYTES];
    alignas(16) unsigned char values[2][TILE_BYTES];
    int pages[2][PAGES_PER_TILE];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "the wrapper's shared-memory size is too small");

__device__ __forceinline__ void copy_query(const Parameters& p, const Work& work, Shared& shared) {
    for (int i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
        const int row = i / PIECES, piece = i % PIECES;
        const bool valid = work.has_row(row);
        const unsigned destination = shared_address(shared.query) + row * ROW_BYTES + piece * 16;
#if KV_FP8
        const float factor = query_factor(p.kv_scales, work.kv_head, p.query_scale);
        const auto* source = reinterpret_cast<const uint4*>(work.query(p, row)) + piece;
        store_16_bytes(destination, valid ? scaled_operands(*source, factor) : make_uint4(0, 0, 0, 0));
#else
        copy_16_bytes(destination, work.query(p, row) + piece * 8, valid);
#endif
    }
}

#if KV_FP8
// Sixteen codes of a row as operands.
__device__ __forceinline__ void convert_codes(unsigned destination, const KvElement* source, bool valid) {
    const uint4 codes = valid ? *reinterpret_cast<const uint4*>(source) : make_uint4(0, 0, 0, 0);
    store_16_bytes(destination, operands_of(codes.x, codes.y));
    store_16_bytes(destination + 16, operands_of(codes.z, codes.w));
}
#endif

// Keys and values of one tile; rows past the sequence become zeros.
__device__ __forceinline__ void copy_tile(const Parameters& p, const Work& work, Shared& shared, int tile) {
    const int stage = tile % 2;
    const unsigned keys = shared_address(shared.keys[stage]), values = shared_address(shared.values[stage]);
#pragma unroll 4
    for (int i = threadIdx.x; i < KEYS * KV_PIECES; i += THREADS) {
        const int row = i / KV_PIECES, piece = i % KV_PIECES;
        const int key = tile * KEYS + row;
        const long long page = shared.pages[stage][row / PAGE_ROWS];
        const long long source = ((page * NUM_KV_HEADS + work.kv_head) * BLOCK_SIZE + key % BLOCK_SIZE) * HEAD_DIM + piece * KV_PIECE;
        const unsigned destination = row * ROW_BYTES + piece * KV_PIECE * 2;
#if KV_FP8
        convert_codes(keys + destination, p.k_pages + source, key < work.seq_len);
        convert_codes(values + destination, p.v_pages + source, key < work.seq_len);
#else
        copy_16_bytes(keys + destination, p.k_pages + source, key < work.seq_len);
        copy_16_bytes(values + destination, p.v_pages + source, key < work.seq_len);
#endif
    }
}

struct Rows {  // what one warp keeps of its 16 rows
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned q[QUERY_IN_REGISTERS ? STEPS : 1][4];
    float out[STEPS * 2][4];
    SoftmaxRows softmax;

    __device__ __forceinline__ void begin(const Parameters& p, const Work& work) {
#pragma unroll
        for (int i = 0; i < STEPS * 2; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) out[i][j] = 0.0f;
        softmax.begin(p, work, warp * 16);
    }

    __device__ __forceinline__ void load_query_step(unsigned (&r)[4], const Shared& shared, int step) const {
        load_matrices(r, shared_address(shared.query) + (warp * 16 + lane % 16) * ROW_BYTES + (step * 2 + lane / 16) * 16);
    }

    __device__ __forceinline__ void load_query(const Shared& shared) {
        if (QUERY_IN_REGISTERS) {
#pragma unroll
            for (int step = 0; step < STEPS; ++step) load_query_step(q[step], shared, step);
        }
    }

    __device__ __forceinline__ void score(float (&scores)[KEYS / 8][4], const Shared& shared, int stage) {
        const unsigned keys = shared_address(shared.keys[stage]) + (lane / 16 * 8 + lane % 8) * ROW_BYTES + lane / 8 % 2 * 16;
#pragma unroll
        for (int i = 0; i < KEYS / 8; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) scores[i][j] = 0.0f;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            unsigned fresh[4];
            if (!QUERY_IN_REGISTERS) load_query_step(fresh, shared, step);
            const unsigned(&query)[4] = QUERY_IN_REGISTERS ? q[QUERY_IN_REGISTERS ? step : 0] : fresh;
#pragma unroll
            for (int i = 0; i < KEYS / 16; ++i) {
                unsigned k[4];
                load_matrices(k, keys + i * 16 * ROW_BYTES + step * 32);
                multiply_add(scores[2 * i], query, k[0], k[1]);
                multiply_add(scores[2 * i + 1], query, k[2], k[3]);
            }
        }
    }

    __device__ __forceinline__ void rescale(const float (&factor)[2]) {
        if (__all_sync(~0u, factor[0] == 1.0f && factor[1] == 1.0f)) return;
#pragma unroll
        for (int i = 0; i < STEPS * 2; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) out[i][j] *= factor[j / 2];
    }

    __device__ __forceinline__ void accumulate(const float (&scores)[KEYS / 8][4], const Shared& shared, int stage) {
        const unsigned values = shared_address(shared.values[stage]) + lane % 16 * ROW_BYTES + lane / 16 * 16;
#pragma unroll
        for (int k = 0; k < KEYS / 16; ++k) {
            unsigned probability[4];
            pack_probabilities(probability, scores, k);
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                unsigned v[4];
                load_matrices_transposed(v, values + k * 16 * ROW_BYTES + step * 32);
                multiply_add(out[2 * step], probability, v[0], v[1]);
                multiply_add(out[2 * step + 1], probability, v[2], v[3]);
            }
        }
    }

    // Through this warp's rows of the query buffer, so that global writes are 16 bytes wide.
    __device__ __forceinline__ void store(const Parameters& p, const Work& work, Shared& shared) {
        unsigned char* own = shared.query + warp * 16 * ROW_BYTES;
        __syncwarp();  // other lanes may still read the queries
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            const float inverse = softmax.inverse_sum(side) * output_factor(p.kv_scales, work.kv_head);
            auto* row_words = reinterpret_cast<unsigned*>(own + (lane / 4 + side * 8) * ROW_BYTES) + lane % 4;
#pragma unroll
            for (int i = 0; i < STEPS * 2; ++i) row_words[i * 4] = pack(out[i][2 * side] * inverse, out[i][2 * side + 1] * inverse);
        }
        __syncwarp();
        for (int i = lane; i < 16 * PIECES; i += 32) {
            const int row = warp * 16 + i / PIECES, piece = i % PIECES;
            if (!work.has_row(row)) continue;
            *reinterpret_cast<uint4*>(work.out(p, row) + piece * 8) = *reinterpret_cast<const uint4*>(own + i / PIECES * ROW_BYTES + piece * 16);
        }
    }
};

__device__ __forceinline__ void attend(const Parameters& p, const Work& work, Shared& shared) {
    Rows rows;
    if (threadIdx.x < PAGES_PER_TILE) {
        shared.pages[work.begin % 2][threadIdx.x] = work.page(work.begin, threadIdx.x);
        shared.pages[(work.begin + 1) % 2][threadIdx.x] = work.page(work.begin + 1, threadIdx.x);
    }
    int page = work.page(work.begin + 2, threadIdx.x);
    __syncthreads();
    copy_query(p, work, shared);
    copy_tile(p, work, shared, work.begin);
    commit_copies();
    rows.begin(p, work);
    for (int tile = work.begin; tile < work.end; ++tile) {
        wait_for_copies();
        __syncthreads();  // this tile has arrived; all threads are done with the other stage and its page numbers
        if (tile == work.begin) rows.load_query(shared);
        if (tile + 1 < work.end) copy_tile(p, work, shared, tile + 1);
        commit_copies();
        if (threadIdx.x < PAGES_PER_TILE) shared.pages[tile % 2][threadIdx.x] = page;
        page = work.page(tile + 3, threadIdx.x);
        float scores[KEYS / 8][4];
        rows.score(scores, shared, tile % 2);
        float factor[2];
        rows.softmax.advance(scores, factor, p, work, tile);
        rows.rescale(factor);
        rows.accumulate(scores, shared, tile % 2);
    }
    rows.store(p, work, shared);
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_prefill(
    const Element* q, long long query_stride, const KvElement* k_pages, const KvElement* v_pages, Element* out,
    const int* block_tables, int max_blocks, const int* work_split, const int4* prefill_tiles, const float* alibi_slopes,
    const float* kv_scales, const int* prefix_lens, float scale, float soft_cap, int window) {
    const Parameters p = {q,           query_stride, k_pages, v_pages,                out,      block_tables, max_blocks, alibi_slopes, kv_scales,
                          prefix_lens, scale,        KV_FP8 ? 1.0f : scale, soft_cap, window};
    DYNAMIC_SHARED(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    let_next_start();
    wait_for_previous();
    WorkQueue queue(p, work_split, prefill_tiles);
    if (!queue.has_next()) return;
    if (HEAD_DIM % 16) {  // the tensor cores read a row's padding, which no copy writes
        for (int i = threadIdx.x; i < sizeof(Shared) / 16; i += THREADS) reinterpret_cast<uint4*>(memory)[i] = make_uint4(0, 0, 0, 0);
        __syncthreads();
    }
    while (queue.has_next()) attend(p, queue.next(), shared);
}
