// SPDX-License-Identifier: Apache-2.0
// Sixteen bytes in registers, word by word.
#pragma once

struct Words {
    unsigned int at[4];
};

__device__ __forceinline__ Words words(uint4 bits) { return {{bits.x, bits.y, bits.z, bits.w}}; }
