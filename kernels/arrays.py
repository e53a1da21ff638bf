# SPDX-License-Identifier: Apache-2.0
"""What the wrappers know about arrays: storage types, vector widths, shape checks."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from phalanx.parallel.errors import ExecutorError

__all__ = ["Array", "Defines", "ceil_div", "num_threads_for", "require", "scalar_name", "vector_width"]

VECTOR_BYTES = 16
Defines = dict[str, str | int | float]
"""Preprocessor definitions that specialise a kernel."""

_SCALAR_NAMES = {"bfloat16": "__nv_bfloat16", "float16": "__half", "float32": "float"}


class Array(Protocol):
    """The part of ``cupy.ndarray`` that the wrappers look at."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def flags(self) -> Any: ...

    @property
    def data(self) -> Any: ...

    @property
    def size(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def __getitem__(self, index: Any) -> Any: ...


def ceil_div(dividend: int, divisor: int) -> int:
    """``dividend / divisor``, rounded up."""
    return -(-dividend // divisor)


def scalar_name(array: Array) -> str:
    """The CUDA type of the array's elements. Raises ExecutorError for a type that the kernels do not compute in."""
    name = array.dtype.name
    if name not in _SCALAR_NAMES:
        raise ExecutorError(f"dtype {name} is not one of {', '.join(_SCALAR_NAMES)}; cast before calling a kernel")
    return _SCALAR_NAMES[name]


def vector_width(array: Array, *extents: int) -> int:
    """Elements that one thread moves at once: 16 bytes, or fewer where an extent is not a multiple of that."""
    width = VECTOR_BYTES // array.dtype.itemsize
    while any(extent % width for extent in extents):
        width //= 2
    return width


def num_threads_for(num_items: int, limit: int = 1024) -> int:
    """The block size for ``num_items`` independent items: whole warps, at most ``limit``."""
    return min(limit, 32 * ceil_div(num_items, 32))


def require(name: str, array: Array, shape: tuple[int, ...], like: Array | str) -> None:
    """Raise ExecutorError unless ``array`` is C-contiguous with this shape and dtype (of ``like``, or its name)."""
    dtype = like if isinstance(like, str) else like.dtype.name
    if tuple(array.shape) != shape or array.dtype.name != dtype or not array.flags.c_contiguous:
        layout = "C-contiguous" if array.flags.c_contiguous else "strided"
        raise ExecutorError(
            f"{name} is {layout} {array.dtype.name}{list(array.shape)}; this call needs C-contiguous {dtype}{list(shape)}"
        )
