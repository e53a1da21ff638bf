// SPDX-License-Identifier: Apache-2.0
// Step bookkeeping on the device: from the packed step plan and each sequence's last sampled token to the arrays that the
// other kernels of the step read. A captured graph contains these kernels, so a replay needs nothing but a new plan in `plan`.
//
// The plan is int32 words in the layout of phalanx.runtime.step.STEP_LAYOUT, from which the defines AT_* (index of a header
// word) and *_WORDS (words of an entry) are made, and ADMISSION_PREFIX, the word of an admission that counts its prefix; phalanx.runtime.step.StepPlan says what its parts mean.
// apply_plan (one block): block tables, sampling parameters and token biases take over the plan's changes;
//     cu_seqlens [S + 1], seq_lens [S], seq_indices [S], num_seqs_and_decodes [2] = (S, sequences with one token),
//     logit_rows [num_logit_rows] = the plan's rows that sample, then those that score, then -1;
//     and for each of these rows: row_seq_indices, row_positions = sequence and position of the token to sample (-1 where
//     nothing is); row_targets = token whose log-probability is wanted, -1 elsewhere; row_masks = where in the plan the row's token
//     mask begins, -1 elsewhere; row_sampling = its sequence's admission
//     record, whose first word is the sequence (all bits 0, which is greedy, where nothing is sampled).
// fill_tokens (one thread a row): token_ids, positions, slot_mapping, prefix_lens [num_rows]; rows past T are padding: token 0,
//     position 0, prefix 0, slot -1 (nothing is written to the cache for them); cached_tokens [N, P] = the token at each row's slot.
// store_tokens (one thread a row): last_tokens[seq_index] = token_ids[row] of the sequence's last row; rows that sample
//     nothing get their target instead, so that token_ids then names the token of every row whose log-probability may be
//     wanted.
// copy_blocks (grid: copies, parts of a block): pages[to] = pages[from] for each of the plan's copies.
// Defines: NUM_THREADS (a multiple of 32, at most 1024), BLOCK_SIZE (P), and the layout's.
// Limits: sequences with one token come first; new blocks are applied before any slot mapping is computed; rows of a
//     sequence that sample are neighbours.
// Reference: StepPlan.cu_seqlens, positions, sampling_seqs, sampled_positions and BatchState.apply in NumPy, exactly.

static_assert(NEW_BLOCKS_WORDS == 4 && COPIES_WORDS == 3 && BIASES_WORDS == 6, "entries of phalanx.runtime.step.STEP_LAYOUT");

// What the samplers read, one element for each row with logits; `sampling` has ADMISSIONS_WORDS of them.
struct Rows {
    int *seq_indices, *positions, *targets, *masks, *sampling;
};

constexpr int NUM_WARPS = NUM_THREADS / 32;

struct Plan {
    const int* words;

    __device__ __forceinline__ int number(int at) const { return words[at]; }
    __device__ __forceinline__ const int* section(int at) const { return words + words[at]; }
};

// Sums over the threads before this one; `total` is the sum over all.
__device__ __forceinline__ int exclusive_scan(int value, int& total) {
    __shared__ int of_warp[NUM_WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int sum = value;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, sum, offset);
        if (lane >= offset) sum += other;
    }
    if (lane == 31) of_warp[warp] = sum;
    __syncthreads();
    int before = 0;
    total = 0;
#pragma unroll
    for (int i = 0; i < NUM_WARPS; ++i) {
        before += i < warp ? of_warp[i] : 0;
        total += of_warp[i];
    }
    __syncthreads();
    return before + sum - value;
}

// The sequence that a row of the step belongs to: the last one that starts at or before it.
__device__ __forceinline__ int sequence_of(int row, const int* cu_seqlens, int num_seqs, int num_decodes) {
    if (row < num_decodes) return row;
    int low = num_decodes, high = num_seqs;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (cu_seqlens[middle] <= row) low = middle; else high = middle;
    }
    return low;
}

// `sampling` is the sequence's admission record, whose first word is its index; null where nothing is sampled.
__device__ __forceinline__ void fill_row(const Rows& rows, int at, int position, int target, const int* sampling) {
    rows.seq_indices[at] = sampling ? sampling[0] : -1;
    rows.positions[at] = position;
    rows.targets[at] = target;
    rows.masks[at] = -1;
#pragma unroll
    for (int word = 0; word < ADMISSIONS_WORDS; ++word)
        rows.sampling[at * ADMISSIONS_WORDS + word] = sampling ? sampling[word] : 0;
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
apply_plan(const int* __restrict__ words, int* block_tables, int* sampling, int* __restrict__ biases, int* cu_seqlens, int* __restrict__ seq_lens,
           int* __restrict__ seq_indices, int* __restrict__ num_seqs_and_decodes, int* __restrict__ logit_rows,
           int* row_seq_indices, int* row_positions, int* row_targets, int* row_masks, int* row_sampling, int max_num_seqs,
           int max_blocks_per_seq, int max_biases, int num_logit_rows) {
    const Plan plan = {words};
    const int num_seqs = plan.number(AT_NUM_SEQS), num_decodes = plan.number(AT_NUM_DECODES);
    const Rows outputs = {row_seq_indices, row_positions, row_targets, row_masks, row_sampling};
    for (int i = threadIdx.x; i < plan.number(AT_NUM_NEW_BLOCKS); i += NUM_THREADS) {
        const int* change = plan.section(AT_NEW_BLOCKS_AT) + NEW_BLOCKS_WORDS * i;
        const long long table = static_cast<long long>(change[0]) * max_num_seqs + change[1];
        block_tables[table * max_blocks_per_seq + change[2]] = change[3];
    }
    for (int i = threadIdx.x; i < plan.number(AT_NUM_ADMISSIONS) * ADMISSIONS_WORDS; i += NUM_THREADS) {
        const int* admission = plan.section(AT_ADMISSIONS_AT) + i / ADMISSIONS_WORDS * ADMISSIONS_WORDS;
        sampling[admission[0] * ADMISSIONS_WORDS + i % ADMISSIONS_WORDS] = admission[i % ADMISSIONS_WORDS];
    }
    for (int i = threadIdx.x; i < plan.number(AT_NUM_BIASES); i += NUM_THREADS) {
        const int* entry = plan.section(AT_BIASES_AT) + BIASES_WORDS * i;  // sequence, index, and the bias's four words
        int* const bias = biases + 4 * (static_cast<long long>(entry[0]) * max_biases + entry[1]);
#pragma unroll
        for (int word = 0; word < 4; ++word) bias[word] = entry[2 + word];
    }

    const int* const starts = plan.section(AT_STARTS_AT);
    const int* const num_scheduled_tokens = plan.section(AT_NUM_SCHEDULED_TOKENS_AT);
    int first_row = 0;
    for (int base = 0; base < num_seqs; base += NUM_THREADS) {
        const int i = base + threadIdx.x;
        const int count = i < num_seqs ? num_scheduled_tokens[i] : 0;
        int total_rows;
        const int row = first_row + exclusive_scan(count, total_rows);
        if (i < num_seqs) {
            cu_seqlens[i] = row;
            seq_lens[i] = starts[i] + count;
            seq_indices[i] = plan.section(AT_SEQ_INDICES_AT)[i];
        }
        first_row += total_rows;
    }
    if (threadIdx.x == 0) {
        cu_seqlens[num_seqs] = first_row;
        num_seqs_and_decodes[0] = num_seqs;
        num_seqs_and_decodes[1] = num_decodes;
    }
    __syncthreads();

    const int* const rows = plan.section(AT_ROWS_AT);
    for (int i = threadIdx.x; i < num_logit_rows; i += NUM_THREADS) {
        const bool is_row = i < plan.number(AT_NUM_ROWS);
        logit_rows[i] = is_row ? rows[i] : -1;
        if (is_row && plan.section(AT_KINDS_AT)[i] == SAMPLE) {
            const int sequence = sequence_of(rows[i], cu_seqlens, num_seqs, num_decodes);
            const int position = starts[sequence] + rows[i] - cu_seqlens[sequence] + 1;
            const int seq_index = plan.section(AT_SEQ_INDICES_AT)[sequence];
            fill_row(outputs, i, position, -1, sampling + seq_index * ADMISSIONS_WORDS);
        } else {
            const int target = is_row ? plan.section(AT_TARGETS_AT)[i] : -1;
            fill_row(outputs, i, 0, target, nullptr);
        }
    }
    const int num_masks = plan.number(AT_NUM_MASKS);
    if (num_masks == 0) return;
    __syncthreads();
    const int mask_words = plan.number(AT_NUM_MASK_WORDS) / num_masks;
    for (int i = threadIdx.x; i < num_masks; i += NUM_THREADS)
        row_masks[plan.section(AT_MASKED_ROWS_AT)[i]] = plan.number(AT_MASKS_AT) + i * mask_words;
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
fill_tokens(const int* __restrict__ words, const int* __restrict__ block_tables, const int* __restrict__ sampling,
            const int* __restrict__ cu_seqlens, const int* __restrict__ last_tokens, int* __restrict__ token_ids,
            int* __restrict__ positions, int* __restrict__ slot_mapping, int* __restrict__ prefix_lens,
            int* __restrict__ cached_tokens, int max_blocks_per_seq, int num_rows) {
    const int row = blockIdx.x * NUM_THREADS + threadIdx.x;
    if (row >= num_rows) return;
    const Plan plan = {words};
    if (row >= plan.number(AT_NUM_TOKENS)) {
        token_ids[row] = 0;
        positions[row] = 0;
        slot_mapping[row] = -1;
        prefix_lens[row] = 0;
        return;
    }
    const int sequence = sequence_of(row, cu_seqlens, plan.number(AT_NUM_SEQS), plan.number(AT_NUM_DECODES));
    const int seq_index = plan.section(AT_SEQ_INDICES_AT)[sequence];
    const int position = plan.section(AT_STARTS_AT)[sequence] + row - cu_seqlens[sequence];
    const int token = plan.section(AT_TOKEN_IDS_AT)[row];
    const int known = token == PENDING_TOKEN ? last_tokens[seq_index] : token;
    const int block = block_tables[static_cast<long long>(seq_index) * max_blocks_per_seq + position / BLOCK_SIZE];
    const int slot = block * BLOCK_SIZE + position % BLOCK_SIZE;
    token_ids[row] = known;
    positions[row] = position;
    slot_mapping[row] = slot;
    prefix_lens[row] = sampling[seq_index * ADMISSIONS_WORDS + ADMISSION_PREFIX];
    cached_tokens[slot] = known;
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
store_tokens(int* __restrict__ token_ids, const int* __restrict__ row_seq_indices, const int* __restrict__ row_targets,
             int* __restrict__ last_tokens, int num_rows) {
    const int row = blockIdx.x * NUM_THREADS + threadIdx.x;
    if (row >= num_rows) return;
    const int seq_index = row_seq_indices[row];
    if (seq_index < 0)
        token_ids[row] = row_targets[row];
    else if (row + 1 == num_rows || row_seq_indices[row + 1] != seq_index)
        last_tokens[seq_index] = token_ids[row];
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
copy_blocks(const int* __restrict__ words, uint4* __restrict__ pages, int block_vectors) {
    const Plan plan = {words};
    const int* const copy = plan.section(AT_COPIES_AT) + COPIES_WORDS * blockIdx.x;
    const uint4* const source = pages + static_cast<long long>(copy[1]) * block_vectors;
    uint4* const destination = pages + static_cast<long long>(copy[2]) * block_vectors;
    for (int i = blockIdx.y * NUM_THREADS + threadIdx.x; i < block_vectors; i += gridDim.y * NUM_THREADS)
        destination[i] = source[i];
}
