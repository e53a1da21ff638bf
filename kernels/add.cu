// SPDX-License-Identifier: Apache-2.0
// Element by element sum, for the places where no fused kernel takes the addition along.
// Shapes: x, y, out [num_vectors * VEC]; out may be x or y.
// Defines: SCALAR, VEC, NUM_THREADS. One thread a vector.
// Reference: x + y in float32, rounded once.
#include "dtype.cuh"

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
add(const scalar* x, const scalar* y, scalar* out, int64 num_vectors) {
    const int64 at = static_cast<int64>(blockIdx.x) * NUM_THREADS + threadIdx.x;
    if (at >= num_vectors) return;
    float value[VEC], other[VEC];
    load(x + at * VEC, value);
    load(y + at * VEC, other);
#pragma unroll
    for (int i = 0; i < VEC; ++i) value[i] += other[i];
    store(out + at * VEC, value);
}
