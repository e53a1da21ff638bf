# SPDX-License-Identifier: Apache-2.0
"""Launches that may overlap the end of the kernel before them (programmatic dependent launch, Hopper and later)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from phalanx.parallel.errors import ExecutorError

__all__ = ["ProgrammaticFunction"]


class ProgrammaticFunction:
    """A kernel that calls ``wait_for_previous`` (``include/launch.cuh``) before it looks at another kernel's output."""

    def __init__(self, handle: int, name: str) -> None:
        """``handle``: the driver's function handle."""
        from cuda.bindings import driver

        self._driver = driver
        self._function = driver.CUfunction(handle)
        self._name = name
        self._attribute = driver.CUlaunchAttribute()
        self._attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        self._attribute.value.programmaticStreamSerializationAllowed = 1

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Any], shared_mem: int = 0) -> None:
        """Enqueue on the current stream. Raises ExecutorError when the driver refuses."""
        import cupy

        config = self._driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
        config.blockDimX, config.blockDimY, config.blockDimZ = (*block, 1, 1)[:3]
        config.sharedMemBytes = shared_mem
        config.hStream = cupy.cuda.get_current_stream().ptr
        config.attrs, config.numAttrs = [self._attribute], 1
        cells = [_cell(argument) for argument in args]
        pointers = (ctypes.c_void_p * len(cells))(*(ctypes.addressof(cell) for cell in cells))
        (status,) = self._driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(pointers), 0)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise ExecutorError(f"launching {self._name} with grid {grid}, block {block}: {status.name}")


def _cell(argument: Any) -> Any:
    """A ctypes object that holds one kernel argument's bytes."""
    if argument is None:
        return ctypes.c_void_p(0)
    if isinstance(argument, np.generic):
        return (ctypes.c_char * argument.dtype.itemsize).from_buffer_copy(argument.tobytes())
    return ctypes.c_void_p(argument.data.ptr)
