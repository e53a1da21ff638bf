# SPDX-License-Identifier: Apache-2.0
"""Matrices as Hopper's copy engine addresses them: what `include/tensor_copy.cuh` takes."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np

from phalanx.kernels.arrays import Array
from phalanx.parallel.errors import ExecutorError

__all__ = ["tensor_map"]

_MAP_BYTES = 128
_ROW_ALIGNMENT = 16
_MOST_KEPT = 4096
_TYPES = {"uint8": "UINT8", "bfloat16": "BFLOAT16", "float16": "FLOAT16"}


def tensor_map(matrix: Array, box_rows: int) -> np.void:
    """A kernel argument that stands for ``matrix``, copied in boxes of ``box_rows`` rows by 128 bytes with the 128-byte swizzle.

    The matrix is C-contiguous, its address and the size of its rows multiples of 16 bytes. Raises ExecutorError when the driver refuses it.
    """
    rows, columns = matrix.shape
    return _encoded(matrix.data.ptr, matrix.dtype.name, matrix.dtype.itemsize, rows, columns, box_rows)


@functools.lru_cache(_MOST_KEPT)
def _encoded(address: int, dtype: str, itemsize: int, rows: int, columns: int, box_rows: int) -> np.void:
    from cuda.bindings import driver

    if columns * itemsize % _ROW_ALIGNMENT:
        raise ExecutorError(f"rows of {columns * itemsize} bytes are not a multiple of {_ROW_ALIGNMENT}")

    def of(kind: Any, *sizes: int) -> list[Any]:
        return [kind(size) for size in sizes]

    status, encoded = driver.cuTensorMapEncodeTiled(
        getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{_TYPES[dtype]}"), 2, address,
        of(driver.cuuint64_t, columns, rows), of(driver.cuuint64_t, columns * itemsize),
        of(driver.cuuint32_t, 128 // itemsize, box_rows), of(driver.cuuint32_t, 1, 1),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )  # fmt: skip
    if status != driver.CUresult.CUDA_SUCCESS:
        raise ExecutorError(f"a tensor map of {dtype}[{rows}, {columns}] at {address:#x}: {status.name}")
    return np.void(ctypes.string_at(encoded.getPtr(), _MAP_BYTES))
