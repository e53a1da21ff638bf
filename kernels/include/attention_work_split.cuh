// SPDX-License-Identifier: Apache-2.0
// How one step's attention work is split: what attention_work_split.cu writes and the attention kernels read, int32 throughout.
//
//   [0] decode units, [1] decode workers in use, [2] prefill tiles, [3..7] unused
//   [8 + 12 b ...]  decode block b's range: sequence, item, tile, seq_len, seq_index, first unit, end unit, unused, and the four
//                   pages at most of its first tile, which save the kernel a dependent read before its first copy
#pragma once

constexpr int DECODE_TILE = 64;  // tokens in one unit of decode work
constexpr int DECODE_FAN_IN = 16;  // partial results that one block merges at one level
constexpr int SPLIT_HEADER = 8;
constexpr int SPLIT_RANGE = 12;

// One tile of prefill work: ROWS query rows (tokens times heads of a group) of one sequence.
struct PrefillTile {
    int first_token, num_tokens, seq_len, seq_index, first_row;

    __device__ __forceinline__ static PrefillTile load(const int4* tiles, int index) {
        const int4 seq = tiles[2 * index];
        return {seq.x, seq.y, seq.z, seq.w, tiles[2 * index + 1].x};
    }
    __device__ __forceinline__ void store(int4* tiles, int index) const {
        tiles[2 * index] = make_int4(first_token, num_tokens, seq_len, seq_index);
        tiles[2 * index + 1] = make_int4(first_row, 0, 0, 0);
    }
};

// How `units` units of work are divided among `num_workers` blocks: worker w has [units w / workers, units (w + 1) / workers).
struct DecodeSplit {
    int units, num_workers;

    __device__ __forceinline__ static DecodeSplit load(const int* work_split) {
        const int2 header = *reinterpret_cast<const int2*>(work_split);
        return {header.x, header.y};
    }
    __device__ __forceinline__ int begin_of(int worker) const {
        return static_cast<int>(static_cast<long long>(units) * worker / num_workers);
    }
    __device__ __forceinline__ int worker_of(int unit) const {
        return static_cast<int>((static_cast<long long>(unit + 1) * num_workers - 1) / units);
    }
};

// Where a worker starts (tile `tile` of item `item` of sequence `seq`) and which units are its own. Blocks take workers in
// reverse: a worker waits only for workers after it, so only for blocks that were started before its own.
struct DecodeRange {
    int seq, item, tile, seq_len, seq_index, begin, end;

    __device__ __forceinline__ static const int* address(const int* work_split, int block) {
        return work_split + SPLIT_HEADER + block * SPLIT_RANGE;
    }
    __device__ __forceinline__ static DecodeRange load(const int* work_split, int block) {
        const int4* range = reinterpret_cast<const int4*>(address(work_split, block));
        const int4 first = range[0], second = range[1];
        return {first.x, first.y, first.z, first.w, second.x, second.y, second.z};
    }
    __device__ __forceinline__ static int load_page(const int* work_split, int block, int index) { return address(work_split, block)[8 + index]; }
    __device__ __forceinline__ void store(int* work_split, int block, const int4& pages) const {
        int4* range = reinterpret_cast<int4*>(work_split + SPLIT_HEADER + block * SPLIT_RANGE);
        range[0] = make_int4(seq, item, tile, seq_len);
        range[1] = make_int4(seq_index, begin, end, 0);
        range[2] = pages;
    }
};
