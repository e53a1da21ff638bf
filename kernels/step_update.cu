// SPDX-License-Identifier: Apache-2.0
// Step bookkeeping on the device: from the packed step plan and each sequence's last sampled token to the arrays that the other
// kernels of the step read. A captured graph contains these kernels, so a replay needs nothing but a new plan in `plan`.
//
// The plan is phalanx.runtime.step.StepPlan.pack(), int32 words:
//     header [7] = step id, S, T, M, A, G, K; seq_indices, starts, num_scheduled_tokens, samples [S]; token_ids [T]; new_blocks [M, 3];
//     admissions [A, ADMISSION_WORDS]; prompt_rows [G]; prompt_targets [G].
// apply_plan (one block): block tables and sampling parameters take over the plan's changes;
//     cu_seqlens [S + 1], seq_lens [S], seq_indices [S], num_seqs_and_decodes [2] = (S, sequences with one token),
//     logit_rows [num_logit_rows] = last row of each sampling sequence, then prompt rows, then -1;
//     and for each of these rows: row_seq_indices, row_positions = sequence and position of the token to sample (-1 where nothing
//     is); row_targets = token whose log-probability a prompt row wants, -1 elsewhere; row_sampling = its sequence's
//     admission record (all bits 0, which is greedy, where nothing is sampled).
// fill_tokens (one thread a row): token_ids, positions, slot_mapping [num_rows]; rows past T are padding: token 0,
//     position 0, slot -1 (nothing is written to the cache for them).
// store_tokens (one thread a row): last_tokens[seq_index] = token_ids[row]; rows that sample nothing get their target instead,
//     so that token_ids then names the token of every row whose log-probability may be wanted.
// Defines: NUM_THREADS (a multiple of 32, at most 1024), BLOCK_SIZE (P), ADMISSION_WORDS (of an admission record, whose first word is
//     the sequence's index).
// Limits: sequences with one token come first; new blocks are applied before any slot mapping is computed.
// Reference: StepPlan.cu_seqlens, positions, sample_rows, logit_rows and BatchState.apply in NumPy, exactly.

constexpr int HEADER_WORDS = 7;

// What the samplers read, one element for each row with logits; `sampling` has ADMISSION_WORDS of them.
struct Rows {
    int *seq_indices, *positions, *targets, *sampling;
};

constexpr int NUM_WARPS = NUM_THREADS / 32;
constexpr int PENDING_TOKEN = -1;

struct Plan {
    int num_seqs, num_tokens, num_new_blocks, num_admissions, num_prompt_rows;
    const int *seq_indices, *starts, *num_scheduled_tokens, *samples, *token_ids, *new_blocks, *admissions, *prompt_rows, *prompt_targets;
};

__device__ __forceinline__ Plan read_plan(const int* words) {
    Plan plan;
    plan.num_seqs = words[1];
    plan.num_tokens = words[2];
    plan.num_new_blocks = words[3];
    plan.num_admissions = words[4];
    plan.num_prompt_rows = words[5];
    plan.seq_indices = words + HEADER_WORDS;
    plan.starts = plan.seq_indices + plan.num_seqs;
    plan.num_scheduled_tokens = plan.starts + plan.num_seqs;
    plan.samples = plan.num_scheduled_tokens + plan.num_seqs;
    plan.token_ids = plan.samples + plan.num_seqs;
    plan.new_blocks = plan.token_ids + plan.num_tokens;
    plan.admissions = plan.new_blocks + 3 * plan.num_new_blocks;
    plan.prompt_rows = plan.admissions + ADMISSION_WORDS * plan.num_admissions;
    plan.prompt_targets = plan.prompt_rows + plan.num_prompt_rows;
    return plan;
}

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

// `sampling` is the sequence's admission record, whose first word is its index; null where nothing is sampled.
__device__ __forceinline__ void fill_row(const Rows& rows, int at, int position, int target, const int* sampling) {
    rows.seq_indices[at] = sampling ? sampling[0] : -1;
    rows.positions[at] = position;
    rows.targets[at] = target;
#pragma unroll
    for (int word = 0; word < ADMISSION_WORDS; ++word)
        rows.sampling[at * ADMISSION_WORDS + word] = sampling ? sampling[word] : 0;
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
apply_plan(const int* __restrict__ words, int* block_tables, int* sampling, int* __restrict__ cu_seqlens,
           int* __restrict__ seq_lens, int* __restrict__ seq_indices, int* __restrict__ num_seqs_and_decodes, int* __restrict__ logit_rows,
           int* row_seq_indices, int* row_positions, int* row_targets, int* row_sampling, int max_blocks_per_seq,
           int num_logit_rows) {
    const Plan plan = read_plan(words);
    const Rows rows = {row_seq_indices, row_positions, row_targets, row_sampling};
    for (int i = threadIdx.x; i < plan.num_new_blocks; i += NUM_THREADS) {
        const int* change = plan.new_blocks + 3 * i;
        block_tables[static_cast<long long>(change[0]) * max_blocks_per_seq + change[1]] = change[2];
    }
    for (int i = threadIdx.x; i < plan.num_admissions * ADMISSION_WORDS; i += NUM_THREADS) {
        const int* admission = plan.admissions + i / ADMISSION_WORDS * ADMISSION_WORDS;
        sampling[admission[0] * ADMISSION_WORDS + i % ADMISSION_WORDS] = admission[i % ADMISSION_WORDS];
    }

    int first_row = 0, num_sampled = 0, num_decodes = 0;
    for (int base = 0; base < plan.num_seqs; base += NUM_THREADS) {
        const int i = base + threadIdx.x;
        const bool is_sequence = i < plan.num_seqs;
        const int count = is_sequence ? plan.num_scheduled_tokens[i] : 0;
        const int samples = is_sequence ? plan.samples[i] > 0 : 0;
        int total_rows, total_samples, total_decodes;
        const int row = first_row + exclusive_scan(count, total_rows);
        const int at = num_sampled + exclusive_scan(samples, total_samples);
        exclusive_scan(count == 1, total_decodes);
        if (is_sequence) {
            cu_seqlens[i] = row;
            seq_lens[i] = plan.starts[i] + count;
            seq_indices[i] = plan.seq_indices[i];
            if (samples) {
                logit_rows[at] = row + count - 1;
                fill_row(rows, at, plan.starts[i] + count, -1, sampling + plan.seq_indices[i] * ADMISSION_WORDS);
            }
        }
        first_row += total_rows;
        num_sampled += total_samples;
        num_decodes += total_decodes;
    }
    if (threadIdx.x == 0) {
        cu_seqlens[plan.num_seqs] = first_row;
        num_seqs_and_decodes[0] = plan.num_seqs;
        num_seqs_and_decodes[1] = num_decodes;
    }
    for (int i = num_sampled + threadIdx.x; i < num_logit_rows; i += NUM_THREADS) {
        const int prompt = i - num_sampled;
        const bool is_prompt = prompt < plan.num_prompt_rows;
        logit_rows[i] = is_prompt ? plan.prompt_rows[prompt] : -1;
        fill_row(rows, i, 0, is_prompt ? plan.prompt_targets[prompt] : -1, nullptr);
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
fill_tokens(const int* __restrict__ words, const int* __restrict__ block_tables, const int* __restrict__ cu_seqlens,
            const int* __restrict__ num_seqs_and_decodes, const int* __restrict__ last_tokens, int* __restrict__ token_ids,
            int* __restrict__ positions, int* __restrict__ slot_mapping, int max_blocks_per_seq, int num_rows) {
    const int row = blockIdx.x * NUM_THREADS + threadIdx.x;
    if (row >= num_rows) return;
    const Plan plan = read_plan(words);
    if (row >= plan.num_tokens) {
        token_ids[row] = 0;
        positions[row] = 0;
        slot_mapping[row] = -1;
        return;
    }
    int sequence = row;
    if (row >= num_seqs_and_decodes[1]) {  // the last sequence that starts at or before this row
        int low = num_seqs_and_decodes[1], high = plan.num_seqs;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (cu_seqlens[middle] <= row) low = middle; else high = middle;
        }
        sequence = low;
    }
    const int seq_index = plan.seq_indices[sequence];
    const int position = plan.starts[sequence] + row - cu_seqlens[sequence];
    const int token = plan.token_ids[row];
    token_ids[row] = token == PENDING_TOKEN ? last_tokens[seq_index] : token;
    positions[row] = position;
    const int block = block_tables[static_cast<long long>(seq_index) * max_blocks_per_seq + position / BLOCK_SIZE];
    slot_mapping[row] = block * BLOCK_SIZE + position % BLOCK_SIZE;
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
store_tokens(int* __restrict__ token_ids, const int* __restrict__ row_seq_indices, const int* __restrict__ row_targets,
             int* __restrict__ last_tokens, int num_rows) {
    const int row = blockIdx.x * NUM_THREADS + threadIdx.x;
    if (row >= num_rows) return;
    if (row_seq_indices[row] >= 0) last_tokens[row_seq_indices[row]] = token_ids[row];
    else token_ids[row] = row_targets[row];
}
