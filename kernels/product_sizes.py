# SPDX-License-Identifier: Apache-2.0
"""Device memory that products of quantised weights need besides their operands. Apart, because planning needs no device."""

from __future__ import annotations

import math

__all__ = [
    "BLOCK",
    "CODE_ALIGNMENT",
    "SUM_BYTES",
    "block_scale_shape",
    "codes_per_chunk",
    "packed_row_bytes",
    "padded_tokens",
    "unpacked_bytes",
]

SUM_BYTES = 32 << 20
"""Room for the sums of a product of codes, made slab by slab: what stays in the second-level cache until it is scaled."""


BLOCK = 128
"""Columns of inputs, and rows and columns of weights, that share a scale where cuBLASLt multiplies fp8 blocks."""

CODE_ALIGNMENT = 16
"""Rows and columns of which matrices have multiples where 8-bit codes of whole rows meet codes of inputs (cuBLASLt)."""

_CHUNK_BYTES = 64
_TOKEN_ALIGNMENT = 4
_SCALE_ALIGNMENT = 4


def codes_per_chunk(kind: str) -> int:
    """Codes, ``int4``, ``int8`` or ``fp8``, to which rows of packed weights are padded."""
    return _CHUNK_BYTES * (2 if kind == "int4" else 1)


def packed_row_bytes(columns: int, kind: str) -> int:
    """Bytes of a row of ``columns`` packed codes."""
    return -(-columns // codes_per_chunk(kind)) * _CHUNK_BYTES


def unpacked_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    """Room for the plain values of a packed weight ``[O, I]``, which products of many tokens read."""
    return math.prod(shape) * itemsize


def padded_tokens(num_tokens: int) -> int:
    """Rows of a product of fp8 blocks, of which cuBLASLt takes multiples of 4."""
    return -(-num_tokens // _TOKEN_ALIGNMENT) * _TOKEN_ALIGNMENT


def block_scale_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of the scales of blocks of a weight ``[O, I]`` as cuBLASLt takes them: those of a row of blocks padded to a multiple of 4."""
    groups = -(-columns // BLOCK)
    return -(-rows // BLOCK), -(-groups // _SCALE_ALIGNMENT) * _SCALE_ALIGNMENT
