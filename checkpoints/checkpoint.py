# SPDX-License-Identifier: Apache-2.0
"""One way in: a path becomes a `Checkpoint`, whatever kind of directory it is."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from phalanx.checkpoints.config_files import demo_path, read_config, read_generation_config, stored_dtype
from phalanx.checkpoints.directory import DirectorySource
from phalanx.checkpoints.dtypes import dtype_from_config
from phalanx.checkpoints.dummy import DummySource
from phalanx.checkpoints.files import ModelDirectory
from phalanx.checkpoints.formats import FormatPlan, read_formats
from phalanx.checkpoints.manifest import MANIFEST_FILE
from phalanx.checkpoints.source import TensorSource
from phalanx.checkpoints.split_source import SplitSource

__all__ = ["Checkpoint", "content_checksum", "open_checkpoint"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open model directory; a context manager, or call `close`.

    Attributes:
        path: the directory; tokenizer files are read from here.
        config: parsed ``config.json``.
        generation_config: parsed ``generation_config.json``; empty without one.
        source: its tensors.
        formats: which weights are quantised, and how.
        is_split: written by ``launch.split``.
    """

    path: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    source: TensorSource
    formats: FormatPlan
    is_split: bool

    def close(self) -> None:
        """Close all files; the source cannot be read any more."""
        if isinstance(self.source, DirectorySource | SplitSource):
            self.source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_checkpoint(path: Path | None, load_format: Literal["auto", "dummy"] = "auto", seed: int = 0) -> Checkpoint:
    """Open a Hugging Face directory or a split of one; None = the demo checkpoint that ships with Phalanx.

    All headers are verified here, so that what is wrong with a checkpoint shows before anything is allocated. ``dummy``
    needs only ``config.json`` and makes weights from ``seed``, in the format that ``dtype`` there names.

    Raises:
        CheckpointError: a file is missing or damaged.
        ConfigError: the weights are quantised in a way that cannot be read.
    """
    directory = ModelDirectory.at(demo_path() if path is None else path)
    config, generation_config = read_config(directory), read_generation_config(directory)
    formats = read_formats(config)
    is_split = load_format == "auto" and directory.has(MANIFEST_FILE)
    source: TensorSource
    if load_format == "dummy":
        source = DummySource(seed, dtype_from_config(stored_dtype(config)))
    else:
        source = SplitSource(directory) if is_split else DirectorySource(directory)
        formats = formats.for_stored(source.names())
    return Checkpoint(directory.path, config, generation_config, source, formats, is_split)


def content_checksum(source: TensorSource, chunk_bytes: int = 4 << 20) -> str:
    """Identity of weights: a hexadecimal digest of every tensor's name, format, shape and bytes.

    The same for a checkpoint and all splits of it (that keep its format). Reads everything, at about 2 GB/s.
    """
    digest = hashlib.blake2b(repr(source).encode() if isinstance(source, DummySource) else b"", digest_size=16)
    for name in sorted(source.names()):
        info, checksum = source.info(name), 0
        rows = info.shape[0] if info.shape else 1
        each = max(1, chunk_bytes * rows // max(1, info.num_bytes))
        for low in range(0, rows, each):
            index = (slice(low, min(low + each, rows)), *info.whole[1:]) if info.shape else ()
            checksum = zlib.crc32(source.read(name, index).tobytes(), checksum)
        digest.update(f"{name}\0{info.dtype}\0{info.shape}\0{checksum}\n".encode())
    return digest.hexdigest()
