# SPDX-License-Identifier: Apache-2.0
"""Where tensors go in a safetensors file that is to be written: header and byte offsets, known before any data."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from phalanx.checkpoints.source import TensorInfo

__all__ = ["FileLayout", "plan_file"]


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A file's header with its length prefix, the byte offset of each tensor in the file, and the file's size."""

    header: bytes
    offsets: tuple[int, ...]
    num_bytes: int


def plan_file(tensors: Sequence[tuple[str, TensorInfo]], metadata: Mapping[str, str]) -> FileLayout:
    """Lay ``tensors`` out one after the other, in the given order; data starts at a multiple of 8."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    starts, position = [], 0
    for name, info in tensors:
        starts.append(position)
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [position, position + info.num_bytes],
        }
        position += info.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data_start = 8 + len(text)
    return FileLayout(
        struct.pack("<Q", len(text)) + text, tuple(data_start + start for start in starts), data_start + position
    )
