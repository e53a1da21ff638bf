# SPDX-License-Identifier: Apache-2.0
"""Seeded random weights made on the device. Enqueues on the current stream and does not wait."""

from __future__ import annotations

from typing import Any

import numpy as np

from phalanx.kernels.arrays import ceil_div, scalar_name
from phalanx.kernels.library import Library
from phalanx.parallel.errors import ExecutorError

__all__ = ["dummy_weights"]

_NUM_THREADS = 256
_MOST_BLOCKS = 1 << 16
_STORED_TYPES = {"F32": "float", "F16": "__half", "BF16": "__nv_bfloat16", "F8_E4M3": "e4m3", "I8": "signed char"}
_CODE_TYPES = {"uint8": "e4m3", "int8": "signed char"}
"""Of regions that hold codes, by NumPy's names."""


def dummy_weights(
    library: Library,
    region: Any,
    *,
    stored_dtype: str,
    stored_columns: int,
    origin: tuple[int, int],
    transposed: bool,
    keys: tuple[int, int],
    mean: float,
    width: float,
) -> None:
    """Fill ``region``, a view of a weight, with values that depend on where each element stands in the checkpoint.

    The region, ``[out, in]`` or ``[out]`` with dense rows, begins (or its transpose does) at row and column ``origin`` of a
    stored tensor of ``stored_columns`` columns. Values are rounded to ``stored_dtype`` (a safetensors name), then to the
    region's dtype; the formula, its keys, mean and width are those of `phalanx.checkpoints.dummy`.
    """
    if stored_dtype not in _STORED_TYPES:
        raise ExecutorError(
            f"dummy weights of type {stored_dtype} are not made on the device; use {', '.join(_STORED_TYPES)}"
        )
    num_rows, num_columns = region.shape if region.ndim == 2 else (1, *region.shape)
    row_pitch = region.strides[0] // region.itemsize if region.ndim == 2 else num_columns
    kernel = library.function(
        "dummy_weights",
        "dummy_weights",
        SCALAR=_CODE_TYPES.get(region.dtype.name) or scalar_name(region),
        STORED=_STORED_TYPES[stored_dtype],
        TRANSPOSED=int(transposed),
        NUM_THREADS=_NUM_THREADS,
    )
    extents = (row_pitch, num_rows, num_columns, stored_columns, *origin)
    numbers = (*map(np.int64, extents), *map(np.uint32, keys), np.float32(mean), np.float32(width))
    blocks = min(ceil_div(num_rows * num_columns, _NUM_THREADS), _MOST_BLOCKS)
    kernel((blocks,), (_NUM_THREADS,), (region, *numbers))
