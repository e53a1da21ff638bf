# SPDX-License-Identifier: Apache-2.0
"""Weights as host arrays: the NumPy executor's, the tests' and the TensorRT builder's sink."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.checkpoints.dtypes import FLOAT_DTYPES, NUMPY_DTYPES, to_float32
from phalanx.checkpoints.source import Array, Buffer, Index

__all__ = ["NumpySink"]


class NumpySink:
    """Collects weights in ``weights``, name to array; tied names share one array.

    Args:
        rounding: safetensors name (``BF16``, ``F16``) of a format that values are rounded to first; None = none. So a
            float32 computation sees exactly the weights that a device would hold in that format.
        dtype: of the arrays; components that declare a format keep it.
        chunk_bytes: bounds what is held in addition to the arrays: about three chunks (stored, float32, rounded).
    """

    def __init__(self, rounding: str | None = None, dtype: Any = np.float32, chunk_bytes: int = 1 << 20) -> None:
        self.weights: dict[str, Array] = {}
        self.chunk_bytes = chunk_bytes
        self._dtype = np.dtype(dtype)
        self._rounding = None if rounding is None else FLOAT_DTYPES[rounding]
        self._buffer: Buffer = np.empty(0, np.uint8)
        self._exact: set[int] = set()

    def allocate(self, names: tuple[str, ...], shape: tuple[int, ...], dtype: str | None = None) -> Array:
        """Add a zero array under each of ``names``."""
        array = np.zeros(shape, self._dtype if dtype is None else NUMPY_DTYPES[dtype])
        self.weights.update(dict.fromkeys(names, array))
        if dtype is not None:
            self._exact.add(id(array))  # stays valid: `weights` keeps the array alive
        return array

    def staging(self, num_bytes: int) -> Buffer:
        """Return one buffer, reused for every chunk."""
        if self._buffer.nbytes < num_bytes:
            self._buffer = np.empty(num_bytes, np.uint8)
        return self._buffer

    def write(self, destination: Array, index: Index, array: Array) -> None:
        """Round if asked to, widen and copy; components that declare a format are copied unchanged."""
        target = destination[index]
        if id(destination) in self._exact:
            np.copyto(target, array, casting="safe")
        elif array.dtype == target.dtype and self._rounding is None:
            np.copyto(target, array)
        elif target.dtype == np.float32 and target.flags.c_contiguous and array.flags.c_contiguous:
            self._round(to_float32(array, target), array.dtype)
        else:
            # Transposed or a column block: convert in a contiguous temporary of one chunk, then copy with strides.
            stored = array if array.flags.c_contiguous else array.T
            wide = self._round(to_float32(stored, np.empty(stored.shape, np.float32)), array.dtype)
            target[...] = wide if stored is array else wide.T

    def _round(self, wide: NDArray[np.float32], stored: np.dtype[Any]) -> NDArray[np.float32]:
        if self._rounding is not None and stored != self._rounding:
            with np.errstate(over="ignore"):
                wide[...] = wide.astype(self._rounding)
        return wide
