"""Tensors in memory as a `TensorSource`, for tests of what reads one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from phalanx.checkpoints.dtypes import NUMPY_DTYPES
from phalanx.checkpoints.source import Buffer, Index, TensorInfo

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class MemorySource:
    """Stored names -> arrays of any stored format."""

    tensors: dict[str, Array]

    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def info(self, name: str) -> TensorInfo:
        array = self.tensors[name]
        return TensorInfo(array.shape, next(dtype for dtype, numpy in NUMPY_DTYPES.items() if numpy == array.dtype))

    def read(self, name: str, index: Index, buffer: Buffer | None = None) -> Array:
        return np.ascontiguousarray(self.tensors[name][index])
