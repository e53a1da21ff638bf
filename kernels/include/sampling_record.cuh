// SPDX-License-Identifier: Apache-2.0
// How one row samples: the bits of phalanx.runtime.step.ADMISSION, whose members come from the table of sampling fields.
// Defines: SAMPLING_STRUCT, "int seq_index; float temperature; ...".
#pragma once
#include "dtype.cuh"

struct Sampling {
    SAMPLING_STRUCT
};

__device__ __forceinline__ uint64 seed_of(const Sampling& sampling) {
    return static_cast<uint64>(sampling.seed_high) << 32 | sampling.seed_low;
}
