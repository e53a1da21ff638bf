// SPDX-License-Identifier: Apache-2.0
// The stacked matrices of experts, as plain values or as codes of packed.cuh whose scales (and zero points) are [G, rows of the stack].
// Defines: those of packed.cuh; GROUP, HAS_ZERO (0 with plain values), GATED.
#pragma once
#include "experts.cuh"
#include "packed.cuh"

// One expert's matrix: out_features rows, or GATED as many gates and then ups; less than 4 GiB.
struct ExpertWeight {
    const unsigned char* values;
    const float* __restrict__ scale;
    const signed char* __restrict__ zero;
    uint32 row_bytes;
    int stacked_rows, out_features, in_features;

    // Of a stack of `stacked_rows`, of which `values`, `scale` and `zero` are the first.
    __device__ __forceinline__ ExpertWeight(const unsigned char* values, const float* scale, const signed char* zero, int stacked_rows,
                                            int out_features, int in_features, int expert)
        : row_bytes(CODES ? (in_features + CHUNK - 1) / CHUNK * CHUNK_BYTES : in_features * sizeof(scalar)), stacked_rows(stacked_rows),
          out_features(out_features), in_features(in_features) {
        const int first_row = expert * (GATED ? 2 : 1) * out_features;
        this->values = values + static_cast<int64>(first_row) * row_bytes;
        this->scale = scale + first_row;
        this->zero = zero + first_row;
    }

    // The row of an output, or of its up; of the last output where there is no such output.
    __device__ __forceinline__ int row(int output, bool is_up) const { return min(output, out_features - 1) + (is_up ? out_features : 0); }

    __device__ __forceinline__ const unsigned char* bytes_of(int row) const { return values + static_cast<uint32>(row) * row_bytes; }

    // Where the scale and the zero point of a row's group are.
    __device__ __forceinline__ uint32 scale_at(uint32 group, int row) const { return group * static_cast<uint32>(stacked_rows) + row; }

    // What a sum of products of codes is multiplied by: the scale of whole rows, if there is one.
    __device__ __forceinline__ float row_scale(int row) const { return CODES && GROUP == 0 ? scale[row] : 1.0f; }
};
