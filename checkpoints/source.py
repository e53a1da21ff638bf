# SPDX-License-Identifier: Apache-2.0
"""The seam between stored checkpoints and their readers: named tensors, readable slice by slice.

A Hugging Face directory (`phalanx.checkpoints.directory`), a split of any layout (`phalanx.checkpoints.split_source`) and
seeded random weights (`phalanx.checkpoints.dummy`) all look alike from here.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from phalanx.checkpoints.item_sizes import ITEM_SIZES

__all__ = ["Array", "Buffer", "Index", "TensorInfo", "TensorSource", "index_shape", "result_array"]

Array = NDArray[Any]
Buffer = NDArray[np.uint8]
Index = tuple[slice, ...]
"""One slice an axis, start and stop given, step 1: ``(slice(0, 4), slice(8, 16))``."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says about a tensor: extents, and the stored format by its safetensors name (``BF16``)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Stored size."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]

    @property
    def whole(self) -> Index:
        """Index of the whole tensor."""
        return tuple(slice(0, extent) for extent in self.shape)


class TensorSource(Protocol):
    """Lazily readable named tensors; shapes and orientation are the checkpoint's own."""

    def names(self) -> Collection[str]:
        """Names of all tensors."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Shape and stored format. Raises `KeyError` for a name that is not in `names`."""
        ...

    def read(self, name: str, index: Index, buffer: Buffer | None = None) -> Array:
        """Read one slice, and nothing else, in the stored format (ml_dtypes types for BF16 and FP8).

        The result is C-contiguous and the caller's: it aliases the beginning of ``buffer`` if given (at least
        as many bytes as the slice has), else it is fresh memory. Sources keep no reference to either, and several
        threads may read at once.

        Raises:
            CheckpointError: the file is damaged, or changed since it was opened.
        """
        ...


def index_shape(index: Index) -> tuple[int, ...]:
    """Extents of what ``index`` selects."""
    return tuple(part.stop - part.start for part in index)


def result_array(shape: tuple[int, ...], dtype: np.dtype[Any], buffer: Buffer | None) -> Array:
    """An uninitialised array at the beginning of ``buffer``, or in fresh memory without one."""
    if buffer is None:
        return np.empty(shape, dtype)
    return buffer[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
