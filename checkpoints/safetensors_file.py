# SPDX-License-Identifier: Apache-2.0
"""One safetensors file: the header checked before anything in it is trusted, tensors read slice by slice.

Format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON object ``{name: {dtype,
shape, data_offsets}}`` with an optional ``__metadata__`` of texts, then the tensors' bytes without gaps. We read it
ourselves because the library has no FP8 for NumPy, accepts a key twice, and has no limit that keeps memory small.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from phalanx.checkpoints.dtypes import numpy_dtype
from phalanx.checkpoints.file_kinds import HEAD_BYTES, describe_content
from phalanx.checkpoints.files import ModelDirectory, parse_json
from phalanx.checkpoints.item_sizes import ITEM_SIZES
from phalanx.checkpoints.slices import read_bytes, read_slice
from phalanx.checkpoints.source import Array, Buffer, Index, TensorInfo, index_shape, result_array
from phalanx.parallel.errors import CheckpointError

__all__ = ["MAX_HEADER_BYTES", "SafetensorsFile", "StoredTensor"]

MAX_HEADER_BYTES = 8 << 20
"""Room for about 70,000 tensors in one file; the format itself allows 100 MB, which takes a gigabyte to parse."""

LARGEST_HEADER_BYTES = 100_000_000
"""What the format allows."""

MAX_AXES = 8
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file: what it is, and the byte offset of its data in the file."""

    info: TensorInfo
    offset: int


class SafetensorsFile:
    """An open, verified file. ``tensors`` in header order; ``metadata`` texts from its writer.

    Raises:
        CheckpointError: the file cannot be opened, or its header is not exactly what the format demands.
    """

    def __init__(self, directory: ModelDirectory, name: str) -> None:
        self.name = name
        self._descriptor = directory.open(name)
        try:
            self.data_start, header = self._read_header()
            self.metadata = _metadata(header.pop(_METADATA, {}), name)
            self.tensors: Mapping[str, StoredTensor] = MappingProxyType(self._check(header))
        except BaseException:
            self.close()
            raise

    def read(self, tensor: str, index: Index, buffer: Buffer | None = None) -> Array:
        """As `TensorSource.read`."""
        stored = self.tensors[tensor]
        out = result_array(index_shape(index), numpy_dtype(stored.info.dtype, tensor), buffer)
        read_slice(self._descriptor, stored.offset, stored.info.shape, index, out, f"{self.name!r}")
        return out

    def read_bytes(self, offset: int, out: Buffer) -> None:
        """Raw bytes of the file from ``offset``."""
        read_bytes(self._descriptor, offset, out, f"{self.name!r}")

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return os.fstat(self._descriptor).st_size

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _read_header(self) -> tuple[int, dict[str, Any]]:
        size = self.num_bytes
        head = np.zeros(HEAD_BYTES, np.uint8)
        self.read_bytes(0, head[: min(size, HEAD_BYTES)])
        (length,) = struct.unpack("<Q", head[:8].tobytes())
        if not (2 <= length <= MAX_HEADER_BYTES and 8 + length <= size and head[8] == ord("{")):
            raise CheckpointError(f"{self.name!r} {self._no_header(size, length, head.tobytes())}")
        raw = np.empty(length, np.uint8)
        self.read_bytes(8, raw)
        return 8 + length, parse_json(raw.tobytes(), self.name)

    def _no_header(self, size: int, length: int, head: bytes) -> str:
        """What is wrong with a file that does not begin with a header's length and a header; and the way out."""
        if (description := describe_content(head)) is not None:
            return f"is {description}"
        if size < 10:
            return f"has {size} bytes, fewer than any safetensors file; copy it again"
        if length > MAX_HEADER_BYTES:
            fits = length < min(size, LARGEST_HEADER_BYTES)
            way_out = "save it in more shards" if fits else "it is damaged, or not a safetensors file"
            return f"announces a header of {length} bytes, over the limit of {MAX_HEADER_BYTES}; {way_out}"
        if 8 + length > size:
            return f"ends inside its header ({size} of {8 + length} bytes); copy it again"
        return "is not a safetensors file: its header does not begin with '{'"

    def _check(self, header: dict[str, Any]) -> dict[str, StoredTensor]:
        tensors = {name: _tensor(name, entry, self.name, self.data_start) for name, entry in header.items()}
        position = self.data_start
        # Empty tensors share their offset with the next; (offset, size) puts them first.
        for name, stored in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].info.num_bytes)):
            if stored.offset != position:
                what = "overlaps the one before it" if stored.offset < position else "leaves a gap before it"
                raise CheckpointError(f"tensor {name[:120]!r} of {self.name!r} {what}; the file is damaged")
            position += stored.info.num_bytes
        if position != self.num_bytes:
            raise CheckpointError(
                f"{self.name!r} has {self.num_bytes} bytes, but its header describes {position}; copy the file again"
            )
        return tensors


def _metadata(value: Any, file: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(f"{_METADATA} of {file!r} holds values that are not strings; the file is damaged")
    return value


def _tensor(name: str, entry: Any, file: str, data_start: int) -> StoredTensor:
    what = f"tensor {name[:120]!r} of {file!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{what} is not described by dtype, shape and data_offsets; the file is damaged")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise CheckpointError(f"{what} has dtype {str(dtype)[:40]!r}; supported: {', '.join(ITEM_SIZES)}")
    if not _are_sizes(shape) or len(shape) > MAX_AXES:
        raise CheckpointError(f"{what} has shape {str(shape)[:80]}; at most {MAX_AXES} whole numbers >= 0 are allowed")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{what} has data_offsets {str(offsets)[:80]}; two whole numbers >= 0 are needed")
    if offsets[1] - offsets[0] != math.prod(shape) * ITEM_SIZES[dtype]:
        raise CheckpointError(
            f"{what} covers {offsets[1] - offsets[0]} bytes, but {dtype} of shape {str(shape)[:80]} has "
            f"{str(math.prod(shape) * ITEM_SIZES[dtype])[:40]}; the file is damaged"
        )
    return StoredTensor(TensorInfo(tuple(shape), dtype), data_start + offsets[0])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 62 for size in value)
