# SPDX-License-Identifier: Apache-2.0
"""``x @ weight.T`` for few rows, where one library call is slow.

For 2 to about 32 rows OpenBLAS copies the whole weight into packed panels before it multiplies, which costs more than the product.
Products below about a million multiplications go through its small-matrix kernels, which read the weight in place; so the weight
is cut into panels of rows that small, and NumPy loops over them in C. Measured for 12 weights of 2304 x 768 on one core:
8 rows 4.7 ms instead of 8.2 (the other way round 13.0), 2 rows 3.2 instead of 7.3, 32 rows 13.5 instead of 16.2.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from phalanx.runtime.executors.numpy.threads import Threads

__all__ = ["product"]

Float32Array = NDArray[np.float32]

SMALL_PRODUCT = 1_000_000
"""Multiplications up to which OpenBLAS takes its small-matrix kernels."""
MAX_ROWS, MIN_PANEL, MAX_PANEL = 32, 8, 128
MIN_SHARE = 1 << 18
"""Weight elements that are worth a thread of their own (about 100 us)."""


def product(x: Float32Array, weight: Float32Array, threads: Threads) -> Float32Array:
    """``[T, in] x [out, in] -> [T, out]``, C-contiguous; each thread takes a share of the weight's rows."""
    out = np.empty((len(x), len(weight)), np.float32)
    shares = min(threads.count, max(1, weight.size // MIN_SHARE))
    step = -(-len(weight) // (shares * MAX_PANEL)) * MAX_PANEL
    parts = [slice(start, start + step) for start in range(0, len(weight), step)]
    threads.run([partial(_multiply, x, weight[part], out[:, part]) for part in parts])
    return out


def _multiply(x: Float32Array, weight: Float32Array, out: Float32Array) -> None:
    """Fill ``out`` with ``x @ weight.T``; for few rows a panel of the weight at a time."""
    num_rows, size_in = x.shape
    panel = min(SMALL_PRODUCT // (max(num_rows, 1) * size_in) // 8 * 8, MAX_PANEL)
    whole = len(weight) // panel * panel if 1 < num_rows <= MAX_ROWS and panel >= MIN_PANEL else 0
    if whole:
        panels = weight[:whole].reshape(-1, panel, size_in).swapaxes(1, 2)
        out[:, :whole].reshape(num_rows, -1, panel)[...] = (x @ panels).swapaxes(0, 1)
    if whole < len(weight):
        out[:, whole:] = x @ weight[whole:].T
