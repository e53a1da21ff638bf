// SPDX-License-Identifier: Apache-2.0
// The computing warps of attention_decode.cu on their way over an item's keys and values: tile by tile, with a running softmax.
//
// Per tile: scores^T [TILE, heads] = K q^T, this warp's 16 tokens of it; the tile's maxima and probabilities change hands in
// shared memory; out^T [HEAD_DIM, heads] += V^T p^T, this warp's 16 SLICES dims of it. Fragments lie as mma.sync m16n8k16 has
// them: tokens or dims lane / 4 and lane / 4 + 8, heads 2 (lane % 4) and the one after. All CONSUMERS threads call together.
//
// With KV_FP8 a register of ldmatrix holds four codes: four neighbouring dims of a token, or, transposed, two dims of two tokens.
// Their order decides which dim meets which fragment index: keys and queries share a permutation of each 16 dims, and a row
// lane / 4 of the output is dim 2 (lane / 4) of its 16, row lane / 4 + 8 the dim after (`Consumer::write_out` knows).
//
// Reads what attention_decode_feeder.cuh fills. Compile-time parameters: those of attention_decode.cu.
#pragma once
#include "attention_decode.cuh"

constexpr int CHAINS = COLUMNS == 1 ? 2 : 1;  // independent sums that hide the tensor core's latency

struct HistoryScan {
    const Parameters& p;
    Shared& shared;
    const int warp, lane;
    RingCursor ring, query;
    unsigned q[QUERY_IN_REGISTERS ? STEPS : 1][QUERY_IN_REGISTERS ? COLUMNS : 1][2];
    float slope[COLUMNS][2];  // only with ALIBI; holds log2(e)
    PartialResult result;
    unsigned loaded_values[4];  // only with KV_FP8

    // Adds the unit whose keys lie in the ring's current slot, and its values in the one after, to `result`, which starts
    // afresh with an item's first unit. Until `reduce_sums`, `result.sum` is over the tokens that this thread scored.
    __device__ __forceinline__ void add(const Unit& unit) {
        if (unit.is_first) begin_item(unit);
        float scores[COLUMNS][4];
        score(scores, unit.kv_head());
        release_slot();
        if (!QUERY_IN_REGISTERS && unit.is_last) release_query();
        transform(scores, unit);
        group_barrier(1, CONSUMERS);
        normalise(scores);
        group_barrier(1, CONSUMERS);
        wait_for_slot();
        accumulate();
        release_slot();
    }

    // After an item's last unit: sums over all tokens, in every thread.
    __device__ __forceinline__ void reduce_sums() {
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column)
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                float total = result.sum[column][side];
#pragma unroll
                for (int distance = 4; distance < 32; distance *= 2) total += __shfl_xor_sync(~0u, total, distance);
                if (lane < 4) shared.sum[warp][head_in_item(column, side)] = total;
            }
        group_barrier(1, CONSUMERS);
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column)
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                result.sum[column][side] = 0.0f;
#pragma unroll
                for (int other = 0; other < WARPS; ++other) result.sum[column][side] += shared.sum[other][head_in_item(column, side)];
            }
    }

    __device__ __forceinline__ void load_query_step(unsigned (&r)[2], int step, int column, int slot, int kv_head) const {
#if KV_FP8
        const unsigned char* row = shared.query[slot] + (column * 8 + lane / 4) * ROW_BYTES;
        const uint2 four = *reinterpret_cast<const uint2*>(row + step * 32 + lane % 4 * 8);
        const float factor = query_factor(p.kv_scales, kv_head, p.query_scale);
        r[0] = scaled_operands(four.x, factor);
        r[1] = scaled_operands(four.y, factor);
#else
        const int row = column * 8 + lane % 8;
        load_matrix_pair(r[0], r[1], shared_address(shared.query[slot]) + row * ROW_BYTES + (step * 2 + lane / 8 % 2) * 16);
#endif
    }

    __device__ __forceinline__ void begin_item(const Unit& unit) {
        barrier_wait(shared_address(&shared.query_full[query.slot]), query.parity);
        if (QUERY_IN_REGISTERS) {
#pragma unroll
            for (int step = 0; step < STEPS; ++step)
#pragma unroll
                for (int column = 0; column < COLUMNS; ++column) load_query_step(q[step][column], step, column, query.slot, unit.kv_head());
            release_query();
        }
#if ALIBI
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column)
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const int head = head_in_item(column, side);
                slope[column][side] = head < unit.num_heads() ? p.alibi_slopes[unit.first_head() + head] * LOG2_E : 0.0f;
            }
#endif
        result.clear();
    }

    __device__ __forceinline__ void wait_for_slot() const { barrier_wait(shared_address(&shared.full[ring.slot]), ring.parity); }

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

    // The head of its item that this thread's [.., column, side] values belong to.
    __device__ __forceinline__ int head_in_item(int column, int side) const { return column * 8 + lane % 4 * 2 + side; }

    // scores[column]: [token, head] fragments of this warp's 16 tokens.
    __device__ __forceinline__ void score(float (&scores)[COLUMNS][4], int kv_head) {
        float sums[CHAINS][COLUMNS][4] = {};
        const unsigned keys = shared_address(shared.ring[ring.slot]) + (warp * 16 + lane % 16) * KV_ROW_BYTES + lane / 16 * 16;
        unsigned loaded[4];
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            unsigned k[4];
#if KV_FP8
            const int half = step % 2 * 2;
            if (STEPS % 2 && step == STEPS - 1)  // a row ends here, and the last one's end is where the feeder fills the next slot
                load_matrix_pair(loaded[0], loaded[1], keys + step * 16);
            else if (half == 0)
                load_matrices(loaded, keys + step * 16);
#pragma unroll
            for (int i = 0; i < 4; ++i) k[i] = operands_of(loaded[half + i % 2] >> i / 2 * 16);
#else
            load_matrices(k, keys + step * 32);
#endif
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column) {
                if (QUERY_IN_REGISTERS) {
                    multiply_add(sums[step % CHAINS][column], k, q[step][column][0], q[step][column][1]);
                } else {
                    unsigned pair[2];
                    load_query_step(pair, step, column, query.slot, kv_head);
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
        auto& [out, maximum, sum] = result;
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
            pairs[0] = pack_operands(scores[column][0], scores[column][1]);
            pairs[8 * 4] = pack_operands(scores[column][2], scores[column][3]);
#pragma unroll
            for (int slice = 0; slice < SLICES; ++slice)
#pragma unroll
                for (int i = 0; i < 4; ++i) out[slice][column][i] *= factor[i % 2];
        }
    }

    // The left operand of 16 dims by the 16 tokens of a step. With KV_FP8 two steps share a load.
    __device__ __forceinline__ void load_values(unsigned (&v)[4], unsigned address, int step) {
#if KV_FP8
        const int half = step % 2 * 2;
        if (half == 0) load_matrices_transposed(loaded_values, address);
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = operands_of(__byte_perm(loaded_values[half + i / 2], 0, i % 2 ? 0x0031 : 0x0020));
#else
        load_matrices_transposed(v, address);
#endif
    }

    // out^T += V^T p^T over the tile of values in the ring's current slot.
    __device__ __forceinline__ void accumulate() {
        unsigned probability[COLUMNS][TILE / 32][4];
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column)
#pragma unroll
            for (int half = 0; half < TILE / 32; ++half)
                load_matrices_transposed(probability[column][half], shared_address(&shared.probability[column][half * 32 + lane][0]));
        const int row = KV_FP8 ? lane : lane / 16 * 8 + lane % 8;
        const unsigned values = shared_address(shared.ring[ring.slot]) + row * KV_ROW_BYTES + (KV_FP8 ? 0 : lane / 8 % 2 * 16);
#pragma unroll
        for (int slice = 0; slice < SLICES; ++slice) {
            const int dims = warp * SLICES + slice;
            if (STEPS % WARPS && dims >= STEPS) break;
#pragma unroll
            for (int step = 0; step < TILE / 16; ++step) {
                unsigned v[4];
                load_values(v, values + step * 16 * KV_ROW_BYTES + dims * 16 * sizeof(KvElement), step);
#pragma unroll
                for (int column = 0; column < COLUMNS; ++column) {
                    const unsigned* pair = &probability[column][step / 2][step % 2 * 2];
                    multiply_add(result.out[slice][column], v, pair[0], pair[1]);
                }
            }
        }
    }

};
