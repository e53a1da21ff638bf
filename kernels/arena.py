# SPDX-License-Identifier: Apache-2.0
"""One device allocation, cut into pieces whose addresses never move: what captured graphs need.

Pieces live as long as the arena. ``Scratch`` is a region inside one that is handed out again each step: the same
requests in the same order get the same addresses, so a replayed graph finds what its capture saw.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from phalanx.parallel.errors import ConfigError, ExecutorError

__all__ = ["ALIGNMENT_BYTES", "Arena", "Scratch"]

ALIGNMENT_BYTES = 256

DeviceBytes = Any
"""A flat uint8 ``cupy.ndarray`` (any object with ``size``, slices, ``view`` and ``reshape`` will do)."""


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class _Region:
    """Bytes handed out front to back."""

    def __init__(self, name: str, memory: DeviceBytes) -> None:
        self.name = name
        self._memory = memory
        self.used_bytes = 0

    @property
    def total_bytes(self) -> int:
        """Size of the whole region."""
        return int(self._memory.size)

    @property
    def free_bytes(self) -> int:
        """What can still be handed out."""
        return self.total_bytes - self.used_bytes

    def _take(self, what: str, num_bytes: int) -> DeviceBytes:
        start = self.used_bytes
        if _aligned(num_bytes) > self.free_bytes:
            raise ExecutorError(
                f"{self.name}: {what} needs {num_bytes:,} bytes, {self.free_bytes:,} of {self.total_bytes:,} are left; "
                "lower --max-num-batched-tokens or --max-num-seqs"
            )
        self.used_bytes = start + _aligned(num_bytes)
        return self._memory[start : start + num_bytes]

    def _array(self, what: str, shape: tuple[int, ...], dtype: Any) -> Any:
        dtype = np.dtype(dtype)
        return self._take(what, prod(shape) * dtype.itemsize).view(dtype).reshape(shape)


class Arena(_Region):
    """Named, aligned, permanent pieces of one device allocation."""

    def __init__(self, total_bytes: int, allocate: Callable[[int], DeviceBytes] | None = None) -> None:
        """Allocate ``total_bytes`` on the current device. Raises ConfigError when the device does not have them."""
        super().__init__("device arena", (allocate or _allocate_on_device)(total_bytes))
        self._names: set[str] = set()

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        """A piece of this shape and dtype, uninitialised. Raises ExecutorError when it does not fit or the name is taken."""
        self._claim(name)
        return self._array(name, shape, dtype)

    def scratch(self, name: str, num_bytes: int) -> Scratch:
        """A region for values that live within one step."""
        self._claim(name)
        return Scratch(name, self._take(name, num_bytes))

    def _claim(self, name: str) -> None:
        if name in self._names:
            raise ExecutorError(f"device arena: {name!r} is already allocated")
        self._names.add(name)


class Scratch(_Region):
    """A region that is handed out anew each step. What an earlier step held there is overwritten."""

    def array(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """The next piece, uninitialised. Raises ExecutorError when the region is too small."""
        return self._array("a temporary", shape, dtype)

    def release(self) -> None:
        """Give back everything: the start of a step."""
        self.used_bytes = 0


def _allocate_on_device(num_bytes: int) -> DeviceBytes:
    import cupy

    try:
        memory = cupy.cuda.Memory(num_bytes)
    except (cupy.cuda.memory.OutOfMemoryError, cupy.cuda.runtime.CUDARuntimeError) as error:
        free, total = cupy.cuda.runtime.memGetInfo()
        raise ConfigError(
            f"{num_bytes:,} bytes of device memory cannot be allocated: {free:,} of {total:,} are free; "
            "lower --gpu-memory-utilization or stop what else runs on this GPU"
        ) from error
    return cupy.ndarray((num_bytes,), dtype=np.uint8, memptr=cupy.cuda.MemoryPointer(memory, 0))
