"""Safetensors files byte by byte, right and wrong, for tests of the reader."""

from __future__ import annotations

import json
import struct
from typing import Any

__all__ = ["GOOD_CONFIG", "GOOD_HEADER", "entry", "file_bytes"]

GOOD_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 16, "hidden_size": 8, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "dtype": "float32",
}  # fmt: skip


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: Any = "F32") -> dict[str, Any]:
    """A header entry; by default a vector of float32 that fills its bytes."""
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


GOOD_HEADER = {"a": entry(0, 16), "b": entry(16, 48, [2, 4])}
"""Two tensors over 48 bytes."""


def file_bytes(header: Any, data: int | bytes = 48, length: int | None = None, text: bytes | None = None) -> bytes:
    """A file with this header (or its ``text`` as it stands), ``length`` as announced and that much ``data``."""
    text = json.dumps(header).encode() if text is None else text
    body = bytes(data) if isinstance(data, int) else data
    return struct.pack("<Q", len(text) if length is None else length) + text + body
