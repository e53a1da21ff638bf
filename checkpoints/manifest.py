# SPDX-License-Identifier: Apache-2.0
"""``manifest.json`` of a split directory: which file holds which part of which source tensor.

Everything a reader needs to put the original tensors together again, at any layout, is in here; so is the proof that nothing
is missing (`phalanx.checkpoints.coverage`).
"""

from __future__ import annotations

import math
from typing import Final, Literal

import msgspec

from phalanx.checkpoints.dtypes import NUMPY_DTYPES
from phalanx.checkpoints.files import ModelDirectory, parse_json
from phalanx.checkpoints.source import Index, TensorInfo, index_shape
from phalanx.parallel.errors import CheckpointError

__all__ = [
    "FORMAT",
    "MANIFEST_FILE",
    "VERSION",
    "Manifest",
    "Piece",
    "RankFile",
    "SplitLayout",
    "rank_file_name",
    "read_manifest",
]

MANIFEST_FILE = "manifest.json"
FORMAT: Final = "phalanx-split"
"""Also ``format`` in the metadata of every rank's file."""
VERSION = 2
READABLE_VERSIONS = (1, 2)
MAX_MANIFEST_BYTES = 32 << 20


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Unknown fields are refused: a newer format must raise its version instead."""


class SplitLayout(_Struct, frozen=True):
    """Sizes of the axes that the split was made for.

    Attributes:
        stages: first layer, and the one after the last, of each pipeline stage; empty in version 1, which divided by number.
    """

    tp: int
    pp: int
    stages: tuple[tuple[int, int], ...] = ()


class SourceTensor(_Struct, frozen=True):
    """A tensor of the original checkpoint.

    Attributes:
        shape: in stored orientation.
        dtype: stored format, after conversion where the split converts.
        copies: how many elements are held how often, as the declaration plans it: copies (as text) to elements.
    """

    shape: tuple[int, ...]
    dtype: str
    copies: dict[str, int]

    @property
    def info(self) -> TensorInfo:
        """As a source reports it."""
        return TensorInfo(self.shape, self.dtype)


class Piece(_Struct, frozen=True):
    """A box of a source tensor, stored as a tensor of a rank's file.

    Attributes:
        name: of the tensor in the rank's file.
        source: of the tensor in the original checkpoint.
        start, stop: index ranges in the source, one an axis.
        offset, num_bytes: byte range in the file.
        chunk_checksums: of each `Manifest.chunk_bytes` of these bytes, so that a part can be verified
            (`phalanx.checkpoints.checksum`).
        checksum: of all of them.
    """

    name: str
    source: str
    start: tuple[int, ...]
    stop: tuple[int, ...]
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    checksum: str
    chunk_checksums: tuple[str, ...]

    @property
    def box(self) -> Index:
        """Index ranges in the source."""
        return tuple(slice(start, stop) for start, stop in zip(self.start, self.stop, strict=True))


class RankFile(_Struct, frozen=True):
    """What one rank of the split's layout holds; ``checksum`` is of its header and its tensors'."""

    rank: int
    stage: int
    tp_rank: int
    file: str
    num_bytes: int
    checksum: str
    tensors: tuple[Piece, ...]


class Manifest(_Struct, frozen=True, omit_defaults=True):
    """The whole split; ``layout`` is what it was made for, not what it can be loaded at.

    ``model_code`` is the digest of the model file by which it was split, empty for built-in families.
    """

    format: Literal["phalanx-split"]
    version: int
    architecture: str
    layout: SplitLayout
    chunk_bytes: int
    sources: dict[str, SourceTensor]
    ranks: tuple[RankFile, ...]
    model_code: str = ""


def rank_file_name(rank: int) -> str:
    """``rank_00003.safetensors``."""
    return f"rank_{rank:05d}.safetensors"


def read_manifest(directory: ModelDirectory) -> Manifest:
    """Read and check ``manifest.json``: every number in it is consistent with the others.

    Raises:
        CheckpointError: it is missing, of another version, or damaged.
    """
    raw = parse_json(directory.read(MANIFEST_FILE, MAX_MANIFEST_BYTES), MANIFEST_FILE)
    version = raw.get("version") if isinstance(raw, dict) else None
    if version not in READABLE_VERSIONS:
        raise CheckpointError(
            f"{MANIFEST_FILE} has version {str(version)[:40]!r}; this Phalanx reads 1 to {VERSION}; split again"
        )
    try:
        manifest = msgspec.convert(raw, Manifest, strict=True)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{MANIFEST_FILE} is damaged: {str(error)[:200]}; split again") from None
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    world_size = manifest.layout.tp * manifest.layout.pp
    _require(manifest.layout.tp > 0 and manifest.layout.pp > 0, "the layout is not positive")
    _require(manifest.chunk_bytes > 0, "chunk_bytes is not positive")
    ranks = [entry.rank for entry in manifest.ranks]
    _require(len(ranks) == world_size and ranks == list(range(len(ranks))), f"ranks are not 0..{world_size - 1}")
    for name, tensor in manifest.sources.items():
        _require(
            tensor.dtype in NUMPY_DTYPES and min(tensor.shape, default=0) >= 0,
            f"source {name[:120]!r} is not a weight",
        )
    for entry in manifest.ranks:
        _require(entry.file == rank_file_name(entry.rank), f"rank {entry.rank} has file {entry.file[:120]!r}")
        for piece in entry.tensors:
            _check_piece(piece, manifest)


def _check_piece(piece: Piece, manifest: Manifest) -> None:
    what = f"tensor {piece.name[:120]!r}"
    tensor = manifest.sources.get(piece.source)
    _require(tensor is not None, f"{what} comes from an unknown source")
    assert tensor is not None
    _require(
        len(piece.start) == len(piece.stop) == len(tensor.shape),
        f"{what} has another number of axes than its source",
    )
    inside = all(
        0 <= low < high <= extent for low, high, extent in zip(piece.start, piece.stop, tensor.shape, strict=True)
    )
    _require(inside, f"{what} reaches outside its source")
    _require(
        piece.dtype == tensor.dtype and piece.shape == index_shape(piece.box),
        f"{what} has another shape or dtype",
    )
    _require(
        piece.num_bytes == TensorInfo(piece.shape, piece.dtype).num_bytes,
        f"{what} has another size than its shape",
    )
    chunks = math.ceil(piece.num_bytes / manifest.chunk_bytes)
    _require(len(piece.chunk_checksums) == chunks, f"{what} has {len(piece.chunk_checksums)} of {chunks} checksums")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise CheckpointError(f"{MANIFEST_FILE} is damaged: {problem}; split again")
