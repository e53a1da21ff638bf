# SPDX-License-Identifier: Apache-2.0
"""Products with a number, and limits. Enqueues on the current stream and does not wait."""

from __future__ import annotations

import math

import numpy as np

from phalanx.kernels.arrays import Array, ceil_div, scalar_name, vector_width
from phalanx.kernels.library import Library

__all__ = ["scale_and_clip"]

_NUM_THREADS = 256


def scale_and_clip(library: Library, x: Array, factor: float = 1.0, limit: float = math.inf) -> None:
    """``x = min(max(x * factor, -limit), limit)`` in place. x [T, D]."""
    num_rows, num_columns = x.shape
    width = vector_width(x, num_columns)
    kernel = library.function(
        "scale_and_clip", "scale_and_clip", SCALAR=scalar_name(x), VEC=width, NUM_THREADS=_NUM_THREADS
    )
    num_vectors = num_rows * num_columns // width
    arguments = (x, np.int64(num_vectors), np.float32(factor), np.float32(limit))
    kernel((ceil_div(num_vectors, _NUM_THREADS),), (_NUM_THREADS,), arguments)
