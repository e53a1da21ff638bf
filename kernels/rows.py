# SPDX-License-Identifier: Apache-2.0
"""Small row-wise helpers. Every call enqueues on the current stream and does not wait."""

from __future__ import annotations

from phalanx.kernels.arrays import Array, Defines, num_threads_for, require, scalar_name, vector_width
from phalanx.kernels.library import KernelFunction, Library

__all__ = ["add_bias", "gather_rows"]

_LARGEST_BLOCK = 256


def gather_rows(library: Library, x: Array, rows: Array, out: Array) -> None:
    """``out[s] = x[rows[s]]``, zeros where the index is negative. x [T, D]; rows [S] int32; out [S, D]."""
    num_tokens, hidden_size = x.shape
    (num_rows,) = rows.shape
    require("x", x, (num_tokens, hidden_size), x)
    require("rows", rows, (num_rows,), "int32")
    require("out", out, (num_rows, hidden_size), x)
    kernel, block = _row_kernel(library, "gather_rows", x)
    kernel((num_rows,), block, (x, rows, out))


def add_bias(library: Library, x: Array, bias: Array) -> None:
    """``x += bias`` in place. x [T, D]; bias [D]."""
    num_tokens, hidden_size = x.shape
    require("x", x, (num_tokens, hidden_size), x)
    require("bias", bias, (hidden_size,), x)
    kernel, block = _row_kernel(library, "add_bias", x)
    kernel((num_tokens,), block, (x, bias))


def _row_kernel(library: Library, name: str, x: Array) -> tuple[KernelFunction, tuple[int, ...]]:
    hidden_size = x.shape[1]
    width = vector_width(x, hidden_size)
    num_threads = num_threads_for(hidden_size // width, _LARGEST_BLOCK)
    defines: Defines = {"SCALAR": scalar_name(x), "HIDDEN_SIZE": hidden_size, "VEC": width, "NUM_THREADS": num_threads}
    return library.function(name, name, 0, **defines), (num_threads,)
