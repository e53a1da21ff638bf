// SPDX-License-Identifier: Apache-2.0
// The gated activation as 8-bit codes: f(gate) * up rounded to storage, then one scale a row, which stays in registers.
// Shapes: x = [gate | up] [T, 2F]; codes [T, F] bytes; scale [T] float32. One block a row.
// Defines: SCALAR, FEATURES (F), VEC (divides F), NUM_THREADS, ACTIVATION (one of activation.cuh),
//     QUANTIZED (1 = fp8, 2 = int8), STATIC_SCALE.
// Reference: activation.cu's gated, then quantize_rows.cu: equal bit for bit.
#include "activation.cuh"
#include "dtype.cuh"
#include "launch.cuh"
#include "quantize.cuh"

constexpr int CHUNK = NUM_THREADS * VEC, NUM_CHUNKS = (FEATURES + CHUNK - 1) / CHUNK;
constexpr int AHEAD = 4;  // chunks of gate and up that a thread has on their way before it computes

__device__ __forceinline__ Packed<VEC> gated(const Packed<VEC>& gate, const Packed<VEC>& up) {
    float value[VEC], factor[VEC];
    unpack(gate, value);
    unpack(up, factor);
#pragma unroll
    for (int i = 0; i < VEC; ++i) value[i] = ACTIVATION(value[i]) * factor[i];
    return pack(value);
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
gated_quantized(const scalar* __restrict__ x, unsigned char* __restrict__ codes, float* __restrict__ scale, float bound) {
    let_next_start();
    wait_for_previous();
    const int64 row = blockIdx.x;
    Packed<VEC> value[NUM_CHUNKS];
    LargestMagnitude largest;
#pragma unroll
    for (int first = 0; first < NUM_CHUNKS; first += AHEAD) {
        Packed<VEC> up[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD && first + i < NUM_CHUNKS; ++i) {
            const int at = (first + i) * CHUNK + threadIdx.x * VEC;
            value[first + i] = is_in_row<FEATURES, CHUNK>(first + i, at) ? load_packed<VEC>(x + row * 2 * FEATURES + at) : Packed<VEC>{};
            up[i] = is_in_row<FEATURES, CHUNK>(first + i, at) ? load_packed<VEC>(x + row * 2 * FEATURES + FEATURES + at) : Packed<VEC>{};
        }
#pragma unroll
        for (int i = 0; i < AHEAD && first + i < NUM_CHUNKS; ++i) {
            value[first + i] = gated(value[first + i], up[i]);
            largest.add(value[first + i]);
        }
    }
    const RowScale own = block_row_scale<NUM_THREADS>(largest.bits(), bound);
    if (threadIdx.x == 0) scale[row] = own.scale;
#pragma unroll
    for (int chunk = 0; chunk < NUM_CHUNKS; ++chunk) {
        const int at = chunk * CHUNK + threadIdx.x * VEC;
        if (is_in_row<FEATURES, CHUNK>(chunk, at)) store_codes(codes + row * FEATURES + at, value[chunk], own.inverse);
    }
}
