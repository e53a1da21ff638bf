# SPDX-License-Identifier: Apache-2.0
"""Activations of a step in one fixed region of device memory.

A piece goes back when its last reference dies, which CPython does at once, so a model written as plain functions reuses
the memory of a layer for the next without saying so. Capture and replay see the same addresses because a step starts
with an empty region, and steps of one rank never overlap on the device: they share the region, and every captured graph
does too.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from phalanx.kernels.arena import ALIGNMENT_BYTES, Scratch

__all__ = ["ActivationPool"]


class _Lease:
    """Gives one piece back to its pool when the last array on it is gone."""

    __slots__ = ("_free", "_generation", "_piece", "_pool")

    def __init__(self, pool: ActivationPool, free: list[Any], piece: Any) -> None:
        self._pool, self._free, self._piece, self._generation = pool, free, piece, pool.generation

    def __del__(self) -> None:
        if self._generation == self._pool.generation:
            self._free.append(self._piece)


class ActivationPool:
    """Hands out device arrays from a scratch region; equal sizes are reused, the last one returned first."""

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self._free: dict[int, list[Any]] = {}
        self.generation = 0

    def reset(self) -> None:
        """Start a step: everything is free again. What an earlier step's arrays hold is overwritten."""
        self.generation += 1
        self._free.clear()
        self._scratch.release()

    def array(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An uninitialised array. Raises ExecutorError when the region is too small."""
        import cupy

        dtype = np.dtype(dtype)
        size = _aligned(prod(shape) * dtype.itemsize)
        free = self._free.setdefault(size, [])
        piece = free.pop() if free else self._scratch.array((size,), np.uint8)
        memory = cupy.cuda.UnownedMemory(piece.data.ptr, size, _Lease(self, free, piece))
        return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


def _aligned(num_bytes: int) -> int:
    return max(-(-num_bytes // ALIGNMENT_BYTES), 1) * ALIGNMENT_BYTES
