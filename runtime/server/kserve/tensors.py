# SPDX-License-Identifier: Apache-2.0
"""Tensors of the v2 protocol: data types, the raw form, JSON values.

Source: KServe's "Open Inference Protocol" and Triton's binary tensor data extension. In the raw form numbers are
little-endian in row-major order, a BOOL is one byte, and an element of BYTES is its length as uint32, then its bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from phalanx.runtime.server.kserve.errors import InvalidTensor

__all__ = ["DTYPES", "MAX_TENSOR_BYTES", "Tensor", "from_json", "from_raw", "to_json", "to_raw"]

MAX_TENSOR_BYTES = 64 << 20
"""Limit on a tensor in memory, which a short JSON body may not exceed either."""

DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "BOOL": np.dtype(np.bool_),
        **{f"{kind.upper()}{bits}": np.dtype(f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
        "FP16": np.dtype(np.float16),
        "FP32": np.dtype(np.float32),
        "FP64": np.dtype(np.float64),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "BYTES": np.dtype(object),
    }
)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named array.

    Attributes:
        datatype: a key of `DTYPES`.
        array: of the declared shape; dtype object with `bytes` elements for BYTES.
    """

    name: str
    datatype: str
    array: NDArray[Any]

    @staticmethod
    def of(name: str, datatype: str, values: Any) -> Tensor:
        """A tensor of ``values``, nested lists or an array; text elements of BYTES are encoded as UTF-8."""
        if datatype != "BYTES":
            return Tensor(name, datatype, np.asarray(values, DTYPES[datatype]))
        array = np.asarray(values, object)
        for index, value in np.ndenumerate(array):
            array[index] = value.encode() if isinstance(value, str) else value
        return Tensor(name, datatype, array)


def check_header(name: str, datatype: Any, shape: Any) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """The NumPy type and the shape that a request declares for tensor ``name``.

    Raises:
        InvalidTensor: unknown type, a dimension that is not a whole number from 0 up, or too many elements.
    """
    if datatype not in DTYPES:
        raise InvalidTensor(f"input '{name}' has datatype {datatype!r}; use one of {', '.join(DTYPES)}")
    if not isinstance(shape, (list, tuple)) or not all(type(extent) is int and extent >= 0 for extent in shape):
        raise InvalidTensor(f"input '{name}' has shape {shape!r}; give a list of whole numbers from 0 up")
    dtype = DTYPES[datatype]
    if math.prod(shape) * dtype.itemsize > MAX_TENSOR_BYTES:
        raise InvalidTensor(
            f"input '{name}' has shape {list(shape)}, more than {MAX_TENSOR_BYTES} bytes of {datatype}; send less"
        )
    return dtype, tuple(shape)


def from_raw(name: str, datatype: Any, shape: Any, data: memoryview) -> Tensor:
    """A tensor from its raw form, all of ``data``. The array of numbers is read-only and aliases ``data``.

    Raises:
        InvalidTensor: the bytes are more or fewer than type and shape say.
    """
    dtype, extents = check_header(name, datatype, shape)
    if datatype == "BYTES":
        elements = list(_split_bytes(name, data))
        if len(elements) != math.prod(extents):
            raise InvalidTensor(
                f"input '{name}' holds {len(elements)} elements, but its shape {list(extents)} needs {math.prod(extents)}"
            )
        array = np.empty(len(elements), object)
        array[:] = elements
        return Tensor(name, datatype, array.reshape(extents))
    expected = math.prod(extents) * dtype.itemsize
    if len(data) != expected:
        raise InvalidTensor(
            f"input '{name}' has {len(data)} bytes of data, but {datatype}{list(extents)} takes {expected}"
        )
    return Tensor(name, datatype, np.frombuffer(data, dtype).reshape(extents))


def _split_bytes(name: str, data: memoryview) -> Iterator[bytes]:
    position = 0
    while position < len(data):
        start = position + 4
        length = int.from_bytes(data[position:start], "little")
        position = start + length
        if start > len(data) or position > len(data):
            raise InvalidTensor(
                f"input '{name}' announces an element of {length} bytes at offset {start - 4}, beyond its {len(data)} bytes"
            )
        yield bytes(data[start:position])


def from_json(name: str, datatype: Any, shape: Any, data: Any) -> Tensor:
    """A tensor from JSON values, flat or nested, in row-major order.

    Raises:
        InvalidTensor: BF16, which has no JSON form; a value that is not of the type; too many or too few values.
    """
    dtype, extents = check_header(name, datatype, shape)
    if datatype == "BF16":
        raise InvalidTensor(f"input '{name}' of BF16 has no JSON form; send it as binary data")
    if not isinstance(data, list):
        raise InvalidTensor(f"input '{name}' has no list of values as its data")
    values = list(_flatten(data))
    if len(values) != math.prod(extents):
        raise InvalidTensor(
            f"input '{name}' has {len(values)} values, but its shape {list(extents)} needs {math.prod(extents)}"
        )
    for value in values:
        if not _is_of(value, datatype, dtype):
            raise InvalidTensor(f"input '{name}' holds {value!r:.60}, which is not a value of {datatype}")
    array = np.empty(len(values), dtype)
    array[:] = [value.encode() for value in values] if datatype == "BYTES" else values
    return Tensor(name, datatype, array.reshape(extents))


def _flatten(data: Sequence[Any]) -> Iterator[Any]:
    stack = [iter(data)]
    while stack:
        for value in stack[-1]:
            if isinstance(value, list):
                stack.append(iter(value))
                break
            yield value
        else:
            stack.pop()


def _is_of(value: Any, datatype: str, dtype: np.dtype[Any]) -> bool:
    if datatype == "BYTES":
        return isinstance(value, str)
    if datatype == "BOOL":
        return isinstance(value, bool)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return isinstance(value, int) and int(limits.min) <= value <= int(limits.max)
    return abs(value) <= float(np.finfo(dtype).max)


def to_raw(tensor: Tensor) -> bytes:
    """The raw form."""
    if tensor.datatype != "BYTES":
        return np.ascontiguousarray(tensor.array).tobytes()
    return b"".join(struct.pack("<I", len(element)) + element for element in tensor.array.ravel())


def to_json(tensor: Tensor) -> list[Any]:
    """Flat JSON values in row-major order. Bytes that are not UTF-8 become U+FFFD; BF16 has no JSON form."""
    if tensor.datatype == "BYTES":
        return [element.decode(errors="replace") for element in tensor.array.ravel()]
    values: list[Any] = tensor.array.ravel().tolist()
    return values
