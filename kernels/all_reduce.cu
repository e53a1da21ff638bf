// SPDX-License-Identifier: Apache-2.0
// Sum over the GPUs of one host, in place: every rank writes its values straight into its peers' memory (CUDA IPC over
// NVLink) and reads only its own. For messages that are too short for NCCL.
// Shapes: x [num_vectors], vectors of 16 bytes, the last of which ends after `tail` values if HAS_TAIL; buffers [2, capacity]
//   of every rank, ABSENT throughout before the first call.
//   state: arrivals, epoch; zero before the first call. abort: 0; anything else ends a kernel whose peers are gone.
// Defines: SCALAR, RANK, NUM_RANKS (2 to 8), NUM_THREADS, HAS_TAIL (0 or 1). `peer<k>`: the buffers of rank (RANK + k) % NUM_RANKS.
// Limits: one call at a time on a rank, the same sequence of calls on all ranks; blocks wait for each other's peers, so the
//   grid should fit on the device; plain launches only (no launch.cuh).
// Reference: float32 sum in the order of the ranks, rounded once: equal bit by bit on all ranks and in both kernels.
//
// Why two halves suffice. A vector's place is ABSENT again once it was read. Call n + 2 uses the half of call n; a rank starts
// it only after its call n + 1 ended, for which every rank must have started call n + 1, so ended call n, and with it
// reading and clearing that half: the end of a kernel brings its stores to the second-level cache of its device, which is
// where peers' stores arrive too. The epoch lies in memory, so a captured call can be replayed.
#include "dtype.cuh"
#include "peer.cuh"

constexpr int NUM_PEERS = NUM_RANKS - 1;
constexpr int VEC = 16 / sizeof(scalar);
constexpr unsigned int SPINS_PER_LOOK = 1 << 14;  // polls between two looks at `abort`, which lies in the host's memory
constexpr unsigned int ALL = (1u << NUM_PEERS) - 1;

// Peer k is rank (RANK + k) % NUM_RANKS, for k from 1. What it sends lies in place k - 1 here; what is sent to it, in place
// NUM_PEERS - k there.
struct Peers {
    uint4* buffers[7];

    __device__ __forceinline__ void send(int k, int64 at, const uint4& words) const { write_to_peer(buffers[k - 1] + at, words); }
};

__device__ __forceinline__ int rank_of(int k) { return (RANK + k) % NUM_RANKS; }
__device__ __forceinline__ int place_at(int k) { return NUM_PEERS - k; }

__device__ __forceinline__ bool is_present(const uint4& v) {
    return v.x != ABSENT && v.y != ABSENT && v.z != ABSENT && v.w != ABSENT;
}

// The same numbers in words that are not ABSENT.
__device__ __forceinline__ uint4 sendable(uint4 v) {
    v.x = v.x == ABSENT ? OTHER_NAN : v.x;
    v.y = v.y == ABSENT ? OTHER_NAN : v.y;
    v.z = v.z == ABSENT ? OTHER_NAN : v.z;
    v.w = v.w == ABSENT ? OTHER_NAN : v.w;
    return v;
}

// Waits for one vector of every peer whose bit in `expected` is set, the places `step` vectors apart, and empties them.
// False when the call was aborted.
__device__ __forceinline__ bool receive(uint4 (&got)[NUM_PEERS], uint4* places, int64 step, unsigned int expected,
                                        const unsigned int* abort) {
    for (unsigned int spins = 1;; ++spins) {
        bool complete = true;
#pragma unroll
        for (int p = 0; p < NUM_PEERS; ++p) got[p] = read_from_peer(places + p * step);
#pragma unroll
        for (int p = 0; p < NUM_PEERS; ++p) complete = complete && (is_present(got[p]) || !(expected >> p & 1));
        if (complete) break;
        yield_processor();
        if (spins % SPINS_PER_LOOK == 0 && read_shared_word(abort) != 0) return false;
    }
#pragma unroll
    for (int p = 0; p < NUM_PEERS; ++p) places[p * step] = make_uint4(ABSENT, ABSENT, ABSENT, ABSENT);
    return true;
}

__device__ __forceinline__ uint4 sum(const uint4& mine, const uint4 (&got)[NUM_PEERS]) {
    float total[VEC];
#pragma unroll
    for (int rank = 0; rank < NUM_RANKS; ++rank) {
        const int k = (rank - RANK + NUM_RANKS) % NUM_RANKS;
        float value[VEC];
        load(reinterpret_cast<const scalar*>(k == 0 ? &mine : &got[k == 0 ? 0 : k - 1]), value);
#pragma unroll
        for (int i = 0; i < VEC; ++i) total[i] = rank == 0 ? value[i] : total[i] + value[i];
    }
    uint4 words;
    store(reinterpret_cast<scalar*>(&words), total);
    return sendable(words);
}

// Vector i of the message. What lies past the message's end is sent as zeros.
__device__ __forceinline__ uint4 read_message(const uint4* x, int i, int num_vectors, int tail) {
#if HAS_TAIL
    if (i + 1 == num_vectors) {
        uint4 words = make_uint4(0, 0, 0, 0);
        for (int j = 0; j < tail; ++j) reinterpret_cast<scalar*>(&words)[j] = reinterpret_cast<const scalar*>(x + i)[j];
        return words;
    }
#endif
    return x[i];
}

__device__ __forceinline__ void write_message(uint4* x, int i, int num_vectors, int tail, const uint4& words) {
#if HAS_TAIL
    if (i + 1 == num_vectors) {
        for (int j = 0; j < tail; ++j) reinterpret_cast<scalar*>(x + i)[j] = reinterpret_cast<const scalar*>(&words)[j];
        return;
    }
#endif
    x[i] = words;
}

// The last block to come moves on the epoch: by then all have read it. Off the critical path, while the data travels.
__device__ __forceinline__ void finish_epoch(unsigned int* state, unsigned int epoch) {
    __syncthreads();
    if (threadIdx.x == 0 && atomicAdd(&state[0], 1u) == gridDim.x - 1) {
        state[0] = 0;
        state[1] = epoch + 1;
    }
}

#define PARAMETERS                                                                                                       \
    uint4 *x, int num_vectors, int tail, uint4 *own, uint4 *peer1, uint4 *peer2, uint4 *peer3, uint4 *peer4, uint4 *peer5,         \
        uint4 *peer6, uint4 *peer7, int64 capacity, unsigned int *state, const unsigned int *abort

// Every rank sends everything to every other: one way over the link, NUM_PEERS times the bytes.
// A half holds [NUM_PEERS, num_vectors].
extern "C" __global__ void __launch_bounds__(NUM_THREADS)
all_reduce_one_shot(PARAMETERS) {
    const Peers peers{{peer1, peer2, peer3, peer4, peer5, peer6, peer7}};
    const int first = blockIdx.x * NUM_THREADS + threadIdx.x, stride = gridDim.x * NUM_THREADS;
    const unsigned int epoch = read_shared_word(&state[1]);
    const int64 half = epoch % 2 * capacity, step = num_vectors;
    for (int i = first; i < num_vectors; i += stride) {
        const uint4 mine = sendable(read_message(x, i, num_vectors, tail));
#pragma unroll
        for (int k = 1; k <= NUM_PEERS; ++k) peers.send(k, half + place_at(k) * step + i, mine);
    }
    finish_epoch(state, epoch);
    for (int i = first; i < num_vectors; i += stride) {
        const uint4 mine = sendable(read_message(x, i, num_vectors, tail));
        uint4 got[NUM_PEERS];
        if (!receive(got, own + half + i, step, ALL, abort)) return;
        write_message(x, i, num_vectors, tail, sum(mine, got));
    }
}

// Rank r sums the r-th chunk and sends it to all: twice over the link, two bytes for each at most.
// A half holds [2, NUM_PEERS, chunk]: parts of this rank's chunk, then the sums of the others.
extern "C" __global__ void __launch_bounds__(NUM_THREADS)
all_reduce_two_shot(PARAMETERS) {
    const Peers peers{{peer1, peer2, peer3, peer4, peer5, peer6, peer7}};
    const int first = blockIdx.x * NUM_THREADS + threadIdx.x, stride = gridDim.x * NUM_THREADS;
    const int chunk = (num_vectors + NUM_RANKS - 1) / NUM_RANKS;
    const unsigned int epoch = read_shared_word(&state[1]);
    const int64 half = epoch % 2 * capacity, step = chunk, sums = NUM_PEERS * step;
    for (int i = first; i < chunk; i += stride) {
        uint4 parts[NUM_PEERS];
#pragma unroll
        for (int k = 1; k <= NUM_PEERS; ++k) {
            const int at = rank_of(k) * chunk + i;
            if (at < num_vectors) parts[k - 1] = sendable(read_message(x, at, num_vectors, tail));
        }
#pragma unroll
        for (int k = 1; k <= NUM_PEERS; ++k)
            if (rank_of(k) * chunk + i < num_vectors) peers.send(k, half + place_at(k) * step + i, parts[k - 1]);
    }
    finish_epoch(state, epoch);
    for (int i = first; i < chunk && RANK * chunk + i < num_vectors; i += stride) {
        const uint4 mine = sendable(read_message(x, RANK * chunk + i, num_vectors, tail));
        uint4 got[NUM_PEERS];
        if (!receive(got, own + half + i, step, ALL, abort)) return;
        const uint4 total = sum(mine, got);
#pragma unroll
        for (int k = 1; k <= NUM_PEERS; ++k) peers.send(k, half + sums + place_at(k) * step + i, total);
        write_message(x, RANK * chunk + i, num_vectors, tail, total);
    }
    for (int i = first; i < chunk; i += stride) {
        unsigned int expected = 0;
#pragma unroll
        for (int k = 1; k <= NUM_PEERS; ++k) expected |= (rank_of(k) * chunk + i < num_vectors ? 1u : 0u) << (k - 1);
        uint4 got[NUM_PEERS];
        if (!receive(got, own + half + sums + i, step, expected, abort)) return;
#pragma unroll
        for (int k = 1; k <= NUM_PEERS; ++k)
            if (expected >> (k - 1) & 1) write_message(x, rank_of(k) * chunk + i, num_vectors, tail, got[k - 1]);
    }
}
