# SPDX-License-Identifier: Apache-2.0
"""Element by element sum. Enqueues on the current stream and does not wait."""

from __future__ import annotations

import numpy as np

from phalanx.kernels.arrays import Array, ceil_div, require, scalar_name, vector_width
from phalanx.kernels.library import Library

__all__ = ["add"]

_NUM_THREADS = 256


def add(library: Library, x: Array, y: Array, out: Array) -> None:
    """``out = x + y``. x, y, out [T, D], one dtype; out may be x or y."""
    num_rows, num_columns = x.shape
    for name, array in (("x", x), ("y", y), ("out", out)):
        require(name, array, (num_rows, num_columns), x)
    width = vector_width(x, num_columns)
    kernel = library.function("add", "add", SCALAR=scalar_name(x), VEC=width, NUM_THREADS=_NUM_THREADS)
    num_vectors = num_rows * num_columns // width
    kernel((ceil_div(num_vectors, _NUM_THREADS),), (_NUM_THREADS,), (x, y, out, np.int64(num_vectors)))
