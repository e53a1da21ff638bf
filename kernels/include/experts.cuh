// SPDX-License-Identifier: Apache-2.0
// Grouped products: rows sorted by expert, cut into tiles that each belong to one expert.
#pragma once

// Rows [first, stop) of the sorted order; expert -1 = there is no such tile in this step. One 16-byte load.
struct alignas(16) ExpertTile {
    int expert, first, stop, unused;
};
