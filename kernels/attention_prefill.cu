// Attention of sequences with several new tokens over paged keys and values: prefill, with or without earlier history.
//
// q: packed rows of queries, [H * HEAD_DIM] each, `query_stride` elements apart. k_pages, v_pages: [N, NUM_KV_HEADS,
// BLOCK_SIZE, HEAD_DIM]. out: [T, H * HEAD_DIM]. H = NUM_KV_HEADS * GROUP. plan, prefill_tiles: from attention_plan.cu.
//
// A block takes (tile, kv head) pairs of the plan, longest first: ROWS query rows, a row being one token of one of the GROUP
// heads that share keys, so that short prompts fill tiles too. Each warp keeps 16 rows' scores, softmax state and output in
// registers; keys and values pass through two shared-memory stages, the next tile's copy under this tile's arithmetic.
//
// What is odd:
// - Page numbers are read two tiles ahead, by a few threads, through shared memory: a copy never waits for a table lookup.
// - Rows past the sequence's last token repeat its position, so they compute finite values that nobody stores.
// - Tiles that every row of a warp sees in full skip the mask.
//
// Reference: Dao, "FlashAttention-2" (2023). Needs sm_80; attention_prefill_wgmma.cu is the Hopper version. Parameters:
// BFLOAT16, HEAD_DIM (multiple of 8, <= 256), BLOCK_SIZE (16, 32, 64, 128), NUM_KV_HEADS, GROUP, WARPS, KEYS (per tile, a
// multiple of 16; BLOCK_SIZE a multiple or a divisor of it), WINDOW, SOFT_CAP, ALIBI, CAUSAL.
#include "attention_common.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int ROWS = WARPS * 16;
constexpr int PIECES = HEAD_DIM / 8;  // of 16 bytes in a row
constexpr int STEPS = (HEAD_DIM + 15) / 16;
constexpr int ROW_BYTES = (2 * STEPS + 1) * 16;
constexpr int TILE_BYTES = KEYS * ROW_BYTES;
constexpr bool QUERY_IN_REGISTERS = STEPS <= 8;
constexpr int PAGE_ROWS = BLOCK_SIZE < KEYS ? BLOCK_SIZE : KEYS;
constexpr int PAGES_PER_TILE = KEYS / PAGE_ROWS;

struct Shared {
    alignas(16) unsigned char query[ROWS * ROW_BYTES];
    alignas(16) unsigned char keys[2][TILE_BYTES];
    alignas(16) unsigned char values[2][TILE_BYTES];
    int pages[2][PAGES_PER_TILE];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "the wrapper's shared-memory size is too small");

struct Parameters {
    const Element* q;
    long long query_stride;
    const Element* k_pages;
    const Element* v_pages;
    Element* out;
    const int* cu_seqlens_q;
    const int* seq_lens;
    const int* slots;
    const int* block_tables;
    int max_blocks;
    const float* alibi_slopes;
    float scale, soft_cap;
    int window;
};

// One tile of query rows of one sequence and one kv head, and the key tiles that it sees.
struct Work {
    int kv_head, first_token, num_tokens, history, seq_len, first_packed_row, begin, end;
    const int* table;

    __device__ __forceinline__ static Work make(const Parameters& p, int2 tile, int kv_head) {
        const int first_token = p.cu_seqlens_q[tile.x];
        const int num_tokens = p.cu_seqlens_q[tile.x + 1] - first_token;
        const int seq_len = p.seq_lens[tile.x];
        const int history = seq_len - num_tokens;
        const int first_row = tile.y * ROWS;
        const int last_token = min(num_tokens - 1, (first_row + ROWS - 1) / GROUP);
        const int visible = CAUSAL ? history + last_token + 1 : seq_len;
        const int begin = WINDOW ? max(0, history + first_row / GROUP - p.window + 1) / KEYS : 0;
        return {kv_head,   first_token, num_tokens, history, seq_len,
                first_row, begin,       (visible + KEYS - 1) / KEYS,
                p.block_tables + static_cast<long long>(p.slots[tile.x]) * p.max_blocks};
    }

    __device__ __forceinline__ bool has_row(int row) const { return first_packed_row + row < num_tokens * GROUP; }
    __device__ __forceinline__ int token(int row) const { return min((first_packed_row + row) / GROUP, num_tokens - 1); }
    __device__ __forceinline__ int position(int row) const { return history + token(row); }
    __device__ __forceinline__ int head(int row) const { return kv_head * GROUP + (first_packed_row + row) % GROUP; }
    // Row of the packed activations, in heads.
    __device__ __forceinline__ int page(int tile) const {
        const int key = tile * KEYS + threadIdx.x * PAGE_ROWS;
        return threadIdx.x < PAGES_PER_TILE && tile < end && key < seq_len ? table[key / BLOCK_SIZE] : 0;
    }
};

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

__device__ __forceinline__ void copy_query(const Parameters& p, const Work& work, Shared& shared) {
    for (int i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
        const int row = i / PIECES, piece = i % PIECES;
        const bool valid = work.has_row(row);
        const Element* source = p.q + (work.first_token + work.token(row)) * p.query_stride + work.head(row) * HEAD_DIM + piece * 8;
        copy_16_bytes(shared_address(shared.query) + row * ROW_BYTES + piece * 16, source, valid);
    }
}

// Keys and values of one tile; rows past the sequence become zeros.
__device__ __forceinline__ void copy_tile(const Parameters& p, const Work& work, Shared& shared, int tile) {
    const int stage = tile % 2;
    const unsigned keys = shared_address(shared.keys[stage]), values = shared_address(shared.values[stage]);
#pragma unroll 4
    for (int i = threadIdx.x; i < KEYS * PIECES; i += THREADS) {
        const int row = i / PIECES, piece = i % PIECES;
        const int key = tile * KEYS + row;
        const long long page = shared.pages[stage][row / PAGE_ROWS];
        const long long source = ((page * NUM_KV_HEADS + work.kv_head) * BLOCK_SIZE + key % BLOCK_SIZE) * HEAD_DIM + piece * 8;
        const unsigned destination = row * ROW_BYTES + piece * 16;
        copy_16_bytes(keys + destination, p.k_pages + source, key < work.seq_len);
        copy_16_bytes(values + destination, p.v_pages + source, key < work.seq_len);
    }
}

struct Rows {  // what one warp keeps of its 16 rows; a thread has rows lane / 4 and lane / 4 + 8
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned q[QUERY_IN_REGISTERS ? STEPS : 1][4];
    float out[STEPS * 2][4];
    float maximum[2], sum[2], slope[2];
    int position[2];

    __device__ __forceinline__ int row(int side) const { return warp * 16 + lane / 4 + side * 8; }

    __device__ __forceinline__ void begin(const Parameters& p, const Work& work) {
#pragma unroll
        for (int i = 0; i < STEPS * 2; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) out[i][j] = 0.0f;
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            maximum[side] = NEGATIVE_INFINITY;
            sum[side] = 0.0f;
            position[side] = work.position(row(side));
            slope[side] = ALIBI ? p.alibi_slopes[work.head(row(side))] * LOG2_E : 0.0f;
        }
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

    __device__ __forceinline__ bool needs_mask(const Parameters& p, const Work& work, int tile) const {
        const int first = work.position(warp * 16), last = work.position(warp * 16 + 15);
        bool needed = (tile + 1) * KEYS > (CAUSAL ? first + 1 : work.seq_len);
        if (WINDOW) needed = needed || tile * KEYS <= last - p.window;
        return needed;
    }

    // Scores to probabilities; the running maxima, sums and outputs move to the new maxima.
    __device__ __forceinline__ void normalise(float (&scores)[KEYS / 8][4], const Parameters& p, const Work& work, int tile) {
        const ScoreTransform to_score = ScoreTransform::make(p.scale, p.soft_cap);
        const bool masked = needs_mask(p, work, tile);
        float tile_maximum[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY};
        // Without cap or bias, scaling is folded into the exponent below.
        constexpr bool PLAIN = !SOFT_CAP && !ALIBI;
#pragma unroll
        for (int i = 0; i < KEYS / 8; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int key = tile * KEYS + i * 8 + lane % 4 * 2 + j % 2;
                if (!PLAIN) scores[i][j] = to_score(scores[i][j], slope[j / 2], key, position[j / 2]);
                if (masked) {
                    bool visible = key < (CAUSAL ? position[j / 2] + 1 : work.seq_len);
                    if (WINDOW) visible = visible && key > position[j / 2] - p.window;
                    if (!visible) scores[i][j] = NEGATIVE_INFINITY;
                }
                tile_maximum[j / 2] = fmaxf(tile_maximum[j / 2], scores[i][j]);
            }
        const float unit = PLAIN ? to_score.scale : 1.0f;
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            tile_maximum[side] = fmaxf(tile_maximum[side], __shfl_xor_sync(~0u, tile_maximum[side], 1));
            tile_maximum[side] = fmaxf(tile_maximum[side], __shfl_xor_sync(~0u, tile_maximum[side], 2));
            const float new_maximum = fmaxf(maximum[side], tile_maximum[side]);
            // A row that has seen nothing yet keeps weight 0: exp2(-inf - 0), not exp2(-inf + inf).
            const float shift = new_maximum == NEGATIVE_INFINITY ? 0.0f : new_maximum * unit;
            const float factor = exp2_fast(maximum[side] * unit - shift);
            maximum[side] = new_maximum;
            sum[side] *= factor;
#pragma unroll
            for (int i = 0; i < KEYS / 8; ++i)
#pragma unroll
                for (int j = 2 * side; j < 2 * side + 2; ++j) {
                    scores[i][j] = exp2_fast(fmaf(scores[i][j], unit, -shift));
                    sum[side] += scores[i][j];
                }
#pragma unroll
            for (int i = 0; i < STEPS * 2; ++i)
#pragma unroll
                for (int j = 2 * side; j < 2 * side + 2; ++j) out[i][j] *= factor;
        }
    }

    __device__ __forceinline__ void accumulate(const float (&scores)[KEYS / 8][4], const Shared& shared, int stage) {
        const unsigned values = shared_address(shared.values[stage]) + lane % 16 * ROW_BYTES + lane / 16 * 16;
#pragma unroll
        for (int k = 0; k < KEYS / 16; ++k) {
            const unsigned probability[4] = {
                pack(scores[2 * k][0], scores[2 * k][1]), pack(scores[2 * k][2], scores[2 * k][3]),
                pack(scores[2 * k + 1][0], scores[2 * k + 1][1]), pack(scores[2 * k + 1][2], scores[2 * k + 1][3])};
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
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            sum[side] += __shfl_xor_sync(~0u, sum[side], 1);
            sum[side] += __shfl_xor_sync(~0u, sum[side], 2);
            const float inverse = __fdividef(1.0f, sum[side]);
            auto* row_words = reinterpret_cast<unsigned*>(own + (lane / 4 + side * 8) * ROW_BYTES) + lane % 4;
#pragma unroll
            for (int i = 0; i < STEPS * 2; ++i) row_words[i * 4] = pack(out[i][2 * side] * inverse, out[i][2 * side + 1] * inverse);
        }
        __syncwarp();
        for (int i = lane; i < 16 * PIECES; i += 32) {
            const int row = warp * 16 + i / PIECES, piece = i % PIECES;
            if (!work.has_row(row)) continue;
            Element* destination = p.out + (static_cast<long long>(work.first_token + work.token(row)) * NUM_KV_HEADS * GROUP + work.head(row)) * HEAD_DIM;
            *reinterpret_cast<uint4*>(destination + piece * 8) = *reinterpret_cast<const uint4*>(own + i / PIECES * ROW_BYTES + piece * 16);
        }
    }
};

__device__ __forceinline__ void attend(const Parameters& p, const Work& work, Shared& shared) {
    Rows rows;
    if (threadIdx.x < PAGES_PER_TILE) {
        shared.pages[work.begin % 2][threadIdx.x] = work.page(work.begin);
        shared.pages[(work.begin + 1) % 2][threadIdx.x] = work.page(work.begin + 1);
    }
    int page = work.page(work.begin + 2);
    __syncthreads();
    copy_query(p, work, shared);
    copy_tile(p, work, shared, work.begin);
    commit_copies();
    rows.begin(p, work);
    for (int tile = work.begin; tile < work.end; ++tile) {
        wait_for_copies();
        __syncthreads();  // this tile is here, and nobody reads the other stage or its page numbers any more
        if (tile == work.begin) rows.load_query(shared);
        if (tile + 1 < work.end) copy_tile(p, work, shared, tile + 1);
        commit_copies();
        if (threadIdx.x < PAGES_PER_TILE) shared.pages[tile % 2][threadIdx.x] = page;
        page = work.page(tile + 3);
        float scores[KEYS / 8][4];
        rows.score(scores, shared, tile % 2);
        rows.normalise(scores, p, work, tile);
        rows.accumulate(scores, shared, tile % 2);
    }
    rows.store(p, work, shared);
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_prefill(
    const Element* q, long long query_stride, const Element* k_pages, const Element* v_pages, Element* out,
    const int* cu_seqlens_q, const int* seq_lens, const int* slots, const int* block_tables, int max_blocks, const int* plan,
    const int2* prefill_tiles, const float* alibi_slopes, float scale, float soft_cap, int window) {
    const Parameters p = {q,     query_stride, k_pages,    v_pages,      out,   cu_seqlens_q, seq_lens,
                          slots, block_tables, max_blocks, alibi_slopes, scale, soft_cap,     window};
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int num_items = plan[2] * NUM_KV_HEADS;
    if (blockIdx.x >= num_items) return;
    if (HEAD_DIM % 16) {  // the tensor cores read a row's padding, which no copy writes
        for (int i = threadIdx.x; i < sizeof(Shared) / 16; i += THREADS) reinterpret_cast<uint4*>(memory)[i] = make_uint4(0, 0, 0, 0);
        __syncthreads();
    }
    // Longest first, every second round backwards, so that no block gets the longest of each round.
    for (int round = 0; round * gridDim.x < num_items; ++round) {
        const int item = round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
        if (item < num_items) attend(p, Work::make(p, prefill_tiles[item / NUM_KV_HEADS], item % NUM_KV_HEADS), shared);
    }
}
