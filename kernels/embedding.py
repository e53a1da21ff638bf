# SPDX-License-Identifier: Apache-2.0
"""Token and position embeddings. Every call enqueues on the current stream and does not wait."""

from __future__ import annotations

import numpy as np

from phalanx.kernels.arrays import Array, Defines, num_threads_for, require, scalar_name, vector_width
from phalanx.kernels.library import KernelFunction, Library

__all__ = ["add_position_embedding", "embedding"]

_LARGEST_BLOCK = 256


def embedding(
    library: Library, token_ids: Array, table: Array, out: Array, *, vocab_start: int = 0, scale: float = 1.0
) -> None:
    """Gather ``scale * table[token_ids - vocab_start]`` into ``out``; rows that ``table`` does not hold become zeros.

    token_ids [T] int32; table [V_local, D]; out [T, D] of the table's dtype.
    """
    (num_tokens,), (num_rows, hidden_size) = token_ids.shape, table.shape
    require("token_ids", token_ids, (num_tokens,), "int32")
    require("table", table, (num_rows, hidden_size), table)
    require("out", out, (num_tokens, hidden_size), table)
    kernel, block = _row_kernel(library, "embedding", "embedding", table)
    kernel(
        (num_tokens,),
        block,
        (token_ids, table, out, np.int32(vocab_start), np.int32(num_rows), np.float32(scale)),
    )


def add_position_embedding(library: Library, x: Array, positions: Array, table: Array) -> None:
    """``x += table[positions]`` in place. x [T, D]; positions [T] int32, each a row of table [max_positions, D]."""
    num_tokens, hidden_size = x.shape
    require("x", x, (num_tokens, hidden_size), x)
    require("positions", positions, (num_tokens,), "int32")
    require("table", table, (table.shape[0], hidden_size), x)
    kernel, block = _row_kernel(library, "position_embedding", "add_position_embedding", table)
    kernel((num_tokens,), block, (x, positions, table))


def _row_kernel(library: Library, source: str, name: str, table: Array) -> tuple[KernelFunction, tuple[int, ...]]:
    hidden_size = table.shape[1]
    width = vector_width(table, hidden_size)
    num_threads = num_threads_for(hidden_size // width, _LARGEST_BLOCK)
    defines: Defines = {
        "SCALAR": scalar_name(table),
        "HIDDEN_SIZE": hidden_size,
        "VEC": width,
        "NUM_THREADS": num_threads,
    }
    return library.function(source, name, 0, **defines), (num_threads,)
