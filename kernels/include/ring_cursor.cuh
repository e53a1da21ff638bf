// SPDX-License-Identifier: Apache-2.0
// A place in a ring of shared-memory slots that some warps fill and others empty, each slot with a barrier for either.
#pragma once

// Slot index, and the parity of the phase that its barriers complete in the current pass: a reader waits for `parity` of
// the full barrier, a writer for the opposite one of the empty barrier, which lets the first pass through.
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
