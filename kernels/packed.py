# SPDX-License-Identifier: Apache-2.0
"""Packed weights: codes of 4 or 8 bits with scales of groups, multiplied by inputs of 16 bits. Everything enqueues and does not wait.

Few tokens stream the codes (`gemv_packed`). For many, a weight is first unpacked to plain values in a scratch region, which a
product of plain values then reads, or, of fp8 blocks, cuBLASLt multiplies the codes as they are: docs/quantisation.md says what that costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from phalanx.kernels.activation_names import ActivationName
from phalanx.kernels.arrays import Array, Defines, ceil_div, require, scalar_name, vector_width
from phalanx.kernels.gemv import CODES_SHAPE, TOKENS_PER_CODES_TILE, GemvShape, fitted
from phalanx.kernels.library import Library
from phalanx.kernels.product_sizes import codes_per_chunk, packed_row_bytes
from phalanx.parallel.errors import ExecutorError

__all__ = [
    "GEMV_PACKED_SHAPES",
    "MAX_PACKED_TOKENS",
    "SMALLEST_GROUP",
    "PackedKind",
    "PackedWeight",
    "check_packed",
    "gemv_packed",
    "layout_suits_gemv",
    "pack_weight",
    "packed_defines",
    "parse_layout",
    "unpack_weight",
]

PackedKind = Literal["int4", "int8", "fp8"]
_CODES: dict[PackedKind, int] = {"int4": 4, "int8": 8, "fp8": 1}
_LANE_BYTES = 16
_PIECE = 8
SMALLEST_GROUP = 32
"""Columns, and multiples of them, that share a scale where kernels make operands of codes."""
_NUM_THREADS = 128
_ROWS_PER_TILE = 16

MAX_PACKED_TOKENS = 64

GEMV_PACKED_SHAPES = tuple(
    GemvShape(num_warps, row_blocks, unroll, prefetch_bytes)
    for num_warps, row_blocks, unroll in ((8, 1, 2), (8, 1, 4), (16, 1, 2), (8, 2, 2), (4, 2, 2), (4, 2, 4), (4, 4, 1))
    for prefetch_bytes in (0, 2048)
)
"""What the tuner tries."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """``value[o, i] = (code[o, i] - zero[group of i, o]) * scale[group of i, o]``.

    Attributes:
        codes: ``[O, packed_row_bytes]`` uint8 in the layout of ``packed.cuh``.
        scale: ``[G, O]`` float32.
        zero: ``[G, O]`` int8, or None.
        columns: I.
        group: columns that share a scale, the last group possibly short; 0 = the whole row.
        blocks: ``[ceil(O / 128), ceil(I / 128) padded to a multiple of 4]`` float32, the same scales for cuBLASLt, where 128 rows share them and
            inputs are fp8 codes in groups of 128 columns; else None.
    """

    codes: Array
    scale: Array
    zero: Array | None
    kind: PackedKind
    columns: int
    group: int
    blocks: Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``[O, I]``."""
        return self.codes.shape[0], self.columns

    def __len__(self) -> int:
        return self.codes.shape[0]

    @property
    def layout(self) -> str:
        """What decides which kernel is fastest: ``int4/128z``."""
        return f"{self.kind}/{self.group}{'z' if self.zero is not None else ''}"


def pack_weight(library: Library, codes: Array, out: Array, kind: PackedKind) -> None:
    """Fill ``out`` ``[O, packed_row_bytes]`` with codes ``[O, I]``: int8 (of 4 bits: -8 to 7), or e4m3 as uint8."""
    rows, columns = codes.shape
    require("codes", codes, (rows, columns), "uint8" if kind == "fp8" else "int8")
    require("out", out, (rows, packed_row_bytes(columns, kind)), "uint8")
    lanes = out.shape[1] // _LANE_BYTES
    defines = packed_defines(kind, 0, False) | {"SCALAR": "__half", "VEC": 1, "NUM_THREADS": _NUM_THREADS}
    kernel = library.function("pack_weight", "pack_weight", 0, **defines)
    kernel((rows, ceil_div(lanes, _NUM_THREADS)), (_NUM_THREADS,), (codes, out, np.int32(columns), np.int32(lanes)))


def unpack_weight(library: Library, weight: PackedWeight, out: Array) -> None:
    """The values of ``weight``, rounded once to the type of ``out`` ``[O, I]``."""
    check_packed(weight, weight.shape)
    require("out", out, weight.shape, out)
    rows, columns = weight.shape
    lanes = weight.codes.shape[1] // _LANE_BYTES
    width = min(vector_width(out, columns), _PIECE)
    defines = packed_defines(weight.kind, weight.group, weight.zero is not None)
    defines |= {"SCALAR": scalar_name(out), "NUM_THREADS": _NUM_THREADS}
    if out.dtype.itemsize == 2 and width == _PIECE and weight.group % SMALLEST_GROUP == 0:
        more: Defines = {"BFLOAT16": int(defines["SCALAR"] == "__nv_bfloat16"), "KV_FP8": 0}
        kernel = library.function("unpack_weight", "unpack_weight", 0, **(defines | more))
    else:
        kernel = library.function("pack_weight", "unpack_weight", 0, VEC=width, **defines)
    arguments = (weight.codes, weight.scale, weight.zero, out, np.int32(columns), np.int32(lanes))
    kernel((rows, ceil_div(lanes, _NUM_THREADS)), (_NUM_THREADS,), arguments)


def parse_layout(layout: str) -> tuple[PackedKind, int, bool]:
    """Kind, group and whether there are zero points, of `PackedWeight.layout`."""
    kind, _, group = layout.partition("/")
    known: PackedKind = next(one for one in _CODES if one == kind)
    return known, int(group.rstrip("z")), group.endswith("z")


def layout_suits_gemv(num_tokens: int, columns: int, layout: str) -> bool:
    """Whether `gemv_packed` computes such a product of 16-bit values; ``layout``: see `PackedWeight`."""
    group = parse_layout(layout)[1]
    return num_tokens <= MAX_PACKED_TOKENS and columns % _PIECE == 0 and group % SMALLEST_GROUP == 0


def gemv_packed(
    library: Library,
    x: Array,
    weight: PackedWeight,
    out: Array,
    *,
    bias: Array | None = None,
    gated: ActivationName | None = None,
    shape: GemvShape | None = None,
) -> None:
    """``out = x @ weight.T + bias``; ``gated``: ``f(x @ gate.T) * (x @ up.T)`` for weight = [gate; up], products rounded first.

    x [T, I], float16 or bfloat16, T at most ``MAX_PACKED_TOKENS``; weight [O, I], I a multiple of 8, groups of 32; bias [O]; out [T, O]
    (gated: [T, O / 2], without bias).
    """
    (num_tokens, columns), rows = x.shape, len(weight)
    suits = layout_suits_gemv(num_tokens, weight.columns, weight.layout) and x.dtype.itemsize == 2
    if not suits or (gated is not None and bias is not None):
        raise ExecutorError(
            f"gemv_packed takes at most {MAX_PACKED_TOKENS} tokens of float16 or bfloat16, in_features in multiples of {_PIECE} and "
            f"groups of {SMALLEST_GROUP}; this is {x.dtype.name}[{num_tokens}, {columns}] by {weight.layout}"
        )
    check_packed(weight, weight.shape)
    outputs = rows // 2 if gated else rows
    require("x", x, (num_tokens, weight.columns), x)
    require("out", out, (num_tokens, outputs), x)
    if bias is not None:
        require("bias", bias, (rows,), x)
    chosen = fitted(shape or CODES_SHAPE, num_tokens, 2 if gated else 1)
    defines = packed_defines(weight.kind, weight.group, weight.zero is not None) | {
        "SCALAR": scalar_name(x), "NUM_WARPS": chosen.num_warps, "ROW_BLOCKS": chosen.row_blocks, "UNROLL": chosen.unroll,
        "TOKEN_TILES": ceil_div(num_tokens, TOKENS_PER_CODES_TILE), "WHOLE_CHUNKS": int(columns % codes_per_chunk(weight.kind) == 0),
        "GATED": int(gated is not None), "ACTIVATION": gated or "silu",
        "HAS_BIAS": int(bias is not None),
    }  # fmt: skip
    kernel = library.function("gemv_packed", "gemv_packed", 0, **defines)
    sizes: tuple[Any, ...] = (np.int32(num_tokens), np.int32(rows), np.int32(columns), np.int32(chosen.prefetch_bytes))
    rows_per_block = (chosen.row_blocks // 2 if gated else chosen.row_blocks) * _ROWS_PER_TILE
    arguments = (x, weight.codes, weight.scale, weight.zero, bias, out, *sizes)
    kernel((ceil_div(outputs, rows_per_block),), (chosen.num_warps * 32,), arguments)


def packed_defines(kind: PackedKind, group: int, has_zero: bool) -> Defines:
    """What ``packed_operands.cuh`` and its readers are compiled with."""
    return {"CODES": _CODES[kind], "GROUP": group, "HAS_ZERO": int(has_zero)}


def check_packed(weight: PackedWeight, shape: tuple[int, int]) -> None:
    """Raise ExecutorError unless ``weight`` is ``shape``, and its arrays are of the shapes and types that follow."""
    rows, columns = shape
    if weight.columns != columns:
        raise ExecutorError(f"a packed weight has {weight.columns} columns; this call needs {columns}")
    groups = ceil_div(columns, weight.group) if weight.group else 1
    require("codes", weight.codes, (rows, packed_row_bytes(columns, weight.kind)), "uint8")
    require("scale", weight.scale, (groups, rows), "float32")
    if weight.zero is not None:
        require("zero", weight.zero, (groups, rows), "int8")
