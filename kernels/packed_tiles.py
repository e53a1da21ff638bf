# SPDX-License-Identifier: Apache-2.0
"""Products of packed weights for many tokens, whose codes become operands in registers. Enqueues on the current stream; does not wait.

The kernel is that of experts, with one of them: nothing is unpacked to memory, and tensor cores run at the speed of `mma`, not of Hopper's `wgmma`. So
it is fastest between the few tokens for which weights are streamed and the many for which unpacking is cheap beside the product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from phalanx.kernels.arrays import Array, Defines, ceil_div, require, scalar_name
from phalanx.kernels.attention_tiling import shared_bytes_per_multiprocessor
from phalanx.kernels.library import Library
from phalanx.kernels.packed import SMALLEST_GROUP, PackedWeight, check_packed, packed_defines, parse_layout
from phalanx.parallel.errors import ExecutorError

__all__ = [
    "PACKED_TILES", "TILE_WORDS", "PackedTiles", "gemm_packed_tiles", "launch_tiles", "packed_tiles_take", "token_tiles",
]  # fmt: skip

TILE_WORDS = 4
"""Integers that describe a tile: expert, first and last + 1 row, unused."""

_TILE_COLUMNS, _TILE_DEPTH = 128, 64
_MOST_STAGES = 4
_RESERVED_BYTES = 2048
_LANE_ELEMENTS = 8
_FEWEST_TOKENS = 17


@dataclass(frozen=True, slots=True)
class PackedTiles:
    """How a product is cut: ``rows`` tokens of a tile, 64 or 128."""

    rows: int


PACKED_TILES = (PackedTiles(64), PackedTiles(128))


def packed_tiles_take(num_tokens: int, columns: int, layout: str) -> bool:
    """Whether `gemm_packed_tiles` computes such a product of 16-bit values, and may be worth it; ``layout``: see `PackedWeight`."""
    return (
        num_tokens >= _FEWEST_TOKENS and columns % _LANE_ELEMENTS == 0 and parse_layout(layout)[1] % SMALLEST_GROUP == 0
    )


def token_tiles(num_tokens: int, shape: PackedTiles) -> np.ndarray[Any, np.dtype[np.int32]]:
    """What `gemm_packed_tiles` takes: all tokens, in tiles of one expert."""
    first = np.arange(0, num_tokens, shape.rows, dtype=np.int32)
    zeros = np.zeros_like(first)
    return np.stack([zeros, first, np.minimum(first + shape.rows, num_tokens), zeros], axis=1).astype(np.int32)


def gemm_packed_tiles(
    library: Library, x: Array, weight: PackedWeight, out: Array, tiles: Array, shape: PackedTiles
) -> None:
    """``out = x @ weight.T``. x [T, I], out [T, O], of 16 bits; weight [O, I]; tiles: `token_tiles` on the device.

    Raises:
        ExecutorError: sizes or groups that the kernel does not take.
    """
    (num_tokens, in_features), out_features = x.shape, out.shape[1]
    if x.dtype.itemsize != 2 or not packed_tiles_take(num_tokens, in_features, weight.layout):
        raise ExecutorError(
            f"gemm_packed_tiles takes at least {_FEWEST_TOKENS} tokens of 16 bits, columns in multiples of {_LANE_ELEMENTS} and groups of "
            f"{SMALLEST_GROUP}; this is {num_tokens} x {in_features} {x.dtype.name} by {weight.layout}"
        )
    require("x", x, (num_tokens, in_features), x)
    require("out", out, (num_tokens, out_features), x)
    require("tiles", tiles, (ceil_div(num_tokens, shape.rows), TILE_WORDS), "int32")
    check_packed(weight, (out_features, in_features))
    defines: Defines = packed_defines(weight.kind, weight.group, weight.zero is not None) | {
        "SCALAR": scalar_name(x), "GATED": 0, "ACTIVATION": "silu", "GATHERS": 0, "TOP_K": 1,
    }  # fmt: skip
    sizes = np.int32(out_features), np.int32(out_features), np.int32(in_features)
    arguments = (x, weight.codes, weight.scale, weight.zero, None, tiles, out, *sizes)
    launch_tiles(library, arguments, (tiles.shape[0], out_features), defines, shape.rows)


def launch_tiles(
    library: Library, arguments: tuple[Any, ...], grid: tuple[int, int], defines: Defines, height: int
) -> None:
    """Launch ``experts_tiles.cu`` with as many stages as the shared memory of a block holds; ``grid``: tiles and outputs."""
    bits = {0: 16, 4: 4}.get(int(defines["CODES"]), 8)
    stage_bytes = height * 2 * _TILE_DEPTH + _TILE_COLUMNS * _TILE_DEPTH * bits // 8
    available = shared_bytes_per_multiprocessor(library.architecture) - _RESERVED_BYTES
    blocks = 2 if available // 2 >= 3 * stage_bytes + _RESERVED_BYTES else 1
    stages = min(_MOST_STAGES, (available // blocks - _RESERVED_BYTES) // stage_bytes)
    shared_bytes = stages * stage_bytes
    kernel = library.function(
        "experts_tiles", "multiply_tiles", shared_bytes, ROWS=height, STAGES=stages,
        SHARED_BYTES=shared_bytes, MIN_BLOCKS=blocks, BFLOAT16=int(defines["SCALAR"] == "__nv_bfloat16"), KV_FP8=0, **defines,
    )  # fmt: skip
    outputs = _TILE_COLUMNS // (2 if defines["GATED"] else 1)
    kernel((grid[0], ceil_div(grid[1], outputs)), (256,), arguments, shared_mem=shared_bytes)
