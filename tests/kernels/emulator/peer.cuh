// SPDX-License-Identifier: Apache-2.0
// include/peer.cuh for a CPU: ranks are processes that map the same memory, and a rank that waits lets the others run.
#ifndef PEER
#define PEER

#include <sched.h>

constexpr unsigned int ABSENT = 0xffffffffu;
constexpr unsigned int OTHER_NAN = 0x7fff7fffu;

inline unsigned int read_shared_word(const unsigned int* from) { return __atomic_load_n(from, __ATOMIC_RELAXED); }

inline void write_to_peer(uint4* to, const uint4& words) {
    __atomic_store_n(&to->x, words.x, __ATOMIC_RELAXED);
    __atomic_store_n(&to->y, words.y, __ATOMIC_RELAXED);
    __atomic_store_n(&to->z, words.z, __ATOMIC_RELAXED);
    __atomic_store_n(&to->w, words.w, __ATOMIC_RELAXED);
}

inline uint4 read_from_peer(const uint4* from) {
    return {read_shared_word(&from->x), read_shared_word(&from->y), read_shared_word(&from->z), read_shared_word(&from->w)};
}

inline void yield_processor() { sched_yield(); }

#endif
