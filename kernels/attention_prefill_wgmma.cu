// SPDX-License-Identifier: Apache-2.0
// Attention of sequences with several new tokens over paged keys and values, on Hopper's warpgroup matrix instructions.
//
// Arguments and work division as attention_prefill.cu. One block a multiprocessor: a feeding warpgroup and two computing
// ones of 64 query rows each. The feeders keep a ring of key and value tiles full, across work items; the computing
// warpgroups never meet. Each starts the next tile's scores before it adds this tile's values, so its softmax runs under
// its own matrix products, and the other warpgroup's.
//
// What is odd:
// - Pages are too small for the bulk copy engine to pay, so feeders gather 16-byte pieces with cp.async and write the
//   128-byte swizzle themselves; readers fence, because cp.async writes through the ordinary path and wgmma reads through
//   the asynchronous one.
// - Values are read as they lie, tokens by dims: wgmma transposes a shared right operand on the fly.
// - Registers move from the feeders to the computing warpgroups (setmaxnreg): 128 output and 96 score registers do not fit
//   into an even share.
//
// Reference: Shah et al., "FlashAttention-3" (2024). Needs sm_90a. Parameters: as attention_prefill.cu, without WARPS, with
// HEAD_DIM 64, 128 or 256, KEYS 64 or 128, RING (slots of one tile of keys or values) and QUERY_SLOTS: with two, the next
// item's queries load during this item, which short prompts need. With KV_FP8 feeders convert codes to float16 on the way, since
// converting in the computing warpgroups would compete with the softmax for registers and issue slots. A feeding warp is the only one
// of its scheduler, so the number of its instructions decides: codes go through registers, which has fewer than staging them in shared
// memory, and are loaded while the feeders wait for a slot.
#define ROWS 128
#include "attention_instructions.cuh"
#include "attention_prefill.cuh"
#include "launch.cuh"
#include "ring_cursor.cuh"
#include "warpgroup.cuh"

constexpr int GROUPS = 2;                       // computing warpgroups
constexpr int FEEDERS = 128;
constexpr int THREADS = FEEDERS + GROUPS * 128;
constexpr int PIECES = HEAD_DIM / 8;            // of 16 bytes in a row
constexpr int COLUMN_BYTES = 128;               // a row's share of one swizzled column of 64 elements
constexpr int TILE_BYTES = KEYS * HEAD_DIM * 2;
constexpr int QUERY_STEPS = HEAD_DIM / 16, KEY_STEPS = KEYS / 16;
constexpr int FEEDER_REGISTERS = KV_FP8 ? 88 : 56, COMPUTE_REGISTERS = KV_FP8 ? 208 : 224;
constexpr int REGISTERS = 65536 / THREADS / 8 * 8;  // of each thread at the start
static_assert(FEEDER_REGISTERS + GROUPS * COMPUTE_REGISTERS <= (1 + GROUPS) * REGISTERS, "computing warpgroups would wait for registers forever");

struct Shared {
    alignas(1024) unsigned char query[QUERY_SLOTS][ROWS * HEAD_DIM * 2];
    alignas(1024) unsigned char ring[RING][TILE_BYTES];
    alignas(8) unsigned long long full[RING], empty[RING], query_full[QUERY_SLOTS], query_empty[QUERY_SLOTS];
};
static_assert(sizeof(Shared) + 1024 <= SHARED_BYTES, "the wrapper's shared-memory size is too small");

// Offset of a 16-byte piece of a row in a tile of `rows` rows.
__device__ __forceinline__ unsigned swizzled(int rows, int row, int piece) {
    return piece / 8 * rows * COLUMN_BYTES + row * COLUMN_BYTES + (piece % 8 ^ row % 8) * 16;
}

// ---- The feeding warpgroup ----

constexpr int PASS_ROWS = FEEDERS / PIECES;  // rows that the warpgroup copies at once; a thread's rows are so far apart
constexpr int AT_ONCE = 4;                   // pieces that a thread loads into registers before it converts them

// Address of a thread's piece `row` rows below its first one, a multiple of PASS_ROWS; the swizzle repeats every 8 rows.
__device__ __forceinline__ unsigned rows_below(unsigned first, int row) {
    return (PASS_ROWS % 8 ? first ^ row % 8 * 16 : first) + row * COLUMN_BYTES;
}

struct Feeder {
    const Parameters& p;
    Shared& shared;
    const int thread, lane;
    RingCursor ring, query;

    __device__ __forceinline__ int first_row() const { return thread / PIECES; }
    __device__ __forceinline__ int piece() const { return thread % PIECES; }

    // From row to row it is so many tokens and heads further, with a carry.
    __device__ __forceinline__ void copy_query(const Work& work) {
        int head = (work.first_packed_row + first_row()) % GROUP;
        const int token = work.first_token + (work.first_packed_row + first_row()) / GROUP;
        const Element* source = p.q + token * p.query_stride + (work.kv_head * GROUP + head) * HEAD_DIM + piece() * 8;
        const int valid_rows = work.num_tokens * GROUP - work.first_packed_row - first_row();
        const auto advance = [&] {
            source += PASS_ROWS / GROUP * p.query_stride + PASS_ROWS % GROUP * HEAD_DIM;
            head += PASS_ROWS % GROUP;
            if (head >= GROUP) {
                head -= GROUP;
                source += p.query_stride - GROUP * HEAD_DIM;
            }
        };
        barrier_wait(shared_address(&shared.query_empty[query.slot]), query.parity ^ 1);
        const unsigned destination = shared_address(shared.query[query.slot]) + swizzled(ROWS, first_row(), piece());
#if KV_FP8
        const float factor = query_factor(p.kv_scales, work.kv_head, p.query_scale);
#pragma unroll 1
        for (int first = 0; first < ROWS; first += AT_ONCE * PASS_ROWS) {
            uint4 elements[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i, advance()) {
                const bool valid = first + i * PASS_ROWS < valid_rows;
                elements[i] = valid ? *reinterpret_cast<const uint4*>(source) : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
                store_16_bytes(rows_below(destination, first + i * PASS_ROWS), scaled_operands(elements[i], factor));
        }
#else
#pragma unroll 2
        for (int row = 0; row < ROWS; row += PASS_ROWS, advance()) copy_16_bytes(rows_below(destination, row), source, row < valid_rows);
#endif
        arrive(shared.query_full[query.slot]);
        query.advance(QUERY_SLOTS);
    }

    // Once this thread's share is in shared memory; with KV_FP8 ordinary stores have put it there.
    __device__ __forceinline__ void arrive(unsigned long long& barrier) const {
#if KV_FP8
        barrier_arrive(shared_address(&barrier));
#else
        barrier_arrive_after_copies(shared_address(&barrier));
#endif
    }

#if KV_FP8
    static constexpr int CODE_PIECES = HEAD_DIM / 16, ROWS_AT_ONCE = FEEDERS / CODE_PIECES;  // pieces of 16 codes
    static_assert(ROWS_AT_ONCE % 8 == 0, "the swizzle of a thread's rows differs");
    static constexpr bool WHOLE_PAGES = ROWS_AT_ONCE % PAGE_ROWS == 0;
    uint4 codes[KEYS / ROWS_AT_ONCE];  // this thread's pieces of the tile that is fed next
    int valid_rows;                    // how many rows the sequence has left from the first of them on

    // Eight lanes have four pieces of one row and four of the next: their operands, two pieces for each, then lie in different banks.
    __device__ __forceinline__ int first_code_row() const { return thread / (2 * CODE_PIECES) * 2 + thread / 4 % 2; }
    __device__ __forceinline__ int code_piece() const { return thread / 8 % (CODE_PIECES / 4) * 4 + thread % 4; }

    // Loads the codes of the tile that is fed next. Lane i of each warp holds the tile's page i.
    __device__ __forceinline__ void look_ahead(const KvElement* pages, int kv_head, int seq_len, int tile, int page) {
        const int in_page = WHOLE_PAGES ? first_code_row() % PAGE_ROWS : first_code_row();
        const KvElement* const first = pages + (kv_head * BLOCK_SIZE + tile * KEYS % BLOCK_SIZE + in_page) * HEAD_DIM + code_piece() * 16;
        const long long page_elements = NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM;
        valid_rows = seq_len - tile * KEYS - first_code_row();
#pragma unroll
        for (int i = 0; i < KEYS / ROWS_AT_ONCE; ++i) {
            const int below = i * ROWS_AT_ONCE, index = below / PAGE_ROWS + (WHOLE_PAGES ? first_code_row() / PAGE_ROWS : 0);
            const long long offset = __shfl_sync(~0u, page, index) * page_elements + below % PAGE_ROWS * HEAD_DIM;
            codes[i] = *reinterpret_cast<const uint4*>(first + offset);
        }
    }

    // Converts the codes that were loaded. Rows past the sequence become zeros.
    __device__ __forceinline__ void feed(const KvElement*, const Work&, int, int) {
        const unsigned tile = shared_address(shared.ring[ring.slot]);
        const unsigned low = tile + swizzled(KEYS, first_code_row(), 2 * code_piece());
        const unsigned high = low ^ 16;
        if (valid_rows < KEYS) {
#pragma unroll
            for (int i = 0; i < KEYS / ROWS_AT_ONCE; ++i)
                if (i * ROWS_AT_ONCE >= valid_rows) codes[i] = make_uint4(0, 0, 0, 0);
        }
        barrier_wait(shared_address(&shared.empty[ring.slot]), ring.parity ^ 1);
#pragma unroll
        for (int i = 0; i < KEYS / ROWS_AT_ONCE; ++i) {
            const int below = i * ROWS_AT_ONCE * COLUMN_BYTES;
            store_16_bytes(low + below, operands_of(codes[i].x, codes[i].y));
            store_16_bytes(high + below, operands_of(codes[i].z, codes[i].w));
        }
        arrive(shared.full[ring.slot]);
        ring.advance(RING);
    }
#else
    // Lane i of each warp holds the tile's page i. Rows past the sequence become zeros.
    __device__ __forceinline__ void feed(const Element* pages, const Work& work, int tile, int page) {
        const int first_key = tile * KEYS + first_row();
        const int in_page = (work.kv_head * BLOCK_SIZE + tile * KEYS % BLOCK_SIZE + first_row()) * HEAD_DIM + piece() * 8;
        barrier_wait(shared_address(&shared.empty[ring.slot]), ring.parity ^ 1);
        const unsigned destination = shared_address(shared.ring[ring.slot]) + swizzled(KEYS, first_row(), piece());
#pragma unroll
        for (int index = 0; index < PAGES_PER_TILE; ++index) {
            const long long page_elements = NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM;
            const Element* source = pages + __shfl_sync(~0u, page, index) * page_elements + in_page;
#pragma unroll
            for (int row = 0; row < PAGE_ROWS; row += PASS_ROWS) {
                const int tile_row = index * PAGE_ROWS + row;
                copy_16_bytes(rows_below(destination, tile_row), source + row * HEAD_DIM, first_key + tile_row < work.seq_len);
            }
        }
        arrive(shared.full[ring.slot]);
        ring.advance(RING);
    }

    __device__ __forceinline__ void look_ahead(const Element*, int, int, int, int) {}
#endif

    __device__ __forceinline__ void run(WorkQueue& queue) {
        Work work = queue.next();
        int page = work.page(work.begin, lane);
        look_ahead(p.k_pages, work.kv_head, work.seq_len, work.begin, page);
        for (bool more = true; more;) {
            copy_query(work);
            more = queue.has_next();
            const Work next = more ? queue.next() : work;
            const int next_first_page = next.page(next.begin, lane);  // a short item is over before this read would be
            for (int tile = work.begin; tile < work.end; ++tile) {
                const bool is_last = tile + 1 == work.end;
                const int next_page = is_last ? next_first_page : work.page(tile + 1, lane);
                feed(p.k_pages, work, tile, page);
                look_ahead(p.v_pages, work.kv_head, work.seq_len, tile, page);
                feed(p.v_pages, work, tile, page);
                const int kv_head = is_last ? next.kv_head : work.kv_head, seq_len = is_last ? next.seq_len : work.seq_len;
                look_ahead(p.k_pages, kv_head, seq_len, is_last ? next.begin : tile + 1, next_page);
                page = next_page;
            }
            work = next;
        }
    }
};

// ---- A computing warpgroup ----

struct Consumer {
    const Parameters& p;
    Shared& shared;
    const int group, warp, lane;  // warp within the group
    RingCursor ring, query;
    float out[HEAD_DIM / 8][4];
    SoftmaxRows softmax;

    __device__ __forceinline__ void release(unsigned long long& barrier) {
        if (lane == 0) barrier_arrive(shared_address(&barrier));
    }
    __device__ __forceinline__ void wait_for_slot(const RingCursor& cursor) {
        barrier_wait(shared_address(&shared.full[cursor.slot]), cursor.parity);
        fence_for_async_readers();
    }

    // Starts scores = q k^T for the tile in this slot.
    __device__ __forceinline__ void start_scores(float (&scores)[KEYS / 8][4], const RingCursor& cursor) {
        wait_for_slot(cursor);
        const auto queries = matrix_descriptor(shared_address(shared.query[query.slot]) + group * 64 * COLUMN_BYTES, 16, 8 * COLUMN_BYTES);
        const auto keys = matrix_descriptor(shared_address(shared.ring[cursor.slot]), 16, 8 * COLUMN_BYTES);
        pin_registers(scores);
        warpgroup_fence();
#pragma unroll
        for (int step = 0; step < QUERY_STEPS; ++step) {
            const auto a = moved(queries, step / 4 * ROWS * COLUMN_BYTES + step % 4 * 32);
            const auto b = moved(keys, step / 4 * KEYS * COLUMN_BYTES + step % 4 * 32);
            WarpgroupMultiply<KEYS>::shared_shared(scores, a, b, step > 0);
        }
        warpgroup_commit();
    }

    // Starts out += probabilities v for the tile in this slot.
    __device__ __forceinline__ void start_values(const unsigned (&probabilities)[KEY_STEPS][4], const RingCursor& cursor) {
        wait_for_slot(cursor);
        const auto values = matrix_descriptor(shared_address(shared.ring[cursor.slot]), KEYS * COLUMN_BYTES, 8 * COLUMN_BYTES);
        pin_registers(out);
        warpgroup_fence();
#pragma unroll
        for (int step = 0; step < KEY_STEPS; ++step) {
            WarpgroupMultiply<HEAD_DIM>::register_shared(out, probabilities[step], moved(values, step * 16 * COLUMN_BYTES));
        }
        warpgroup_commit();
    }

    __device__ __forceinline__ void rescale(const float (&factor)[2]) {
        if (__all_sync(~0u, factor[0] == 1.0f && factor[1] == 1.0f)) return;
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 8; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) out[i][j] *= factor[j / 2];
    }

    __device__ __forceinline__ void process(const Work& work) {
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 8; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) out[i][j] = 0.0f;
        softmax.begin(p, work, group * 64 + warp * 16);
        barrier_wait(shared_address(&shared.query_full[query.slot]), query.parity);

        float scores[KEYS / 8][4], factor[2];
        unsigned probabilities[KEY_STEPS][4];
        start_scores(scores, ring);
        warpgroup_wait<0>();
        pin_registers(scores);
        release(shared.empty[ring.slot]);
        ring.advance(RING);
        softmax.advance(scores, factor, p, work, work.begin);
#pragma unroll
        for (int step = 0; step < KEY_STEPS; ++step) pack_probabilities(probabilities[step], scores, step);

        for (int tile = work.begin + 1; tile < work.end; ++tile) {
            const RingCursor values = ring;
            ring.advance(RING);
            start_scores(scores, ring);
            start_values(probabilities, values);
            warpgroup_wait<1>();
            pin_registers(scores);
            release(shared.empty[ring.slot]);
            ring.advance(RING);
            softmax.advance(scores, factor, p, work, tile);
            pin_registers(scores);  // or the compiler waits first and computes afterwards
            warpgroup_wait<0>();
            pin_registers(out);
            release(shared.empty[values.slot]);
            rescale(factor);
#pragma unroll
            for (int step = 0; step < KEY_STEPS; ++step) pack_probabilities(probabilities[step], scores, step);
        }
        release(shared.query_empty[query.slot]);
        query.advance(QUERY_SLOTS);
        start_values(probabilities, ring);
        warpgroup_wait<0>();
        pin_registers(out);
        release(shared.empty[ring.slot]);
        ring.advance(RING);
        store(work);
    }

    // Four lanes hold a row's 8-dim blocks piecewise; they transpose four blocks at a time, so that each writes one of them.
    __device__ __forceinline__ void store(const Work& work) const {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            const float inverse = softmax.inverse_sum(side) * output_factor(p.kv_scales, work.kv_head);
            const int row = group * 64 + warp * 16 + lane / 4 + side * 8;
            Element* destination = work.out(p, row) + lane % 4 * 8;
            const bool valid = work.has_row(row);
#pragma unroll
            for (int block = 0; block < HEAD_DIM / 8; block += 4) {
                unsigned words[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) words[i] = pack(out[block + i][2 * side] * inverse, out[block + i][2 * side + 1] * inverse);
                transpose(words);
                if (valid) *reinterpret_cast<uint4*>(destination + block * 8) = make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
    }

    // Lane l of each four gets the l-th words of lanes 0 to 3.
    __device__ __forceinline__ void transpose(unsigned (&words)[4]) const {
#pragma unroll
        for (int distance = 1; distance < 4; distance *= 2) {
            const bool upper = lane & distance;
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                const int low = distance == 1 ? 2 * pair : pair, high = low + distance;
                const unsigned received = __shfl_xor_sync(~0u, upper ? words[low] : words[high], distance);
                if (upper)
                    words[low] = received;
                else
                    words[high] = received;
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_prefill_wgmma(
    const Element* q, long long query_stride, const KvElement* k_pages, const KvElement* v_pages, Element* out,
    const int* block_tables, int max_blocks, const int* work_split, const int4* prefill_tiles, const float* alibi_slopes,
    const float* kv_scales, const int* prefix_lens, float scale, float soft_cap, int window) {
    const Parameters p = {q,           query_stride, k_pages, v_pages,                out,      block_tables, max_blocks, alibi_slopes, kv_scales,
                          prefix_lens, scale,        KV_FP8 ? 1.0f : scale, soft_cap, window};
    DYNAMIC_SHARED(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory + (-shared_address(memory) & 1023));
    let_next_start();
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < RING; ++slot) {
            barrier_init(shared_address(&shared.full[slot]), FEEDERS);
            barrier_init(shared_address(&shared.empty[slot]), GROUPS * 4);
        }
        for (int slot = 0; slot < QUERY_SLOTS; ++slot) {
            barrier_init(shared_address(&shared.query_full[slot]), FEEDERS);
            barrier_init(shared_address(&shared.query_empty[slot]), GROUPS * 4);
        }
    }
    __syncthreads();
    wait_for_previous();
    WorkQueue queue(p, work_split, prefill_tiles);
    if (!queue.has_next()) return;
    const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    if (group < 0) {
        lower_registers<FEEDER_REGISTERS>();
        Feeder feeder{p, shared, static_cast<int>(threadIdx.x), lane};
        feeder.run(queue);
    } else {
        raise_registers<COMPUTE_REGISTERS>();
        Consumer consumer{p, shared, group, warp, lane};
        while (queue.has_next()) consumer.process(queue.next());
    }
}
