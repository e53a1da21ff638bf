"""``x @ weight.T`` for few rows, where one library call is slow.

For 2 to about 32 rows OpenBLAS copies the whole weight into packed panels before it multiplies, which costs more than the product.
Products below about a million multiplications go through its small-matrix kernels, which read the weight in place; so the weight
is cut into panels of rows that small, and NumPy loops over them in C. Measured for 12 weights of 2304 x 768 on one core:
8 rows 4.7 ms instead of 8.2 (the other way round 13.0), 2 rows 3.2 instead of 7.3, 32 rows 13.5 instead of 16.2.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

__all__ = ["Product", "blas_threads"]

Float32Array = NDArray[np.float32]

SMALL_PRODUCT = 1_000_000
"""Multiplications up to which OpenBLAS takes its small-matrix kernels."""
MAX_ROWS, MIN_PANEL, MAX_PANEL = 32, 8, 128
MIN_SHARE = 1 << 18
"""Weight elements that are worth a thread of their own (about 100 us)."""


def blas_threads() -> int:
    """Threads that this rank's products may use: what OpenBLAS was told, else every core."""
    given = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or ""
    return int(given) if given.isdigit() and int(given) else len(os.sched_getaffinity(0))


class Product:
    """Multiplies by weights with up to ``num_threads`` threads."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads - 1) if num_threads > 1 else None

    def __call__(self, x: Float32Array, weight: Float32Array) -> Float32Array:
        """``[T, in] x [out, in] -> [T, out]``, C-contiguous."""
        num_rows, size_in = x.shape
        panel = min(SMALL_PRODUCT // (max(num_rows, 1) * size_in) // 8 * 8, MAX_PANEL)
        if not 1 < num_rows <= MAX_ROWS or panel < MIN_PANEL:
            whole: Float32Array = x @ weight.T
            return whole
        out = np.empty((num_rows, len(weight)), np.float32)
        shares = min(self._num_threads, max(1, weight.size // MIN_SHARE))
        step = -(-len(weight) // (shares * panel)) * panel
        starts = range(0, len(weight), step)
        tasks = [
            self._pool.submit(_multiply, x, weight[start : start + step], panel, out[:, start : start + step])
            for start in starts[1:]
            if self._pool is not None
        ]
        _multiply(x, weight[:step], panel, out[:, :step])
        for task in tasks:
            task.result()
        return out


def _multiply(x: Float32Array, weight: Float32Array, panel: int, out: Float32Array) -> None:
    """Fill ``out`` with ``x @ weight.T``, ``panel`` rows of the weight at a time."""
    whole = len(weight) // panel * panel
    panels = weight[:whole].reshape(-1, panel, weight.shape[1]).swapaxes(1, 2)
    out[:, :whole].reshape(len(x), -1, panel)[...] = (x @ panels).swapaxes(0, 1)
    if whole < len(weight):
        out[:, whole:] = x @ weight[whole:].T
