# SPDX-License-Identifier: Apache-2.0
"""The soft cap on logits. Enqueues on the current stream and does not wait."""

from __future__ import annotations

import numpy as np

from phalanx.kernels.arrays import Array, ceil_div, scalar_name, vector_width
from phalanx.kernels.library import Library

__all__ = ["soft_cap"]

_NUM_THREADS = 256


def soft_cap(library: Library, x: Array, cap: float) -> None:
    """``x = cap * tanh(x / cap)`` in place. x [T, D]."""
    num_rows, num_columns = x.shape
    width = vector_width(x, num_columns)
    kernel = library.function("soft_cap", "soft_cap", SCALAR=scalar_name(x), VEC=width, NUM_THREADS=_NUM_THREADS)
    num_vectors = num_rows * num_columns // width
    kernel((ceil_div(num_vectors, _NUM_THREADS),), (_NUM_THREADS,), (x, np.int64(num_vectors), np.float32(cap)))
