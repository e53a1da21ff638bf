# SPDX-License-Identifier: Apache-2.0
"""Stored number formats: their names in safetensors headers, their NumPy types, and fast conversion to float32."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from phalanx.parallel.errors import CheckpointError

__all__ = ["FLOAT_DTYPES", "NUMPY_DTYPES", "PLAIN_DTYPES", "convert", "dtype_from_config", "numpy_dtype", "to_float32"]

Array = NDArray[Any]

FLOAT_DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    }
)
"""Formats that `to_float32` widens."""

PLAIN_DTYPES = ("F32", "F16", "BF16")
"""Formats that hold a weight as plain values; 8-bit ones need a scale."""

NUMPY_DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        **FLOAT_DTYPES,
        "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
        "I8": np.dtype(np.int8),
        "U8": np.dtype(np.uint8),
        "I32": np.dtype(np.int32),
        "U32": np.dtype(np.uint32),
        "I64": np.dtype(np.int64),
        "BOOL": np.dtype(np.bool_),
        "I16": np.dtype(np.int16),
        "U16": np.dtype(np.uint16),
        "U64": np.dtype(np.uint64),
        "F64": np.dtype(np.float64),
        "C64": np.dtype(np.complex64),
    }
)
"""Formats that can be read: `FLOAT_DTYPES`, the codes, scales and indices of quantised weights, and what other tensors next to them hold
(masks of attention)."""

_CONFIG_DTYPES: Mapping[str, str] = MappingProxyType({"float32": "F32", "float16": "F16", "bfloat16": "BF16"})


def numpy_dtype(name: str, tensor: str) -> np.dtype[Any]:
    """NumPy type of stored format ``name``.

    Raises:
        CheckpointError: no weight can be read from that format.
    """
    if name not in NUMPY_DTYPES:
        raise CheckpointError(
            f"tensor {tensor!r} is stored as {name}, which is not a weight dtype; convert it to one of {', '.join(PLAIN_DTYPES)}"
        )
    return NUMPY_DTYPES[name]


def dtype_from_config(name: str) -> str:
    """Stored format of a ``config.json`` or ``--dtype`` name: ``bfloat16 -> BF16``.

    Raises:
        CheckpointError: there is no such format.
    """
    if name not in _CONFIG_DTYPES:
        raise CheckpointError(f"dtype={name!r} is not supported; supported: {', '.join(_CONFIG_DTYPES)}")
    return _CONFIG_DTYPES[name]


def to_float32(array: Array, out: NDArray[np.float32]) -> NDArray[np.float32]:
    """Widen ``array`` of any of `FLOAT_DTYPES` into ``out`` of the same shape; exact. Returns ``out``."""
    if array.dtype == FLOAT_DTYPES["BF16"]:
        # The upper half of a float32: a shift is several times faster than ml_dtypes' cast.
        np.left_shift(array.view(np.uint16), np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
    elif array.itemsize == 1:
        table = np.arange(256, dtype=np.uint8).view(array.dtype).astype(np.float32)
        out[...] = table[array.view(np.uint8)]
    else:
        np.copyto(out, array)
    return out


def convert(array: Array, dtype: np.dtype[Any], tensor: str) -> Array:
    """``array`` in another of `FLOAT_DTYPES`, rounded to nearest even; ``array`` itself if it is stored so already.

    Raises:
        CheckpointError: a finite value is beyond the range of ``dtype``.
    """
    if array.dtype == dtype:
        return array
    wide = to_float32(array, np.empty(array.shape, np.float32))
    with np.errstate(over="ignore"):
        narrow = wide.astype(dtype)
    lost = np.isfinite(wide) & ~np.isfinite(narrow)
    if lost.any():
        raise CheckpointError(
            f"tensor {tensor!r} holds {float(wide[lost][0])}, beyond the range of {dtype.name}; use bfloat16 or float32"
        )
    return narrow
