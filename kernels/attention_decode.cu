// SPDX-License-Identifier: Apache-2.0
// Attention of one new token per sequence over paged keys and values (flash-decoding).
//
// q: rows of queries, row s for sequence s, [H * HEAD_DIM] each, `query_stride` elements apart.
// k_pages, v_pages: [N, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM], elements like q's or, with KV_FP8, e4m3. out: [S, H * HEAD_DIM]. H = NUM_KV_HEADS * GROUP.
// work_split: from attention_work_split.cu. partials, flags: scratch, the flags zero at entry and at exit.
//
// The step's (sequence, head) items are cut into units of TILE tokens; attention_work_split.cu gives every block an equal,
// contiguous range of units, so that one long sequence fills the GPU as evenly as a thousand short ones. A block streams its
// range through a ring of shared-memory slots without ever draining it between items. The block that begins an item that
// others continue waits for their float32 partial results at the end of its range, when they are there or about to be; above
// DECODE_FAN_IN contributors, every DECODE_FAN_IN-th merges those up to the next one first.
//
// Four warps compute and one feeds them: attention_decode_feeder.cuh, then attention_decode_scan.cuh over an item's history
// and attention_decode_merge.cuh over the blocks that share it, on the values of attention_decode.cuh.
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
// 64, 128), NUM_KV_HEADS, GROUP, HEADS_PER_ITEM, RING, MIN_BLOCKS, SHARED_BYTES, WINDOW, SOFT_CAP, ALIBI, KV_FP8 (HEAD_DIM % 16 == 0).
#include "attention_instructions.cuh"
#include "attention_decode_feeder.cuh"
#include "attention_decode_merge.cuh"

// A thread of the computing warps: beyond scan and merge, what becomes of an item's result.
struct Consumer : SplitMerge {
    __device__ __forceinline__ void end_item(const Unit& unit, const DecodeRange& range) {
        reduce_sums();
        const int first_unit = unit.index - unit.tile;
        const int last_unit = first_unit + (unit.seq_len + TILE - 1) / TILE - unit.first_tile - 1;
        const bool is_whole = first_unit >= range.begin && last_unit < range.end;
        if (is_whole || merge_partials(first_unit, last_unit)) write_out(unit);
    }

#if KV_FP8
    // A lane holds two neighbouring dims of each of its heads.
    __device__ __forceinline__ void write_out(const Unit& unit) {
        Element* row = p.out + (static_cast<long long>(unit.seq) * NUM_KV_HEADS * GROUP + unit.first_head()) * HEAD_DIM;
        const float factor = output_factor(p.kv_scales, unit.kv_head());
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column)
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const float inverse = __fdividef(factor, result.sum[column][side]);
                const int head = head_in_item(column, side);
#pragma unroll
                for (int slice = 0; slice < SLICES; ++slice) {
                    const int dim = (warp * SLICES + slice) * 16 + lane / 4 * 2;
                    const auto& out = result.out[slice][column];
                    if (head < unit.num_heads() && dim < HEAD_DIM)
                        *reinterpret_cast<unsigned*>(row + head * HEAD_DIM + dim) = pack(out[side] * inverse, out[2 + side] * inverse);
                }
            }
    }
#else
    // Neighbouring lanes hold neighbouring dims of the same two heads; they swap so that each writes two dims of one head.
    __device__ __forceinline__ void write_out(const Unit& unit) {
        Element* row = p.out + (static_cast<long long>(unit.seq) * NUM_KV_HEADS * GROUP + unit.first_head()) * HEAD_DIM;
        const int heads = unit.num_heads();
        const int odd = lane / 4 % 2;
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column) {
            const float inverse[2] = {__fdividef(1.0f, result.sum[column][0]), __fdividef(1.0f, result.sum[column][1])};
            const int head = head_in_item(column, odd);
#pragma unroll
            for (int slice = 0; slice < SLICES; ++slice)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float first = result.out[slice][column][half * 2] * inverse[0];
                    const float second = result.out[slice][column][half * 2 + 1] * inverse[1];
                    const float received = __shfl_xor_sync(~0u, odd ? first : second, 4);
                    const unsigned pair = odd ? pack(received, second) : pack(first, received);
                    const int dim = (warp * SLICES + slice) * 16 + half * 8 + lane / 8 * 2;
                    if (head < heads && dim < HEAD_DIM) *reinterpret_cast<unsigned*>(row + head * HEAD_DIM + dim) = pair;
                }
        }
    }
#endif
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) attention_decode(
    const Element* q, long long query_stride, const KvElement* k_pages, const KvElement* v_pages, Element* out, const int* seq_lens,
    const int* seq_indices, const int* block_tables, int max_blocks, const int* work_split, float* partials, int* flags,
    const float* alibi_slopes, const float* kv_scales, float scale, float soft_cap, int window) {
    const Parameters p = {q,        query_stride, k_pages, v_pages,      out,       seq_lens, seq_indices,                  block_tables, max_blocks,
                          work_split,     partials,     flags,   alibi_slopes, kv_scales, scale,    KV_FP8 ? 1.0f : scale, soft_cap,     window};
    DYNAMIC_SHARED(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const DecodeSplit split = DecodeSplit::load(p.work_split);
    const int block = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const DecodeRange range = DecodeRange::load(p.work_split, block);
    const int first_page = lane < PAGES_PER_TILE ? DecodeRange::load_page(p.work_split, block, lane) : 0;
    if (block >= split.num_workers) return;
    shared.initialise();
    if (warp == WARPS) {
        Feeder feeder{p, shared, lane};
        feeder.run(range, first_page);
        return;
    }
    Consumer consumer{{{p, shared, warp, lane}, split, split.num_workers - 1 - block, static_cast<int>(threadIdx.x)}};
    for (int index = range.begin; index < range.end; ++index) {
        consumer.wait_for_slot();
        const Unit unit = shared.units[consumer.ring.slot];
        consumer.add(unit);
        if (unit.is_last) consumer.end_item(unit, range);
    }
}
