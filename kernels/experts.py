# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts on the device: routing, grouped products, weighted sum. Enqueues on the current stream; does not wait.

How many rows an expert gets is known on the device only, so grids are as large as the number of rows can require, and
blocks without work end at once: every size is fixed by the shapes, and the calls can be captured. Which of three kernels
multiplies follows from shapes alone, so a token's result depends on how many tokens its step has, but not on which. (Where groups of
codes have scales, tiles round code times scale to the compute type, and the kernel that streams the weights scales float32 sums.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from phalanx.kernels.activation_names import ActivationName
from phalanx.kernels.arrays import Array, Defines, ceil_div, num_threads_for, require, scalar_name, vector_width
from phalanx.kernels.attention_tiling import shared_bytes_per_multiprocessor
from phalanx.kernels.library import Library
from phalanx.kernels.packed import SMALLEST_GROUP, PackedWeight, check_packed, packed_defines
from phalanx.kernels.product_sizes import codes_per_chunk
from phalanx.parallel.errors import ExecutorError

__all__ = [
    "MAX_CHOICES", "MAX_EXPERTS", "ExpertRows", "Routing", "combine", "grouped_product", "max_tiles", "route", "rows_per_tile",
]  # fmt: skip

MAX_EXPERTS = 1024
"""Experts of a layer: `sort` has a thread for each."""

MAX_CHOICES = 32
"""Experts that a token takes: a warp has a lane for each."""

_STREAMED_ROWS = 16
_TILE_WORDS = 4
_ROUTE_WARPS = 4
_MOST_ROUTED_TOGETHER = 8
_SORT_THREADS = 1024
_STREAM_WARPS = 8
_PLAIN_WARPS = 4
_TILE_COLUMNS, _TILE_DEPTH = 128, 64
_MOST_STAGES = 4
_RESERVED_BYTES = 2048
_LANE_ELEMENTS = 8
_BLOCK_ROWS = 16
_PLAIN_CHUNK = 32


@dataclass(frozen=True, slots=True)
class Routing:
    """What a router decides.

    Attributes:
        num_experts, top_k: E, and how many of them each token takes.
        renormalise: a token's shares add up to 1.
        experts: the numbers of those that this rank holds.
    """

    num_experts: int
    top_k: int
    renormalise: bool
    experts: range


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """Pairs (token, choice) sorted by expert; int32 but for ``shares``.

    Attributes:
        logits: ``[T, E]`` float32.
        ids, shares: ``[T, top_k]`` experts of each token, most probable first, and their weights in float32.
        order: ``[T top_k]`` the pair at each sorted position.
        positions: ``[T, top_k]`` the sorted position of each pair; -1 = not computed on this rank.
        tiles: ``[max_tiles, 4]`` expert, first and last + 1 position; expert -1 = unused.
    """

    logits: Array
    ids: Array
    shares: Array
    order: Array
    positions: Array
    tiles: Array

    @classmethod
    def allocate(cls, array: Any, num_tokens: int, routing: Routing, itemsize: int) -> ExpertRows:
        """Take every array from ``array(shape, dtype)``; ``itemsize`` is that of the rows to be multiplied."""
        pairs = (num_tokens, routing.top_k)
        tiles = max_tiles(num_tokens, routing, itemsize)
        return cls(
            array((num_tokens, routing.num_experts), np.float32), array(pairs, np.int32), array(pairs, np.float32),
            array((num_tokens * routing.top_k,), np.int32), array(pairs, np.int32), array((tiles, _TILE_WORDS), np.int32),
        )  # fmt: skip


def rows_per_tile(num_tokens: int, routing: Routing, itemsize: int) -> int:
    """Rows of a tile: as few as tensor cores take while experts have few each, then as many as keep them busy.

    float32 has no tensor cores here and always takes small tiles.
    """
    mean = num_tokens * routing.top_k / routing.num_experts
    if mean <= _STREAMED_ROWS or itemsize > 2:
        return _STREAMED_ROWS
    return 64 if mean <= 64 else 128


def max_tiles(num_tokens: int, routing: Routing, itemsize: int) -> int:
    """Tiles that any distribution of the rows over this rank's experts can need."""
    pairs = num_tokens * routing.top_k
    return min(pairs, len(routing.experts)) + pairs // rows_per_tile(num_tokens, routing, itemsize)


def route(library: Library, x: Array, router: Array, marks: Array, routing: Routing, rows: ExpertRows) -> None:
    """Choose each token's experts by softmax of ``x @ router.T`` in float32, and sort. x [T, D]; router [E, D]; marks [T].

    A token whose mark is negative takes none. Ties go to the lower number.

    Raises:
        ExecutorError: more experts than `MAX_EXPERTS`, or more choices than a warp has lanes.
    """
    num_tokens, features = x.shape
    if len(routing.experts) > MAX_EXPERTS or routing.top_k > MAX_CHOICES:
        raise ExecutorError(
            f"{len(routing.experts)} experts on a rank, {routing.top_k} for each token; at most {MAX_EXPERTS} and {MAX_CHOICES}"
        )
    require("x", x, (num_tokens, features), x)
    require("router", router, (routing.num_experts, features), x)
    require("marks", marks, (num_tokens,), "int32")
    tokens_each = min(_MOST_ROUTED_TOGETHER, 1 << (num_tokens - 1).bit_length())
    defines: Defines = {
        "SCALAR": scalar_name(x), "NUM_EXPERTS": routing.num_experts, "TOP_K": routing.top_k,
        "RENORMALISE": int(routing.renormalise), "FEATURES": features, "VEC": vector_width(x, features),
        "TOKENS": tokens_each, "FIRST": routing.experts.start, "NUM_LOCAL": len(routing.experts),
        "ROWS": rows_per_tile(num_tokens, routing, x.dtype.itemsize),
    }  # fmt: skip
    count, threads = np.int32(num_tokens), 32 * _ROUTE_WARPS
    library.function("experts_route", "router_logits", 0, **defines)(
        (ceil_div(routing.num_experts, _ROUTE_WARPS), ceil_div(num_tokens, tokens_each)), (threads,),
        (x, router, rows.logits, count),
    )  # fmt: skip
    library.function("experts_route", "choose", 0, **defines)(
        (ceil_div(num_tokens, _ROUTE_WARPS),), (threads,), (rows.logits, marks, rows.ids, rows.shares, count)
    )
    pairs, tiles = np.int32(num_tokens * routing.top_k), np.int32(rows.tiles.shape[0])
    library.function("experts_route", "sort", 0, **defines)(
        (1,), (_SORT_THREADS,), (rows.ids, rows.order, rows.positions, rows.tiles, pairs, tiles)
    )


def grouped_product(
    library: Library, x: Array, weight: Array | PackedWeight, out: Array, routing: Routing, rows: ExpertRows, *,
    gathers: bool = False, activation: ActivationName | None = None,
) -> None:  # fmt: skip
    """``out = x @ weight.T`` with each row's expert; ``f(gate) * up`` of it with ``activation``.

    x [T top_k, I] in sorted order, or [T, I] with ``gathers``; weight [E local * O, I], with ``activation``
    [E local * 2 O, I], each expert's gates first; out [T top_k, O] in sorted order, whose rows beyond the tiles stay as they are.

    Raises:
        ExecutorError: codes with groups that tensor cores do not take.
    """
    num_pairs, out_features = out.shape
    in_features, num_tokens = x.shape[1], num_pairs // routing.top_k
    stacked = len(routing.experts) * out_features * (2 if activation else 1)
    require("x", x, (num_tokens if gathers else num_pairs, in_features), x)
    require("out", out, (num_pairs, out_features), x)
    operand, of_weight = _operand(weight, (stacked, in_features), x)
    defines: Defines = of_weight | {
        "SCALAR": scalar_name(x), "GATED": int(activation is not None), "ACTIVATION": activation or "silu",
        "GATHERS": int(gathers), "TOP_K": routing.top_k,
    }  # fmt: skip
    height = rows_per_tile(num_tokens, routing, x.dtype.itemsize)
    sizes = np.int32(stacked), np.int32(out_features), np.int32(in_features)
    arguments = (x, *operand, rows.order, rows.tiles, out, *sizes)
    grid = rows.tiles.shape[0], out_features
    if x.dtype.itemsize > 2 or in_features % _LANE_ELEMENTS:
        _plain(library, arguments, grid, defines, height, vector_width(x, in_features))
    elif int(defines["GROUP"]) % SMALLEST_GROUP:
        raise ExecutorError(f"groups of {defines['GROUP']} columns of experts are not multiples of {SMALLEST_GROUP}")
    elif height == _STREAMED_ROWS:
        chunk = codes_per_chunk(weight.kind) if isinstance(weight, PackedWeight) else _PLAIN_CHUNK
        _stream(library, arguments, grid, defines, chunk)
    else:
        _tiles(library, arguments, grid, defines, height)


def _operand(weight: Array | PackedWeight, shape: tuple[int, int], x: Array) -> tuple[tuple[Any, ...], Defines]:
    """Values or codes, scales and zero points of the stacked matrices, and what kernels are compiled with for them."""
    if not isinstance(weight, PackedWeight):
        require("weight", weight, shape, x)
        return (weight, None, None), {"CODES": 0, "GROUP": 0, "HAS_ZERO": 0}
    check_packed(weight, shape)
    defines = packed_defines(weight.kind, weight.group, weight.zero is not None)
    return (weight.codes, weight.scale, weight.zero), defines


def combine(library: Library, rows: Array, routed: ExpertRows, out: Array) -> None:
    """``out[t]`` = sum over t's choices of share times row, in float32. rows [T top_k, D] in sorted order; out [T, D]."""
    num_tokens, features = out.shape
    top_k = routed.ids.shape[1]
    require("rows", rows, (num_tokens * top_k, features), out)
    width = vector_width(out, features)
    threads = num_threads_for(features // width, 256)
    kernel = library.function(
        "experts_combine",
        "combine",
        SCALAR=scalar_name(out),
        FEATURES=features,
        VEC=width,
        NUM_THREADS=threads,
        TOP_K=top_k,
    )
    blocks = num_tokens * ceil_div(features, width * threads)
    kernel((blocks,), (threads,), (rows, routed.positions, routed.shares, out))


def _plain(
    library: Library, arguments: tuple[Any, ...], grid: tuple[int, int], defines: Defines, height: int, width: int
) -> None:
    kernel = library.function("experts_plain", "plain", 0, WARPS=_PLAIN_WARPS, ROWS=height, VEC=width, **defines)
    kernel((grid[0], ceil_div(grid[1], _PLAIN_WARPS)), (32 * _PLAIN_WARPS,), arguments)


def _stream(library: Library, arguments: tuple[Any, ...], grid: tuple[int, int], defines: Defines, chunk: int) -> None:
    row_blocks, unroll = _stream_shape(defines, chunk)
    kernel = library.function(
        "experts_stream", "stream", 0, NUM_WARPS=_STREAM_WARPS, ROW_BLOCKS=row_blocks, UNROLL=unroll,
        WHOLE_CHUNKS=int(int(arguments[-1]) % chunk == 0), **defines,
    )  # fmt: skip
    outputs = _BLOCK_ROWS * row_blocks // (2 if defines["GATED"] else 1)
    kernel((grid[0], ceil_div(grid[1], outputs)), (32 * _STREAM_WARPS,), arguments)


def _stream_shape(defines: Defines, chunk: int) -> tuple[int, int]:
    """Blocks of 16 weight rows that share what a warp reads of the tokens, and the chunks of each row that it loads ahead.

    Codes take half as many bytes as values or fewer, so with one block a warp would read more of the tokens than of the weights. The
    scales of several groups in a chunk take the registers of a second chunk.
    """
    if not int(defines["CODES"]):
        return 1, 4
    return 2, 1 if int(defines["GROUP"]) % chunk else 2


def _tiles(library: Library, arguments: tuple[Any, ...], grid: tuple[int, int], defines: Defines, height: int) -> None:
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
