# SPDX-License-Identifier: Apache-2.0
"""Device and pinned memory: types and asynchronous copies."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DeviceArray", "device_dtype", "download", "pinned_array", "upload"]

DeviceArray = Any
"""A ``cupy.ndarray``."""


def device_dtype(name: str) -> np.dtype[Any]:
    """The NumPy type of a compute dtype; bfloat16 is ml_dtypes'."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def pinned_array(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Uninitialised page-locked host memory, which the device copies asynchronously."""
    import cupy

    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    memory = cupy.cuda.alloc_pinned_memory(size)
    array: NDArray[Any] = np.frombuffer(memory, np.uint8, size).view(dtype).reshape(shape)
    return array


def upload(target: DeviceArray, source: NDArray[Any], stream: Any) -> None:
    """Copy pinned ``source`` to the front of ``target``.

    Enqueues on ``stream``; ``source`` must stay untouched meanwhile.
    """
    from cupy.cuda import runtime

    runtime.memcpyAsync(target.data.ptr, source.ctypes.data, source.nbytes, runtime.memcpyHostToDevice, stream.ptr)


def download(target: NDArray[Any], source: DeviceArray, stream: Any) -> None:
    """Copy ``source`` to the front of pinned ``target``. Enqueues on ``stream``; does not wait."""
    from cupy.cuda import runtime

    runtime.memcpyAsync(target.ctypes.data, source.data.ptr, source.nbytes, runtime.memcpyDeviceToHost, stream.ptr)
