# SPDX-License-Identifier: Apache-2.0
"""Whether two copies of a checkpoint are the same, by a sample that is cheap enough for every start."""

from __future__ import annotations

import hashlib
import json

from phalanx.checkpoints.checkpoint import Checkpoint
from phalanx.checkpoints.dummy import DummySource
from phalanx.checkpoints.manifest import MANIFEST_FILE
from phalanx.checkpoints.source import TensorSource

__all__ = ["checkpoint_identity"]


def checkpoint_identity(checkpoint: Checkpoint) -> dict[str, str]:
    """A digest of each part, under the name by which an operator knows it.

    Of weights it covers every tensor's name, type and shape, and one row of its values. Of a split directory, whose ranks may hold
    only their own files, it covers the manifest, which has the checksums.
    """
    if checkpoint.is_split:
        weights = _digest((checkpoint.path / MANIFEST_FILE).read_bytes())
    else:
        weights = _sample(checkpoint.source)
    return {
        "config.json": _digest(json.dumps(dict(checkpoint.config), sort_keys=True).encode()),
        "generation_config.json": _digest(json.dumps(dict(checkpoint.generation_config), sort_keys=True).encode()),
        "the weights": weights,
    }


def _sample(source: TensorSource) -> str:
    if isinstance(source, DummySource):
        return _digest(repr(source).encode())
    parts: list[bytes] = []
    for name in sorted(source.names()):
        info = source.info(name)
        row = tuple(slice(size // 2, size // 2 + 1) for size in info.shape[:-1])
        index = (*row, info.whole[-1]) if info.shape and all(info.shape) else info.whole
        parts += [f"{name}\0{info.dtype}\0{info.shape}\0".encode(), source.read(name, index).tobytes()]
    return _digest(b"".join(parts))


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
