// SPDX-License-Identifier: Apache-2.0
// Which experts a token takes, and the order in which grouped products take the tokens; three kernels, no host in between.
//     router_logits: logits = x @ weight^T in float32, not rounded. x [T, D], weight [E, D], logits [T, E].
//     choose: softmax over E, the TOP_K largest (ties: the lower number), their probabilities as shares, divided by
//         their sum if RENORMALISE. ids, shares [T, TOP_K], most probable first. Rows whose mark is negative are padding: id -1.
//     sort: pairs (token, choice) by expert. order: pair at each sorted position; positions: the inverse, -1 for pairs of
//         padding rows and of experts that this rank does not hold; tiles: ROWS sorted positions of one expert each.
// Defines: SCALAR, NUM_EXPERTS (E), TOP_K, RENORMALISE; router_logits: FEATURES (D), VEC (divides D), TOKENS (of one block);
//     sort: FIRST, NUM_LOCAL (the experts of this rank), ROWS, and one block of 1,024 threads, NUM_LOCAL <= 1024.
// What is odd: positions within an expert depend on the order in which atomics arrive. Nothing that is computed does: each
//     row of a grouped product is its own, and `combine` adds in the order of choices.
// Limits: a NaN logit is never chosen while there are others; a row of NaN alone takes experts 0, 1, ... with shares of NaN.
// Reference: the same in float64. Shazeer et al. 2017; Jiang et al. 2024.
#include "dtype.cuh"
#include "experts.cuh"
#include "launch.cuh"
#include "reduce.cuh"

constexpr int NUM_THREADS = 128;
constexpr int SORT_THREADS = 1024;
constexpr int EACH = (NUM_EXPERTS + 31) / 32;

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
router_logits(const scalar* __restrict__ x, const scalar* __restrict__ weight, float* __restrict__ logits, int num_tokens) {
    let_next_start();
    wait_for_previous();
    const int lane = threadIdx.x % 32;
    const int expert = blockIdx.x * (NUM_THREADS / 32) + threadIdx.x / 32, first = blockIdx.y * TOKENS;
    if (expert >= NUM_EXPERTS) return;
    float sum[TOKENS] = {};
    for (int at = lane * VEC; at < FEATURES; at += 32 * VEC) {
        float factor[VEC];
        load(weight + static_cast<int64>(expert) * FEATURES + at, factor);
#pragma unroll
        for (int token = 0; token < TOKENS; ++token) {
            float value[VEC];
            load(x + static_cast<int64>(min(first + token, num_tokens - 1)) * FEATURES + at, value);
#pragma unroll
            for (int i = 0; i < VEC; ++i) sum[token] += value[i] * factor[i];
        }
    }
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
        const float total = warp_reduce(sum[token], Sum());
        if (lane == 0 && first + token < num_tokens) logits[static_cast<int64>(first + token) * NUM_EXPERTS + expert] = total;
    }
}

struct Candidate {
    float logit;
    int expert;
};

struct Better {
    __device__ __forceinline__ Candidate operator()(Candidate a, Candidate b) const {
        return b.logit > a.logit || (b.logit == a.logit && b.expert < a.expert) ? b : a;
    }
};

__device__ __forceinline__ Candidate best_of_warp(Candidate best) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        best = Better()(best, {__shfl_xor_sync(0xffffffffu, best.logit, offset), __shfl_xor_sync(0xffffffffu, best.expert, offset)});
    return best;
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
choose(const float* __restrict__ logits, const int* __restrict__ marks, int* __restrict__ ids, float* __restrict__ shares,
       int num_tokens) {
    let_next_start();
    wait_for_previous();
    const int lane = threadIdx.x % 32, token = blockIdx.x * (NUM_THREADS / 32) + threadIdx.x / 32;
    if (token >= num_tokens) return;
    const float lowest = __int_as_float(0xff800000);
    float value[EACH], largest = lowest;
    bool taken[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int expert = i * 32 + lane;
        taken[i] = expert >= NUM_EXPERTS;
        value[i] = taken[i] ? lowest : logits[static_cast<int64>(token) * NUM_EXPERTS + expert];
        if (value[i] != value[i]) value[i] = lowest;
        largest = max(largest, value[i]);
    }
    largest = warp_reduce(largest, Max());
    float total = 0.0f, chosen_total = 0.0f, own_share = 0.0f;
    int own_expert = -1;
#pragma unroll
    for (int i = 0; i < EACH; ++i) total += expf(value[i] - largest);
    total = warp_reduce(total, Sum());
    for (int choice = 0; choice < TOP_K; ++choice) {
        Candidate best = {lowest, NUM_EXPERTS};
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            if (!taken[i]) best = Better()(best, {value[i], i * 32 + lane});
        best = best_of_warp(best);
#pragma unroll
        for (int i = 0; i < EACH; ++i) taken[i] = taken[i] || i * 32 + lane == best.expert;
        const float weight = expf(best.logit - largest);
        chosen_total += weight;
        if (choice == lane) own_expert = best.expert, own_share = weight;
    }
    if (lane < TOP_K) {
        ids[token * TOP_K + lane] = marks[token] < 0 ? -1 : own_expert;
        shares[token * TOP_K + lane] = own_share / (RENORMALISE ? chosen_total : total);
    }
}

extern "C" __global__ void __launch_bounds__(SORT_THREADS)
sort(const int* __restrict__ ids, int* __restrict__ order, int* __restrict__ positions, ExpertTile* __restrict__ tiles,
     int num_pairs, int max_tiles) {
    __shared__ int next[NUM_LOCAL];
    const int thread = threadIdx.x;
    let_next_start();
    wait_for_previous();
    if (thread < NUM_LOCAL) next[thread] = 0;
    __syncthreads();
    for (int pair = thread; pair < num_pairs; pair += SORT_THREADS) {
        const int expert = ids[pair] - FIRST;
        if (ids[pair] >= 0 && expert >= 0 && expert < NUM_LOCAL) atomicAdd(&next[expert], 1);
    }
    __syncthreads();
    const int count = thread < NUM_LOCAL ? next[thread] : 0;
    const int first = block_exclusive_sum<SORT_THREADS>(count);
    const int num_tiles = (count + ROWS - 1) / ROWS;
    const int first_tile = block_exclusive_sum<SORT_THREADS>(num_tiles);
    for (int tile = 0; tile < num_tiles; ++tile)
        tiles[first_tile + tile] = {thread, first + tile * ROWS, min(first + (tile + 1) * ROWS, first + count), 0};
    __shared__ int used_tiles;
    if (thread == SORT_THREADS - 1) used_tiles = first_tile + num_tiles;
    if (thread < NUM_LOCAL) next[thread] = first;
    __syncthreads();
    for (int tile = used_tiles + thread; tile < max_tiles; tile += SORT_THREADS) tiles[tile] = {-1, 0, 0, 0};
    for (int pair = thread; pair < num_pairs; pair += SORT_THREADS) {
        const int expert = ids[pair] - FIRST;
        int position = -1;
        if (ids[pair] >= 0 && expert >= 0 && expert < NUM_LOCAL) {
            position = atomicAdd(&next[expert], 1);
            order[position] = pair;
        }
        positions[pair] = position;
    }
}
