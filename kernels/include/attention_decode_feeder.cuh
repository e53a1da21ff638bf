// SPDX-License-Identifier: Apache-2.0
// The feeding warp of attention_decode.cu: walks the block's range of units and copies queries, keys and values into shared
// memory, asynchronously and as far ahead as the rings have slots.
//
// A unit takes two slots of the ring, keys [TILE, HEAD_DIM] and then values, from the BLOCK_SIZE-token pages that the block
// table names; rows past the sequence become zeros. An item's queries [num_heads, HEAD_DIM] take a slot of their own ring.
// Compile-time parameters: those of attention_decode.cu.
#pragma once
#include "attention_decode.cuh"

struct Feeder {
    const Parameters& p;
    Shared& shared;
    int lane;
    RingCursor ring, query;

    __device__ __forceinline__ int first_tile_of(int seq_len) const { return WINDOW ? max(seq_len - p.window, 0) / TILE : 0; }

    // Lanes below PAGES_PER_TILE: the page of the unit's tile with that number, 0 past the sequence.
    __device__ __forceinline__ int page_of(const Unit& unit, int seq_index) const {
        const int token = (unit.first_tile + unit.tile) * TILE;
        const int block = token / BLOCK_SIZE + lane;
        const bool live = lane < PAGES_PER_TILE && token + lane * PAGE_ROWS < unit.seq_len;
        return live ? p.block_tables[static_cast<long long>(seq_index) * p.max_blocks + block] : 0;
    }

    // Tile of keys or values into the ring's current slot, which must be empty; lane i holds the tile's page i.
    __device__ __forceinline__ void copy_tile(const KvElement* pages, const Unit& unit, int page) {
        const int token = (unit.first_tile + unit.tile) * TILE;
        const long long row = (static_cast<long long>(page) * NUM_KV_HEADS + unit.kv_head()) * BLOCK_SIZE + token % BLOCK_SIZE;
        const unsigned long long lane_source = reinterpret_cast<unsigned long long>(pages + row * HEAD_DIM);
        const unsigned destination = shared_address(shared.ring[ring.slot]);
        const int valid_rows = unit.seq_len - token;
#pragma unroll
        for (int page_index = 0; page_index < PAGES_PER_TILE; ++page_index) {
            const auto source = reinterpret_cast<const KvElement*>(__shfl_sync(~0u, lane_source, page_index));
#pragma unroll 8
            for (int i = 0; i < PAGE_ROWS * KV_PIECES; i += 32) {
                const int piece = i + lane;
                const int tile_row = page_index * PAGE_ROWS + piece / KV_PIECES;
                if (PAGE_ROWS * KV_PIECES % 32 == 0 || piece < PAGE_ROWS * KV_PIECES)
                    copy_16_bytes(destination + tile_row * KV_ROW_BYTES + piece % KV_PIECES * 16, source + piece * KV_PIECE,
                                  tile_row < valid_rows);
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

    __device__ __forceinline__ void copy_unit(const Unit& unit, int page) {
        wait_for_slot();
        if (unit.is_first) copy_query(unit);
        copy_tile(p.k_pages, unit, page);
        if (lane == 0) shared.units[ring.slot] = unit;
        finish_slot();
        wait_for_slot();
        copy_tile(p.v_pages, unit, page);
        finish_slot();
    }

    // The whole range. Page numbers are read one unit ahead, those of the first unit before the call.
    __device__ __forceinline__ void run(const DecodeRange& range, int first_page) {
        Unit unit = {range.seq, range.item, range.tile, 0, range.seq_len, 1, 0, range.begin};
        unit.first_tile = first_tile_of(unit.seq_len);
        int num_tiles = (unit.seq_len + TILE - 1) / TILE - unit.first_tile;
        int seq_index = range.seq_index;
        int page = first_page;
        int next_len = 0, next_seq_index = 0;  // of the next sequence, loaded one sequence ahead
        if (range.end - range.begin > num_tiles - unit.tile + (ITEMS - 1 - unit.item) * num_tiles) {
            next_len = p.seq_lens[unit.seq + 1];
            next_seq_index = p.seq_indices[unit.seq + 1];
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
                    seq_index = next_seq_index;
                    next.first_tile = first_tile_of(next_len);
                    num_tiles = (next_len + TILE - 1) / TILE - next.first_tile;
                    if (range.end - index - 1 > num_tiles * ITEMS) {
                        next_len = p.seq_lens[next.seq + 1];
                        next_seq_index = p.seq_indices[next.seq + 1];
                    }
                }
            }
            const bool more = index + 1 < range.end;
            const int next_page = more ? page_of(next, seq_index) : 0;
            unit.is_last = !more || next.is_first;
            copy_unit(unit, page);
            unit = next;
            page = next_page;
        }
    }
};
