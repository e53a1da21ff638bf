// SPDX-License-Identifier: Apache-2.0
// What changes logits before a token is chosen: out = logits, BAN where the row has a mask without the token, plus the token biases of the row's sequence that still count, then
// the repetition penalty for tokens of prompt and output, then frequency and presence penalties for tokens of the output.
// In float32, so that a ban fits. A token that occurs several times in the list of biases gets the sum, but no less than BAN.
// A bias may count only after certain tokens (bad words), which are the entries after it, the nearest first.
// Shapes: logits [S, V_local]; records [S] of Sampling; positions [S] int32; biases [sequences, max_biases] of TokenBias;
//     block_tables [sequences, max_blocks_per_seq]; cached_tokens [N, block_size], the tokens before the row's position;
//     row_masks [S] where in mask_words [W] a row's mask begins, a bit for each token, or -1; out [S, V_local] float32. Grid (slices, S): a block copies a slice of a row, then counts its sequence's tokens that fall
//     into the slice, so that no counts are kept between steps or in device memory.
// Defines: SCALAR, VEC (divides V_local), NUM_THREADS, SLICE (a multiple of VEC), SAMPLING_STRUCT.
// Limits: 4 SLICE bytes of shared memory a block; 2^31 tokens a sequence.
// Reference: phalanx.runtime.sampling.adjust.adjust_logits, exactly for logits of float32.
#include "launch.cuh"
#include "sampling_record.cuh"

struct TokenBias {
    int token;
    float bias;
    int until;
    int num_before;
};

constexpr unsigned int IN_PROMPT = 1u << 31;

constexpr float LARGEST = 3.4028235e38f;
constexpr float BAN = -1e30f;  // no logit is biased below it: phalanx.runtime.sampling.biases

__device__ __forceinline__ float masked(float value, int token, int vocab_size, const int* mask) {
    if (mask == nullptr || token >= vocab_size || (mask[token / 32] >> token % 32 & 1)) return value;
    return fabsf(value) <= LARGEST ? BAN : value;  // a logit that is not finite still shows
}

// The tokens of one sequence, by its row of the block tables.
struct History {
    const int *table, *cached_tokens;
    int block_size;

    __device__ __forceinline__ int token(int position) const {
        return cached_tokens[static_cast<int64>(table[position / block_size]) * block_size + position % block_size];
    }
};

// Whether entry `at` counts where the token at `position` is chosen: in time, and after the tokens that must come before it, all of
// them of the output.
__device__ __forceinline__ bool counts_at(const TokenBias* list, int at, int position, int num_prompt, const History& history) {
    const TokenBias entry = list[at];
    if (position >= entry.until || position - entry.num_before < num_prompt) return false;
    for (int i = 1; i <= entry.num_before; ++i)
        if (history.token(position - i) != list[at + i].token) return false;
    return true;
}

// counts[column] = times that the token occurs in the output, and IN_PROMPT if it occurs in the prompt.
__device__ __forceinline__ void count_tokens(unsigned int* counts, const History& history, int length, int num_prompt,
                                             int first_token, int num_tokens) {
    for (int i = threadIdx.x; i < num_tokens; i += NUM_THREADS) counts[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < length; i += NUM_THREADS) {
        const int column = history.token(i) - first_token;
        if (column < 0 || column >= num_tokens) continue;
        if (i < num_prompt) atomicOr(&counts[column], IN_PROMPT); else atomicAdd(&counts[column], 1u);
    }
    __syncthreads();
}

__device__ __forceinline__ float penalised(float value, unsigned int count, const Sampling& record) {
    const float repetition = record.repetition_penalty;
    if (repetition != 0.0f) value = value > 0.0f ? value / repetition : __fmul_rn(value, repetition);
    const unsigned int generated = count & ~IN_PROMPT;
    if (generated == 0) return value;
    value = __fadd_rn(value, -__fmul_rn(record.frequency_penalty, static_cast<float>(generated)));
    return __fadd_rn(value, -record.presence_penalty);
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
adjust_logits(const scalar* __restrict__ logits, const Sampling* records, const int* positions,
              const TokenBias* __restrict__ biases, const int* __restrict__ block_tables,
              const int* __restrict__ cached_tokens, const int* row_masks, const int* __restrict__ mask_words,
              float* out, int part_size, int vocab_start, int vocab_size, int max_biases,
              int max_blocks_per_seq, int block_size) {
    let_next_start();
    wait_for_previous();
    __shared__ unsigned int counts[SLICE];
    const int row = blockIdx.y, position = positions[row];
    const Sampling record = records[row];
    const int* const mask = row_masks[row] < 0 ? nullptr : mask_words + row_masks[row];
    const int first = blockIdx.x * SLICE, end = min(first + SLICE, part_size);
    const scalar* const from = logits + static_cast<int64>(row) * part_size;
    float* const to = out + static_cast<int64>(row) * part_size;
    for (int at = first + threadIdx.x * VEC; at < end; at += NUM_THREADS * VEC) {
        float value[VEC];
        load(from + at, value);
#pragma unroll
        for (int i = 0; i < VEC; ++i) to[at + i] = masked(value[i], vocab_start + at + i, vocab_size, mask);
    }
    const int64 sequence = record.seq_index;
    const History history = {block_tables + sequence * max_blocks_per_seq, cached_tokens, block_size};
    if (record.num_biases != 0) {
        __syncthreads();
        const TokenBias* const list = biases + sequence * max_biases;
        for (int i = threadIdx.x; i < record.num_biases; i += NUM_THREADS) {
            const int token = list[i].token, column = token - vocab_start;
            if (column < first || column >= end || !counts_at(list, i, position, record.num_prompt, history)) continue;
            float value[1];
            load(from + column, value);
            value[0] = masked(value[0], token, vocab_size, mask);
            for (int j = 0; j < record.num_biases; ++j)
                if (list[j].token == token && counts_at(list, j, position, record.num_prompt, history)) value[0] += list[j].bias;
            to[column] = value[0] < BAN && value[0] >= -LARGEST ? BAN : value[0];
        }
    }
    if (record.repetition_penalty == 0.0f && record.presence_penalty == 0.0f && record.frequency_penalty == 0.0f) return;
    count_tokens(counts, history, position, record.num_prompt, vocab_start + first, end - first);
    for (int i = threadIdx.x; i < end - first; i += NUM_THREADS)
        if (counts[i] != 0) to[first + i] = penalised(to[first + i], counts[i], record);
}
