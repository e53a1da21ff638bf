// Attention of one new token per sequence over paged keys and values (flash-decoding).
//
// q: rows of queries, row s for sequence s, [H * HEAD_DIM] each, `query_stride` elements apart.
// k_pages, v_pages: [N, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]. out: [S, H * HEAD_DIM]. H = NUM_KV_HEADS * GROUP.
// plan: from attention_plan.cu. partials, flags: scratch, the flags zero at entry and at exit.
//
// The step's (sequence, head) items are cut into units of TILE tokens; attention_plan.cu gives every block an equal,
// contiguous range of units, so that one long sequence fills the GPU as evenly as a thousand short ones. A block streams its
// range through a ring of shared-memory slots without ever draining it between items. The block that begins an item that
// others continue waits for their float32 partial results at the end of its range, when they are there or about to be; above
// DECODE_FAN_IN contributors, every DECODE_FAN_IN-th merges those up to the next one first.
//
// What is odd:
// - The products are transposed, scores^T = K q^T and out^T = V^T p^T: tokens and dims lie on the tensor core's 16-side and
//   query heads on its 8-side, so that groups of 1 to 8 heads waste half as much as on the 16-side, any group size up to
//   HEADS_PER_ITEM shares one read of the keys, and values need no transposition in memory.
// - Warp w scores tokens 16 w .. 16 w + 15 of a tile, then accumulates the dims of its quarter over all tokens; maxima and
//   probabilities change hands in shared memory, and no output needs merging across warps.
// - Shared rows are padded to an odd number of 16-byte pieces, which frees ldmatrix of bank conflicts for any HEAD_DIM.
//
// Reference: Dao et al., "Flash-Decoding for long-context inference" (2023); the even split is Osama et al., "Stream-K"
// (2023), applied to attention. Needs sm_80. Parameters: BFLOAT16, HEAD_DIM (multiple of 8, <= 256), BLOCK_SIZE (16, 32,
// 64, 128), NUM_KV_HEADS, GROUP, HEADS_PER_ITEM, RING, MIN_BLOCKS, SHARED_BYTES, WINDOW, SOFT_CAP, ALIBI.
#include "attention_instructions.cuh"
#include "attention_common.cuh"
#include "attention_plan.cuh"

constexpr int TILE = DECODE_TILE;
constexpr int WARPS = 4;
constexpr int CONSUMERS = WARPS * 32;
constexpr int THREADS = CONSUMERS + 32;  // the last warp feeds the ring
constexpr int PIECES = HEAD_DIM / 8;     // of 16 bytes in a row
constexpr int STEPS = (HEAD_DIM + 15) / 16;
constexpr int ROW_BYTES = (2 * STEPS + 1) * 16;
constexpr int HEAD_TILES = (GROUP + HEADS_PER_ITEM - 1) / HEADS_PER_ITEM;
constexpr int ITEMS = NUM_KV_HEADS * HEAD_TILES;       // per sequence
constexpr int COLUMNS = (HEADS_PER_ITEM + 7) / 8;      // of 8 heads
constexpr int SLICES = (STEPS + WARPS - 1) / WARPS;    // of 16 output dims per warp
constexpr int CHAINS = COLUMNS == 1 ? 2 : 1;           // independent sums that hide the tensor core's latency
constexpr bool QUERY_IN_REGISTERS = STEPS * COLUMNS <= 32;
constexpr int PAGE_ROWS = BLOCK_SIZE < TILE ? BLOCK_SIZE : TILE;  // rows of one page in one tile
constexpr int PAGES_PER_TILE = TILE / PAGE_ROWS;
constexpr int QUERY_SLOTS = 2;

struct Unit {
    int seq, item, tile, first_tile, seq_len, is_first, is_last, index;
};

struct Shared {
    alignas(16) unsigned char ring[RING][TILE * ROW_BYTES];
    alignas(16) unsigned char query[QUERY_SLOTS][COLUMNS * 8 * ROW_BYTES];
    alignas(16) Element probability[COLUMNS][TILE][8];
    float maximum[WARPS][COLUMNS * 8];
    float sum[WARPS][COLUMNS * 8];
    Unit units[RING];
    alignas(8) unsigned long long full[RING], empty[RING], query_full[QUERY_SLOTS], query_empty[QUERY_SLOTS];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "the wrapper's shared-memory size is too small");

struct Parameters {
    const Element* q;
    long long query_stride;
    const Element* k_pages;
    const Element* v_pages;
    Element* out;
    const int* seq_lens;
    const int* slots;
    const int* block_tables;
    int max_blocks;
    const int* plan;
    float* partials;
    int* flags;
    const float* alibi_slopes;
    float scale, soft_cap;
    int window;
};

// Ring position: slot index and the parity of its current pass.
struct RingCursor {
    int slot = 0;
    unsigned parity = 0;
    __device__ __forceinline__ void advance(int size) {
        if (++slot == size) {
            slot = 0;
            parity ^= 1;
        }
    }
};

// ---- The feeding warp ----

struct Feeder {
    const Parameters& p;
    Shared& shared;
    int lane;
    RingCursor ring, query;

    __device__ __forceinline__ int first_tile_of(int seq_len) const { return WINDOW ? max(seq_len - p.window, 0) / TILE : 0; }

    __device__ __forceinline__ int page_of(const Unit& unit, int slot) const {
        const int token = (unit.first_tile + unit.tile) * TILE;
        const int block = token / BLOCK_SIZE + lane;
        const bool live = lane < PAGES_PER_TILE && token + lane * PAGE_ROWS < unit.seq_len;
        return live ? p.block_tables[static_cast<long long>(slot) * p.max_blocks + block] : 0;
    }

    // Tile of keys or values into the ring's current slot; rows past the sequence become zeros.
    __device__ __forceinline__ void copy_tile(const Element* pages, const Unit& unit, int page) {
        const int token = (unit.first_tile + unit.tile) * TILE;
        const int kv_head = unit.item / HEAD_TILES;
        const long long row = (static_cast<long long>(page) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + token % BLOCK_SIZE;
        const unsigned long long lane_source = reinterpret_cast<unsigned long long>(pages + row * HEAD_DIM);
        const unsigned destination = shared_address(shared.ring[ring.slot]);
        const int valid_rows = unit.seq_len - token;
#pragma unroll
        for (int page_index = 0; page_index < PAGES_PER_TILE; ++page_index) {
            const auto source = reinterpret_cast<const Element*>(__shfl_sync(~0u, lane_source, page_index));
#pragma unroll 8
            for (int i = 0; i < PAGE_ROWS * PIECES; i += 32) {
                const int piece = i + lane;
                const int tile_row = page_index * PAGE_ROWS + piece / PIECES;
                if (PAGE_ROWS * PIECES % 32 == 0 || piece < PAGE_ROWS * PIECES)
                    copy_16_bytes(destination + tile_row * ROW_BYTES + piece % PIECES * 16, source + piece * 8, tile_row < valid_rows);
            }
        }
    }

    __device__ __forceinline__ void copy_query(const Unit& unit) {
        const int head_tile = unit.item % HEAD_TILES;
        const int heads = min(HEADS_PER_ITEM, GROUP - head_tile * HEADS_PER_ITEM);
        const int first_head = unit.item / HEAD_TILES * GROUP + head_tile * HEADS_PER_ITEM;
        const Element* source = p.q + unit.seq * p.query_stride + first_head * HEAD_DIM;
        const unsigned destination = shared_address(shared.query[query.slot]);
        barrier_wait(shared_address(&shared.query_empty[query.slot]), query.parity ^ 1);
        for (int piece = lane; piece < HEADS_PER_ITEM * PIECES; piece += 32) {
            const int head = piece / PIECES;
            const bool valid = head < heads;
            copy_16_bytes(destination + head * ROW_BYTES + piece % PIECES * 16, valid ? source + piece * 8 : source, valid);
        }
        barrier_arrive_after_copies(shared_address(&shared.query_full[query.slot]));
        query.advance(QUERY_SLOTS);
    }

    __device__ __forceinline__ void finish_slot() {
        const unsigned full = shared_address(&shared.full[ring.slot]);
        barrier_arrive_after_copies(full);
        if (lane == 0) barrier_arrive(full);  // publishes the unit, which is an ordinary store
        ring.advance(RING);
    }

    __device__ __forceinline__ void wait_for_slot() { barrier_wait(shared_address(&shared.empty[ring.slot]), ring.parity ^ 1); }

    __device__ __forceinline__ void run(const DecodeRange& range, int first_page) {
        Unit unit = {range.seq, range.item, range.tile, 0, range.seq_len, 1, 0, range.begin};
        unit.first_tile = first_tile_of(unit.seq_len);
        int num_tiles = (unit.seq_len + TILE - 1) / TILE - unit.first_tile;
        int slot = range.slot;
        int page = first_page;
        int next_len = 0, next_slot = 0;  // of the next sequence, loaded one sequence ahead
        if (range.end - range.begin > num_tiles - unit.tile + (ITEMS - 1 - unit.item) * num_tiles) {
            next_len = p.seq_lens[unit.seq + 1];
            next_slot = p.slots[unit.seq + 1];
        }
        for (int index = range.begin; index < range.end; ++index) {
            Unit next = unit;
            next.is_first = 0;
            next.index = index + 1;
            if (++next.tile == num_tiles) {
                next.tile = 0;
                next.is_first = 1;
                if (++next.item == ITEMS) {
                    next.item = 0;
                    ++next.seq;
                    next.seq_len = next_len;
                    slot = next_slot;
                    next.first_tile = first_tile_of(next_len);
                    num_tiles = (next_len + TILE - 1) / TILE - next.first_tile;
                    if (range.end - index - 1 > num_tiles * ITEMS) {
                        next_len = p.seq_lens[next.seq + 1];
                        next_slot = p.slots[next.seq + 1];
                    }
                }
            }
            const bool more = index + 1 < range.end;
            const int next_page = more ? page_of(next, slot) : 0;
            unit.is_last = !more || next.is_first;
            wait_for_slot();
            if (unit.is_first) copy_query(unit);
            copy_tile(p.k_pages, unit, page);
            if (lane == 0) shared.units[ring.slot] = unit;
            finish_slot();
            wait_for_slot();
            copy_tile(p.v_pages, unit, page);
            finish_slot();
            unit = next;
            page = next_page;
        }
    }
};

// ---- The computing warps ----

struct Consumer {
    const Parameters& p;
    Shared& shared;
    const DecodeSplit split;
    const int worker, thread, warp, lane;
    RingCursor ring, query;
    unsigned q[QUERY_IN_REGISTERS ? STEPS : 1][QUERY_IN_REGISTERS ? COLUMNS : 1][2];
    float out[SLICES][COLUMNS][4];                    // [dim, head] fragments of this warp's slices
    float maximum[COLUMNS][2], sum[COLUMNS][2];       // of this thread's heads: 8 column + 2 (lane % 4) + {0, 1}
    float slope[COLUMNS][2];

    __device__ __forceinline__ void load_query_step(unsigned (&r)[2], int step, int column, int slot) const {
        const int row = column * 8 + lane % 8;
        load_matrix_pair(r[0], r[1], shared_address(shared.query[slot]) + row * ROW_BYTES + (step * 2 + lane / 8 % 2) * 16);
    }

    __device__ __forceinline__ void begin_item(const Unit& unit) {
        barrier_wait(shared_address(&shared.query_full[query.slot]), query.parity);
        if (QUERY_IN_REGISTERS) {
#pragma unroll
            for (int step = 0; step < STEPS; ++step)
#pragma unroll
                for (int column = 0; column < COLUMNS; ++column) load_query_step(q[step][column], step, column, query.slot);
            release_query();
        }
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column)
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                maximum[column][side] = NEGATIVE_INFINITY;
                sum[column][side] = 0.0f;
#if ALIBI
                const int head = head_in_item(column, side);
                slope[column][side] = head < heads_of(unit) ? p.alibi_slopes[first_head(unit) + head] * LOG2_E : 0.0f;
#endif
            }
        clear_out();
    }

    __device__ __forceinline__ void release_query() {
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&shared.query_empty[query.slot]));
        query.advance(QUERY_SLOTS);
    }

    __device__ __forceinline__ void release_slot() {
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&shared.empty[ring.slot]));
        ring.advance(RING);
    }

    __device__ __forceinline__ int head_in_item(int column, int side) const { return column * 8 + lane % 4 * 2 + side; }
    __device__ __forceinline__ static int heads_of(const Unit& unit) {
        return min(HEADS_PER_ITEM, GROUP - unit.item % HEAD_TILES * HEADS_PER_ITEM);
    }
    __device__ __forceinline__ static int first_head(const Unit& unit) {
        return unit.item / HEAD_TILES * GROUP + unit.item % HEAD_TILES * HEADS_PER_ITEM;
    }

    __device__ __forceinline__ void clear_out() {
#pragma unroll
        for (int slice = 0; slice < SLICES; ++slice)
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column)
#pragma unroll
                for (int i = 0; i < 4; ++i) out[slice][column][i] = 0.0f;
    }

    // scores[column]: [token, head] fragments of this warp's 16 tokens.
    __device__ __forceinline__ void score(float (&scores)[COLUMNS][4]) {
        float sums[CHAINS][COLUMNS][4] = {};
        const unsigned keys = shared_address(shared.ring[ring.slot]) + (warp * 16 + lane % 16) * ROW_BYTES + lane / 16 * 16;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            unsigned k[4];
            load_matrices(k, keys + step * 32);
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column) {
                if (QUERY_IN_REGISTERS) {
                    multiply_add(sums[step % CHAINS][column], k, q[step][column][0], q[step][column][1]);
                } else {
                    unsigned pair[2];
                    load_query_step(pair, step, column, query.slot);
                    multiply_add(sums[step % CHAINS][column], k, pair[0], pair[1]);
                }
            }
        }
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column)
#pragma unroll
            for (int i = 0; i < 4; ++i) scores[column][i] = CHAINS == 1 ? sums[0][column][i] : sums[0][column][i] + sums[CHAINS - 1][column][i];
    }

    // Scale, cap, bias and mask; then the tile's maxima over this warp's tokens go to shared memory.
    __device__ __forceinline__ void transform(float (&scores)[COLUMNS][4], const Unit& unit) {
        const ScoreTransform to_score = ScoreTransform::make(p.scale, p.soft_cap);
        const int token = (unit.first_tile + unit.tile) * TILE + warp * 16 + lane / 4;
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column) {
            float tile_maximum[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int key = token + i / 2 * 8;
                bool visible = key < unit.seq_len;
#if WINDOW
                visible = visible && key >= unit.seq_len - p.window;
#endif
                const float value = to_score(scores[column][i], slope[column][i % 2], key, unit.seq_len - 1);
                scores[column][i] = visible ? value : NEGATIVE_INFINITY;
                tile_maximum[i % 2] = fmaxf(tile_maximum[i % 2], scores[column][i]);
            }
#pragma unroll
            for (int side = 0; side < 2; ++side) {
#pragma unroll
                for (int distance = 4; distance < 32; distance *= 2)
                    tile_maximum[side] = fmaxf(tile_maximum[side], __shfl_xor_sync(~0u, tile_maximum[side], distance));
            }
            if (lane < 4) {
                shared.maximum[warp][head_in_item(column, 0)] = tile_maximum[0];
                shared.maximum[warp][head_in_item(column, 1)] = tile_maximum[1];
            }
        }
    }

    // Probabilities to shared memory; running maxima, sums and outputs move to the new maxima.
    __device__ __forceinline__ void normalise(float (&scores)[COLUMNS][4]) {
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column) {
            float factor[2];
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                float new_maximum = maximum[column][side];
#pragma unroll
                for (int other = 0; other < WARPS; ++other)
                    new_maximum = fmaxf(new_maximum, shared.maximum[other][head_in_item(column, side)]);
                factor[side] = exp2_fast(maximum[column][side] - new_maximum);
                maximum[column][side] = new_maximum;
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) scores[column][i] = exp2_fast(scores[column][i] - maximum[column][i % 2]);
#pragma unroll
            for (int side = 0; side < 2; ++side)
                sum[column][side] = sum[column][side] * factor[side] + scores[column][side] + scores[column][2 + side];
            auto* pairs = reinterpret_cast<unsigned*>(&shared.probability[column][warp * 16 + lane / 4][lane % 4 * 2]);
            pairs[0] = pack(scores[column][0], scores[column][1]);
            pairs[8 * 4] = pack(scores[column][2], scores[column][3]);
#pragma unroll
            for (int slice = 0; slice < SLICES; ++slice)
#pragma unroll
                for (int i = 0; i < 4; ++i) out[slice][column][i] *= factor[i % 2];
        }
    }

    __device__ __forceinline__ void accumulate() {
        unsigned probability[COLUMNS][TILE / 32][4];
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column)
#pragma unroll
            for (int half = 0; half < TILE / 32; ++half)
                load_matrices_transposed(probability[column][half], shared_address(&shared.probability[column][half * 32 + lane][0]));
        const unsigned values = shared_address(shared.ring[ring.slot]) + (lane / 16 * 8 + lane % 8) * ROW_BYTES + lane / 8 % 2 * 16;
#pragma unroll
        for (int slice = 0; slice < SLICES; ++slice) {
            const int dims = warp * SLICES + slice;
            if (STEPS % WARPS && dims >= STEPS) break;
#pragma unroll
            for (int step = 0; step < TILE / 16; ++step) {
                unsigned v[4];
                load_matrices_transposed(v, values + step * 16 * ROW_BYTES + dims * 32);
#pragma unroll
                for (int column = 0; column < COLUMNS; ++column)
                    multiply_add(out[slice][column], v, probability[column][step / 2][step % 2 * 2], probability[column][step / 2][step % 2 * 2 + 1]);
            }
        }
    }

    __device__ __forceinline__ void process(const Unit& unit, const DecodeRange& range) {
        if (unit.is_first) begin_item(unit);
        float scores[COLUMNS][4];
        score(scores);
        release_slot();
        if (!QUERY_IN_REGISTERS && unit.is_last) release_query();
        transform(scores, unit);
        group_barrier(1, CONSUMERS);
        normalise(scores);
        group_barrier(1, CONSUMERS);
        barrier_wait(shared_address(&shared.full[ring.slot]), ring.parity);
        accumulate();
        release_slot();
        if (unit.is_last) end_item(unit, range);
    }

    // ---- Results ----

    __device__ __forceinline__ void reduce_sums() {
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column)
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                float total = sum[column][side];
#pragma unroll
                for (int distance = 4; distance < 32; distance *= 2) total += __shfl_xor_sync(~0u, total, distance);
                if (lane < 4) shared.sum[warp][head_in_item(column, side)] = total;
            }
        group_barrier(1, CONSUMERS);
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column)
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                sum[column][side] = 0.0f;
#pragma unroll
                for (int other = 0; other < WARPS; ++other) sum[column][side] += shared.sum[other][head_in_item(column, side)];
            }
    }

    __device__ __forceinline__ void end_item(const Unit& unit, const DecodeRange& range) {
        reduce_sums();
        const int first_unit = unit.index - unit.tile;
        const int last_unit = first_unit + (unit.seq_len + TILE - 1) / TILE - unit.first_tile - 1;
        const bool is_whole = first_unit >= range.begin && last_unit < range.end;
        if (is_whole || merge_partials(first_unit, last_unit)) write_out(unit);
    }

    // A worker meets at most two split items: one that an earlier worker began (slot 2 w) and one that it begins (2 w + 1).
    __device__ __forceinline__ static int partial_slot(int first_worker, int contributor) {
        return 2 * (first_worker + contributor) + (contributor == 0);
    }

    static constexpr int FRAGMENTS = SLICES * COLUMNS;
    static constexpr int SLOT_FLOATS = FRAGMENTS * CONSUMERS * 4 + COLUMNS * 8 * 2;

    // This block's part of an item goes to the block that began it; true there, with the whole item in registers.
    __device__ __forceinline__ bool merge_partials(int first_unit, int last_unit) {
        const int first_worker = split.worker_of(first_unit);
        const int contributors = split.worker_of(last_unit) - first_worker + 1;
        const int self = worker - first_worker;
        if (self % DECODE_FAN_IN == 0) add_partials(first_worker, self + 1, min(self + DECODE_FAN_IN, contributors), 1);
        if (self == 0) add_partials(first_worker, DECODE_FAN_IN, contributors, DECODE_FAN_IN);
        if (self > 0) store_partial(partial_slot(first_worker, self));
        return self == 0;
    }

    __device__ __forceinline__ void store_partial(int slot) {
        float* base = p.partials + static_cast<long long>(slot) * SLOT_FLOATS;
        auto* fragments = reinterpret_cast<float4*>(base);
#pragma unroll
        for (int slice = 0; slice < SLICES; ++slice)
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column) {
                const float(&o)[4] = out[slice][column];
                __stcg(&fragments[(slice * COLUMNS + column) * CONSUMERS + thread], make_float4(o[0], o[1], o[2], o[3]));
            }
        if (thread < 4) {
            auto* softmax = reinterpret_cast<float4*>(base + FRAGMENTS * CONSUMERS * 4);
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column)
                __stcg(&softmax[column * 4 + lane], make_float4(maximum[column][0], maximum[column][1], sum[column][0], sum[column][1]));
        }
        group_barrier(1, CONSUMERS);
        if (thread == 0) store_release(p.flags + slot, 1);
    }

    __device__ __forceinline__ void wait_for_partials(int first_worker, int begin, int end, int stride) {
        const int contributor = begin + thread * stride;
        if (contributor < end) {
            int* flag = p.flags + partial_slot(first_worker, contributor);
            while (!load_acquire(flag)) {
            }
            *flag = 0;
        }
        group_barrier(1, CONSUMERS);
    }

    // Adds others' partial results to this block's own.
    __device__ __forceinline__ void add_partials(int first_worker, int begin, int end, int stride) {
        if (begin >= end) return;
        wait_for_partials(first_worker, begin, end, stride);
#pragma unroll 4
        for (int contributor = begin; contributor < end; contributor += stride) {
            const float* base = p.partials + static_cast<long long>(partial_slot(first_worker, contributor)) * SLOT_FLOATS;
            const auto* fragments = reinterpret_cast<const float4*>(base);
            const auto* softmax = reinterpret_cast<const float4*>(base + FRAGMENTS * CONSUMERS * 4);
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column) {
                const float4 other = __ldcg(&softmax[column * 4 + lane % 4]);
                const float other_maximum[2] = {other.x, other.y}, other_sum[2] = {other.z, other.w};
                float keep[2], take[2];
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    const float new_maximum = fmaxf(maximum[column][side], other_maximum[side]);
                    keep[side] = exp2_fast(maximum[column][side] - new_maximum);
                    take[side] = exp2_fast(other_maximum[side] - new_maximum);
                    sum[column][side] = sum[column][side] * keep[side] + other_sum[side] * take[side];
                    maximum[column][side] = new_maximum;
                }
#pragma unroll
                for (int slice = 0; slice < SLICES; ++slice) {
                    const float4 o = __ldcg(&fragments[(slice * COLUMNS + column) * CONSUMERS + thread]);
                    const float values[4] = {o.x, o.y, o.z, o.w};
#pragma unroll
                    for (int i = 0; i < 4; ++i) out[slice][column][i] = out[slice][column][i] * keep[i % 2] + values[i] * take[i % 2];
                }
            }
        }
    }

    // Neighbouring lanes hold neighbouring dims of the same two heads; they swap so that each writes two dims of one head.
    __device__ __forceinline__ void write_out(const Unit& unit) {
        Element* row = p.out + (static_cast<long long>(unit.seq) * NUM_KV_HEADS * GROUP + first_head(unit)) * HEAD_DIM;
        const int heads = heads_of(unit);
        const int odd = lane / 4 % 2;
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column) {
            const float inverse[2] = {__fdividef(1.0f, sum[column][0]), __fdividef(1.0f, sum[column][1])};
            const int head = head_in_item(column, odd);
#pragma unroll
            for (int slice = 0; slice < SLICES; ++slice)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float first = out[slice][column][half * 2] * inverse[0];
                    const float second = out[slice][column][half * 2 + 1] * inverse[1];
                    const float received = __shfl_xor_sync(~0u, odd ? first : second, 4);
                    const unsigned pair = odd ? pack(received, second) : pack(first, received);
                    const int dim = (warp * SLICES + slice) * 16 + half * 8 + lane / 8 * 2;
                    if (head < heads && dim < HEAD_DIM) *reinterpret_cast<unsigned*>(row + head * HEAD_DIM + dim) = pair;
                }
        }
    }
};

__device__ __forceinline__ void initialise(Shared& shared) {
    // Padding: rows past the group and columns past HEAD_DIM are read by the tensor cores and never copied to.
    if (HEAD_DIM % 16 || HEADS_PER_ITEM % 8) {
        auto* words = reinterpret_cast<uint4*>(&shared);
        constexpr int COUNT = (sizeof(shared.ring) + sizeof(shared.query)) / 16;
        const int begin = HEAD_DIM % 16 ? 0 : sizeof(shared.ring) / 16;
        for (int i = begin + threadIdx.x; i < COUNT; i += THREADS) words[i] = make_uint4(0, 0, 0, 0);
    }
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < RING; ++slot) {
            barrier_init(shared_address(&shared.full[slot]), 32 + 1);
            barrier_init(shared_address(&shared.empty[slot]), WARPS);
        }
        for (int slot = 0; slot < QUERY_SLOTS; ++slot) {
            barrier_init(shared_address(&shared.query_full[slot]), 32);
            barrier_init(shared_address(&shared.query_empty[slot]), WARPS);
        }
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) attention_decode(
    const Element* q, long long query_stride, const Element* k_pages, const Element* v_pages, Element* out, const int* seq_lens,
    const int* slots, const int* block_tables, int max_blocks, const int* plan, float* partials, int* flags,
    const float* alibi_slopes, float scale, float soft_cap, int window) {
    const Parameters p = {q,    query_stride, k_pages,  v_pages,      out,   seq_lens, slots, block_tables, max_blocks,
                          plan, partials,     flags,    alibi_slopes, scale, soft_cap, window};
    DYNAMIC_SHARED(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const DecodeSplit split = DecodeSplit::load(p.plan);
    const int block = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const DecodeRange range = DecodeRange::load(p.plan, block);
    const int first_page = lane < PAGES_PER_TILE ? DecodeRange::load_page(p.plan, block, lane) : 0;
    if (block >= split.num_workers) return;
    initialise(shared);
    if (warp == WARPS) {
        Feeder feeder{p, shared, lane};
        feeder.run(range, first_page);
        return;
    }
    Consumer consumer{p, shared, split, split.num_workers - 1 - block, static_cast<int>(threadIdx.x), warp, lane};
    for (int index = range.begin; index < range.end; ++index) {
        barrier_wait(shared_address(&shared.full[consumer.ring.slot]), consumer.ring.parity);
        const Unit unit = shared.units[consumer.ring.slot];
        consumer.process(unit, range);
    }
}
