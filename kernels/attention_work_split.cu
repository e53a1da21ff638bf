// SPDX-License-Identifier: Apache-2.0
// Divides one step's attention work, once a step and for all layers: see attention_work_split.cuh for what it writes.
//
// One block. Decode: the tiles of all sequences with one new token, times the items (heads) of each, in equal contiguous
// ranges, one a worker. Prefill: every tile of `prefill_rows` query rows (tokens x heads of a group) of the other sequences,
// longest first. Also clears the decode kernel's flags, so that a step after an aborted one starts clean.
//
// cu_seqlens_q [S + 1], seq_lens [S], seq_indices [S], num_seqs_and_decodes {S, sequences with one new token}. decode_ends, prefill_ends
// [max S]: scratch, running totals of tiles.
#include "attention_work_split.cuh"

constexpr int THREADS = 1024;
constexpr int BUCKETS = 1024;  // of the counting sort by cost

struct Scan {
    int warp_totals[THREADS / 32];

    // Inclusive sum over the block; `total` is the sum over all threads.
    __device__ int inclusive(int value, int& total) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        for (int distance = 1; distance < 32; distance *= 2) {
            const int below = __shfl_up_sync(~0u, value, distance);
            if (lane >= distance) value += below;
        }
        if (lane == 31) warp_totals[warp] = value;
        __syncthreads();
        if (warp == 0) {
            int sum = warp_totals[lane];
            for (int distance = 1; distance < 32; distance *= 2) {
                const int below = __shfl_up_sync(~0u, sum, distance);
                if (lane >= distance) sum += below;
            }
            warp_totals[lane] = sum;
        }
        __syncthreads();
        if (warp > 0) value += warp_totals[warp - 1];
        total = warp_totals[THREADS / 32 - 1];
        __syncthreads();
        return value;
    }
};

// ends[i] = tiles of sequences begin .. begin + i; returns the sum. All threads of the block call it.
template <typename TilesOf>
__device__ int running_totals(Scan& scan, int begin, int end, int* ends, TilesOf tiles_of) {
    int carry = 0;
    for (int base = begin; base < end; base += THREADS) {
        const int seq = base + threadIdx.x;
        int total;
        const int sum = scan.inclusive(seq < end ? tiles_of(seq) : 0, total);
        if (seq < end) ends[seq - begin] = carry + sum;
        carry += total;
    }
    __syncthreads();
    return carry;
}

// Smallest i with ends[i] > position.
__device__ int find(const int* ends, int count, int position) {
    int low = 0, high = count - 1;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (ends[middle] > position)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

struct PrefillTiles {
    const int *cu_seqlens_q, *seq_lens, *seq_indices, *ends;
    int first_seq, num_seqs, num_tiles, group, rows, cost_shift;

    __device__ static int count(int num_tokens, int group, int rows) { return (num_tokens * group + rows - 1) / rows; }

    // The tile at `position` of the running totals.
    __device__ PrefillTile operator[](int position) const {
        const int i = find(ends, num_seqs, position);
        const int seq = first_seq + i;
        const int first_token = cu_seqlens_q[seq];
        const int index = position - (i ? ends[i - 1] : 0);
        return {first_token, cu_seqlens_q[seq + 1] - first_token, seq_lens[seq], seq_indices[seq], index * rows};
    }

    // By cost, which is the number of key tiles that the tile's last row sees; the most expensive first.
    __device__ int bucket(const PrefillTile& tile) const {
        const int last_token = min(tile.num_tokens - 1, (tile.first_row + rows - 1) / group);
        // Below 0 where fewer keys than rows are given, as in attention to another sequence: such a tile costs least.
        const int last_visible = max(tile.seq_len - tile.num_tokens + last_token, 0);
        return BUCKETS - 1 - min(last_visible >> cost_shift, BUCKETS - 1);
    }
};

// The warp's lanes with equal buckets take neighbouring places, in order: tiles of one sequence then run side by side and
// read their keys from the cache. All lanes call it; BUCKETS stands for none.
__device__ int take_place(int* bucket_ends, int bucket) {
    const int lane = threadIdx.x % 32;
    const unsigned peers = __match_any_sync(~0u, bucket);
    const int first = __ffs(peers) - 1;
    int place = 0;
    if (lane == first && bucket < BUCKETS) place = atomicAdd(&bucket_ends[bucket], __popc(peers));
    return __shfl_sync(~0u, place, first) + __popc(peers & ((1u << lane) - 1));
}

__device__ void sort_tiles(Scan& scan, int* bucket_ends, const PrefillTiles& tiles, int4* sorted) {
    for (int bucket = threadIdx.x; bucket < BUCKETS; bucket += THREADS) bucket_ends[bucket] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < tiles.num_tiles; i += THREADS) atomicAdd(&bucket_ends[tiles.bucket(tiles[i])], 1);
    __syncthreads();
    int total;
    const int own = bucket_ends[threadIdx.x];
    const int end = scan.inclusive(own, total);
    bucket_ends[threadIdx.x] = end - own;
    __syncthreads();
    for (int base = 0; base < tiles.num_tiles; base += THREADS) {
        const int i = base + threadIdx.x;
        const bool valid = i < tiles.num_tiles;
        const PrefillTile tile = valid ? tiles[i] : PrefillTile{};
        const int place = take_place(bucket_ends, valid ? tiles.bucket(tile) : BUCKETS);
        if (valid) tile.store(sorted, place);
    }
}

// As many workers as there are units and the GPU has room for, but no more to an item than one level of merging takes, unless
// the item is long enough to pay for a second level.
__device__ int workers_for(int units, int items, int max_workers) {
    if (units == 0) return 0;
    const long long useful = static_cast<long long>(items) * max(DECODE_FAN_IN, units / items / 4);
    return static_cast<int>(min(static_cast<long long>(min(max_workers, units)), useful));
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_work_split(
    const int* cu_seqlens_q, const int* seq_lens, const int* seq_indices, const int* block_tables, const int* num_seqs_and_decodes, int* work_split,
    int* decode_ends, int* prefill_ends, int4* prefill_tiles, int* flags, int max_blocks, int block_size, int items_per_seq,
    int max_workers, int window, int group, int prefill_rows, int cost_shift) {
    __shared__ Scan scan;
    __shared__ int bucket_ends[BUCKETS];
    const int num_seqs = num_seqs_and_decodes[0], num_decode = num_seqs_and_decodes[1];
    for (int i = threadIdx.x; i < 2 * max_workers; i += THREADS) flags[i] = 0;

    const auto first_tile = [=](int seq_len) { return window > 0 ? max(seq_len - window, 0) / DECODE_TILE : 0; };
    const auto decode_tiles = [=](int seq) {
        return (seq_lens[seq] + DECODE_TILE - 1) / DECODE_TILE - first_tile(seq_lens[seq]);
    };
    const int units = running_totals(scan, 0, num_decode, decode_ends, decode_tiles) * items_per_seq;
    const int num_workers = workers_for(units, num_decode * items_per_seq, max_workers);
    const DecodeSplit split = {units, num_workers};
    for (int worker = threadIdx.x; worker < num_workers; worker += THREADS) {
        const int begin = split.begin_of(worker);
        const int seq = find(decode_ends, num_decode, begin / items_per_seq);
        const int offset = begin - (seq ? decode_ends[seq - 1] : 0) * items_per_seq;
        const int tiles = decode_tiles(seq), seq_len = seq_lens[seq], seq_index = seq_indices[seq];
        const int first_token = (first_tile(seq_len) + offset % tiles) * DECODE_TILE;
        const auto page = [&](int index) {
            const int token = first_token + index * min(block_size, DECODE_TILE);
            return token < min(seq_len, first_token + DECODE_TILE) ? block_tables[static_cast<long long>(seq_index) * max_blocks + token / block_size] : 0;
        };
        const DecodeRange range = {seq, offset / tiles, offset % tiles, seq_len, seq_index, begin, split.begin_of(worker + 1)};
        range.store(work_split, num_workers - 1 - worker, make_int4(page(0), page(1), page(2), page(3)));
    }

    const auto tiles_of = [=](int seq) {
        return PrefillTiles::count(cu_seqlens_q[seq + 1] - cu_seqlens_q[seq], group, prefill_rows);
    };
    const int num_tiles = running_totals(scan, num_decode, num_seqs, prefill_ends, tiles_of);
    const PrefillTiles tiles = {cu_seqlens_q, seq_lens,  seq_indices, prefill_ends, num_decode,
                                num_seqs - num_decode, num_tiles, group, prefill_rows, cost_shift};
    sort_tiles(scan, bucket_ends, tiles, prefill_tiles);
    if (threadIdx.x == 0) {
        work_split[0] = units;
        work_split[1] = num_workers;
        work_split[2] = num_tiles;
    }
}
