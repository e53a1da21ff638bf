// SPDX-License-Identifier: Apache-2.0
// Attention over paged keys and values in plain float32 arithmetic, for checking: float32 pages, no tensor cores, slow.
//
// Arguments as for attention_decode.cu and attention_prefill.cu, but float32 elements. One block computes one head of one
// token: rows [first_row(num_seqs_and_decodes), end_row(num_seqs_and_decodes)) of the step, those of decode or those of prefill as `decode` says.
//
// What is odd: the block searches cu_seqlens_q for its sequence, so the grid is only [max tokens, H]. Each warp takes every
// fourth key, its lanes share the head's dims; running softmax per warp, merged at the end.
//
// Needs sm_80. Parameters: HEAD_DIM (<= 256), BLOCK_SIZE, NUM_KV_HEADS, GROUP, WINDOW, SOFT_CAP, ALIBI, CAUSAL, PREFIX.
#include "launch.cuh"

constexpr int WARPS = 4;
constexpr int DIMS_PER_LANE = (HEAD_DIM + 31) / 32;
#define NEGATIVE_INFINITY __int_as_float(0xff800000)

struct Softmax {
    float maximum = NEGATIVE_INFINITY, sum = 0.0f, out[DIMS_PER_LANE] = {};

    __device__ void add(float score, float weight, const float (&values)[DIMS_PER_LANE]) {
        const float new_maximum = fmaxf(maximum, score);
        if (new_maximum == NEGATIVE_INFINITY) return;
        const float keep = expf(maximum - new_maximum), take = expf(score - new_maximum);
        sum = sum * keep + weight * take;
        for (int i = 0; i < DIMS_PER_LANE; ++i) out[i] = out[i] * keep + values[i] * take;
        maximum = new_maximum;
    }
};

__device__ int sequence_of(const int* cu_seqlens_q, int num_seqs, int row) {
    int low = 0, high = num_seqs - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (cu_seqlens_q[middle] <= row)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) attention_float32(
    const float* q, long long query_stride, const float* k_pages, const float* v_pages, float* out, const int* cu_seqlens_q,
    const int* seq_lens, const int* seq_indices, const int* block_tables, int max_blocks, const int* num_seqs_and_decodes,
    const float* alibi_slopes, const int* prefix_lens, float scale, float soft_cap, int window, int decode) {
    __shared__ float shared_out[WARPS][HEAD_DIM], shared_maximum[WARPS], shared_sum[WARPS];
    let_next_start();
    wait_for_previous();
    const int row = blockIdx.x, head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int num_seqs = num_seqs_and_decodes[0], num_decode = num_seqs_and_decodes[1];
    const bool is_decode_row = row < num_decode;
    if (row >= cu_seqlens_q[num_seqs] || is_decode_row != (decode != 0)) return;

    const int seq = sequence_of(cu_seqlens_q, num_seqs, row);
    const int seq_len = seq_lens[seq];
    const int position = seq_len - cu_seqlens_q[seq + 1] + row;
    const int* table = block_tables + static_cast<long long>(seq_indices[seq]) * max_blocks;
    const float* query = q + row * query_stride + head * HEAD_DIM;
    Softmax softmax;
    const int first_key = WINDOW ? max(0, position - window + 1) : 0;
    const int visible = PREFIX ? max(position + 1, min(prefix_lens[row], seq_len)) : position + 1;
    for (int key = first_key + warp; key < (CAUSAL ? visible : seq_len); key += WARPS) {
        const long long page_row = (static_cast<long long>(table[key / BLOCK_SIZE]) * NUM_KV_HEADS + head / GROUP) * BLOCK_SIZE + key % BLOCK_SIZE;
        float product = 0.0f, values[DIMS_PER_LANE];
        for (int i = 0; i < DIMS_PER_LANE; ++i) {
            const int dim = i * 32 + lane;
            product += dim < HEAD_DIM ? query[dim] * k_pages[page_row * HEAD_DIM + dim] : 0.0f;
            values[i] = dim < HEAD_DIM ? v_pages[page_row * HEAD_DIM + dim] : 0.0f;
        }
        for (int distance = 16; distance > 0; distance /= 2) product += __shfl_xor_sync(~0u, product, distance);
        float score = product * scale;
        if (SOFT_CAP) score = soft_cap * tanhf(score / soft_cap);
        if (ALIBI) score += alibi_slopes[head] * (key - position);
        softmax.add(score, 1.0f, values);
    }

    for (int i = 0; i < DIMS_PER_LANE; ++i)
        if (i * 32 + lane < HEAD_DIM) shared_out[warp][i * 32 + lane] = softmax.out[i];
    if (lane == 0) {
        shared_maximum[warp] = softmax.maximum;
        shared_sum[warp] = softmax.sum;
    }
    __syncthreads();
    if (warp > 0) return;
    Softmax total;
    for (int other = 0; other < WARPS; ++other) {
        float values[DIMS_PER_LANE];
        for (int i = 0; i < DIMS_PER_LANE; ++i) values[i] = i * 32 + lane < HEAD_DIM ? shared_out[other][i * 32 + lane] : 0.0f;
        total.add(shared_maximum[other], shared_sum[other], values);
    }
    float* result = out + (static_cast<long long>(row) * NUM_KV_HEADS * GROUP + head) * HEAD_DIM;
    for (int i = 0; i < DIMS_PER_LANE; ++i)
        if (i * 32 + lane < HEAD_DIM) result[i * 32 + lane] = total.out[i] / total.sum;
}
