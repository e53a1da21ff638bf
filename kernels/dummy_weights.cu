// SPDX-License-Identifier: Apache-2.0
// Seeded random weights made where they are needed: a slice of a tensor whose every element is a hash of where it stands.
// Shapes: out [num_rows, num_columns] with rows out_pitch elements apart, a region of a weight in [out, in] orientation; its
//     first element is element (first_row, first_column) of the stored tensor [.., stored_columns], the stored slice being
//     the region or, with TRANSPOSED, its transpose.
// Defines: SCALAR (of out), STORED (the type that values are rounded to first; both may be e4m3), TRANSPOSED, NUM_THREADS. Grid: any.
// Reference: phalanx.checkpoints.dummy, whose formula this is, bit for bit.
#include "fp8.cuh"

struct e4m3 {
    unsigned char bits;
};

__device__ __forceinline__ float to_float(e4m3 value) { return e4m3_value(value.bits); }
__device__ __forceinline__ void assign(e4m3& to, float value) { to.bits = static_cast<unsigned char>(e4m3_pair(value, 0.0f)); }

#include "dtype.cuh"  // after them: what it defines for SCALAR calls them

__device__ __forceinline__ uint32 mix(uint32 h) {
    h ^= h >> 16;
    h *= 0x7feb352du;
    h ^= h >> 15;
    h *= 0x846ca68bu;
    return h ^ h >> 16;
}

__device__ __forceinline__ float as_stored(float value) {
    STORED stored;
    assign(stored, value);
    return to_float(stored);
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
dummy_weights(scalar* __restrict__ out, int64 out_pitch, int64 num_rows, int64 num_columns, int64 stored_columns,
              int64 first_row, int64 first_column, uint32 key0, uint32 key1, float mean, float width) {
    const int64 num_elements = num_rows * num_columns;
    for (int64 i = static_cast<int64>(blockIdx.x) * NUM_THREADS + threadIdx.x; i < num_elements;
         i += static_cast<int64>(gridDim.x) * NUM_THREADS) {
        const int64 row = i / num_columns, column = i % num_columns;
        const int64 stored_row = first_row + (TRANSPOSED ? column : row);
        const int64 stored_column = first_column + (TRANSPOSED ? row : column);
        const uint64 flat = static_cast<uint64>(stored_row * stored_columns + stored_column);
        const uint32 low = mix(static_cast<uint32>(flat) ^ key0);
        const uint32 h = mix(low + (static_cast<uint32>(flat >> 32) ^ key1));
        const float uniform = static_cast<float>(static_cast<int>(h >> 8) - (1 << 23)) * 0x1p-23f;
        assign(out[row * out_pitch + column], as_stored(__fadd_rn(mean, __fmul_rn(width, uniform))));
    }
}
