# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding and the write into the KV pages. Enqueues on the current stream and does not wait."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from phalanx.kernels.arrays import Array, ceil_div, require, scalar_name, vector_width
from phalanx.kernels.library import Library
from phalanx.parallel.errors import ExecutorError

__all__ = ["Fp8Pages", "RotaryTables", "rotary_kv_write"]

_NUM_THREADS = 128


@dataclass(frozen=True, slots=True)
class RotaryTables:
    """Cosines and sines by position, [max_positions, rotary_dim / 2] float32 each, on the device.

    ``is_interleaved`` pairs neighbouring channels (GPT-J) instead of the two halves of the rotated part (Llama);
    ``is_two_dimensional`` rotates two parts of each head, the first by the position in the prefix, the second by that after it.
    """

    cos: Array
    sin: Array
    is_interleaved: bool = False
    is_two_dimensional: bool = False

    @property
    def rotary_dim(self) -> int:
        """How many leading channels of a head are rotated; of each part with ``is_two_dimensional``."""
        return 2 * self.cos.shape[1]

    @property
    def num_parts(self) -> int:
        """Parts of a head that are rotated, each by its own position."""
        return 2 if self.is_two_dimensional else 1


@dataclass(frozen=True, slots=True)
class Fp8Pages:
    """What writing e4m3 pages takes besides the pages.

    Attributes:
        kv_scales: ``[2, K]`` float32, of keys and of values: code = value / scale.
        saturated: ``[1]`` int32 on the device; counts values beyond the largest code.
    """

    kv_scales: Array
    saturated: Array


def rotary_kv_write(
    library: Library,
    qkv: Array,
    positions: Array,
    slot_mapping: Array,
    key_pages: Array,
    value_pages: Array,
    rotary: RotaryTables | None,
    *,
    num_heads: int,
    fp8: Fp8Pages | None = None,
    prefix_lens: Array | None = None,
) -> None:
    """Rotate the queries of ``qkv`` in place; put rotated keys, and values, into their page slots.

    qkv [T, (H + 2K) * C] = [queries | keys | values]; positions, slot_mapping [T] int32 (slot = block * P + offset;
    negative = padding row, left alone); pages [N, K, P, C]. Without ``rotary`` only the write happens.
    A position must be a row of the tables. With ``fp8`` pages are bytes and receive codes. ``prefix_lens`` [T] int32: tokens of
    the prefix of each row's sequence, which tables of two dimensions need.
    """
    num_tokens = qkv.shape[0]
    num_blocks, num_kv_heads, block_size, head_dim = key_pages.shape
    require("qkv", qkv, (num_tokens, (num_heads + 2 * num_kv_heads) * head_dim), qkv)
    require("positions", positions, (num_tokens,), "int32")
    require("slot_mapping", slot_mapping, (num_tokens,), "int32")
    for name, pages in (("key_pages", key_pages), ("value_pages", value_pages)):
        require(name, pages, (num_blocks, num_kv_heads, block_size, head_dim), qkv if fp8 is None else "uint8")
    if fp8 is not None:
        require("kv_scales", fp8.kv_scales, (2, num_kv_heads), "float32")
        require("saturated", fp8.saturated, (1,), "int32")
    rotary_dim, parts = _checked_rotary_dim(rotary, head_dim), 1 if rotary is None else rotary.num_parts
    if parts > 1:
        if prefix_lens is None:
            raise ExecutorError(
                "a rotary embedding of two dimensions needs the length of each row's prefix; pass prefix_lens"
            )
        require("prefix_lens", prefix_lens, (num_tokens,), "int32")
    rotated = parts * rotary_dim
    width = vector_width(qkv, head_dim, rotary_dim // 2, head_dim - rotated)
    kernel = library.function(
        "rotary_kv_write",
        "rotary_kv_write",
        SCALAR=scalar_name(qkv),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        ROTARY_DIM=rotary_dim,
        BLOCK_SIZE=block_size,
        VEC=width,
        PARTS=parts,
        INTERLEAVED=int(rotary is not None and rotary.is_interleaved),
        KV_FP8=int(fp8 is not None),
        NUM_THREADS=_NUM_THREADS,
    )
    items = num_heads * (rotated // 2) + num_kv_heads * (rotated // 2 + head_dim - rotated + head_dim)
    grid = (ceil_div(num_tokens * (items // width), _NUM_THREADS),)
    cos, sin = (rotary.cos, rotary.sin) if rotary is not None else (None, None)
    codes = (fp8.kv_scales, fp8.saturated) if fp8 is not None else (None, None)
    rows = (positions, prefix_lens if parts > 1 else None, slot_mapping)
    arguments = (qkv, cos, sin, *rows, key_pages, value_pages, *codes, np.int32(num_tokens))
    kernel(grid, (_NUM_THREADS,), arguments)


def _checked_rotary_dim(rotary: RotaryTables | None, head_dim: int) -> int:
    if rotary is None:
        return 0
    for name, table in (("cos", rotary.cos), ("sin", rotary.sin)):
        require(name, table, tuple(rotary.cos.shape), "float32")
    if rotary.num_parts * rotary.rotary_dim > head_dim:
        raise ExecutorError(
            f"rotary_dim={rotary.rotary_dim} of {rotary.num_parts} part(s) is above head_dim={head_dim}"
        )
    return rotary.rotary_dim
