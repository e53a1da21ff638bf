"""Where a kernel test runs: the CPU emulator everywhere, and the GPU where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from phalanx.kernels.library import KernelLibrary, Library

from .emulation import EmulatedLibrary

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def cases(*sizes: tuple[int, ...]) -> list[tuple[Any, ...]]:
    """Every size in float32 and bfloat16, the first in float16 too: each case is a compilation."""
    wide = [(DTYPES[name], *size) for size in sizes for name in ("float32", "bfloat16")]
    return [(DTYPES["float16"], *sizes[0]), *wide]


class KernelDevice(Protocol):
    """A library and arrays that its kernels can use."""

    library: Library

    def put(self, array: np.ndarray) -> Any:
        """A device copy."""

    def get(self, array: Any) -> np.ndarray:
        """A host copy, after everything enqueued so far."""

    def poisoned(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An output array full of NaN (of -77 for integers), so that an unwritten element shows."""


def poison(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    dtype = np.dtype(dtype)
    value = -77 if dtype.kind == "i" else 77 if dtype.kind == "u" else np.nan
    return np.full(shape, value).astype(dtype)


class EmulatedDevice:
    def __init__(self, cache: Path, num_multiprocessors: int = 4, has_clusters: bool = False) -> None:
        self.library = EmulatedLibrary(cache, num_multiprocessors, has_clusters)

    def put(self, array: np.ndarray) -> np.ndarray:
        return array.copy()

    def get(self, array: np.ndarray) -> np.ndarray:
        return array.copy()

    def poisoned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return poison(shape, dtype)


class CudaDevice:
    def __init__(self) -> None:
        self.library = KernelLibrary()

    def put(self, array: np.ndarray) -> Any:
        import cupy

        memory = cupy.cuda.alloc(max(array.nbytes, 1))
        result = cupy.ndarray(array.shape, dtype=array.dtype, memptr=memory)
        memory.copy_from_host(np.ascontiguousarray(array).ctypes.data, array.nbytes)
        return result

    def get(self, array: Any) -> np.ndarray:
        import cupy

        cupy.cuda.runtime.deviceSynchronize()
        result = np.empty(array.shape, array.dtype)
        array.data.copy_to_host(result.ctypes.data, result.nbytes)
        return result

    def poisoned(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self.put(poison(shape, dtype))


def has_gpu() -> bool:
    try:
        import cupy

        return bool(cupy.cuda.runtime.getDeviceCount())
    except Exception:  # no cupy, no driver or no device: all mean that GPU tests cannot run here
        return False
