// SPDX-License-Identifier: Apache-2.0
// The merge over splits of attention_decode.cu: the partial results of an item that several blocks worked on become one.
//
// partials: [2 workers, SLOT_FLOATS] float32, a slot being out fragments [FRAGMENTS, CONSUMERS, 4] and then [COLUMNS, 4, 4]:
// {maximum, maximum, sum, sum} of the two heads that each of four lanes has. flags: [2 workers], 1 = the slot is written; the
// one block that reads it sets it back to 0. An item's contributors are consecutive workers, and the first of them has the
// result in the end; a block waits only for blocks that were started before it (see `DecodeRange`).
//
// Compile-time parameters: those of attention_decode.cu; kernels/attention_tiling.py sizes the slots (partial_floats).
#pragma once
#include "attention_decode_scan.cuh"

struct SplitMerge : HistoryScan {
    const DecodeSplit split;
    const int worker, thread;

    static constexpr int FRAGMENTS = SLICES * COLUMNS;  // of four floats, for each thread
    static constexpr int SLOT_FLOATS = FRAGMENTS * CONSUMERS * 4 + COLUMNS * 8 * 2;

    // A worker meets at most two split items: one that an earlier worker began (slot 2 w) and one that it begins (2 w + 1).
    __device__ __forceinline__ static int partial_slot(int first_worker, int contributor) {
        return 2 * (first_worker + contributor) + (contributor == 0);
    }

    // This block's part of an item goes to the block that began it; true there, with the whole item in `result`. Above
    // DECODE_FAN_IN contributors, every DECODE_FAN_IN-th first adds up those that follow it.
    __device__ __forceinline__ bool merge_partials(int first_unit, int last_unit) {
        const int first_worker = split.worker_of(first_unit);
        const int contributors = split.worker_of(last_unit) - first_worker + 1;
        const int self = worker - first_worker;
        if (self % DECODE_FAN_IN == 0) add_partials(first_worker, self + 1, min(self + DECODE_FAN_IN, contributors), 1);
        if (self == 0) add_partials(first_worker, DECODE_FAN_IN, contributors, DECODE_FAN_IN);
        if (self > 0) store_partial(partial_slot(first_worker, self));
        return self == 0;
    }

    __device__ __forceinline__ float* slot_address(int slot) const { return p.partials + static_cast<long long>(slot) * SLOT_FLOATS; }

    __device__ __forceinline__ void store_partial(int slot) {
        const auto& [out, maximum, sum] = result;
        auto* fragments = reinterpret_cast<float4*>(slot_address(slot));
#pragma unroll
        for (int slice = 0; slice < SLICES; ++slice)
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column) {
                const float(&o)[4] = out[slice][column];
                __stcg(&fragments[(slice * COLUMNS + column) * CONSUMERS + thread], make_float4(o[0], o[1], o[2], o[3]));
            }
        if (thread < 4) {
            auto* softmax = fragments + FRAGMENTS * CONSUMERS;
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column)
                __stcg(&softmax[column * 4 + lane], make_float4(maximum[column][0], maximum[column][1], sum[column][0], sum[column][1]));
        }
        group_barrier(1, CONSUMERS);
        if (thread == 0) store_release(p.flags + slot, 1);
    }

    // Contributors begin, begin + stride, ... below end, at most CONSUMERS of them; their flags are clear then.
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

    // Adds the partial results of those contributors to this block's own.
    __device__ __forceinline__ void add_partials(int first_worker, int begin, int end, int stride) {
        if (begin >= end) return;
        auto& [out, maximum, sum] = result;
        wait_for_partials(first_worker, begin, end, stride);
#pragma unroll 4
        for (int contributor = begin; contributor < end; contributor += stride) {
            const auto* fragments = reinterpret_cast<const float4*>(slot_address(partial_slot(first_worker, contributor)));
            const auto* softmax = fragments + FRAGMENTS * CONSUMERS;
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
};
