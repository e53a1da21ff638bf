# SPDX-License-Identifier: Apache-2.0
"""A split directory as a tensor source: the original tensors, put together from whatever layout's pieces.

Loading at the split's own layout reads each piece as it stands; at any other, the parts of pieces that the rank needs. Every
byte that is used was verified: before a piece is read from, the chunks that hold what is wanted are checked, once each.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from phalanx.checkpoints.boxes import intersect, relative, subtract
from phalanx.checkpoints.checksum import checksum
from phalanx.checkpoints.coverage import verify_coverage
from phalanx.checkpoints.dtypes import numpy_dtype
from phalanx.checkpoints.files import ModelDirectory
from phalanx.checkpoints.item_sizes import ITEM_SIZES
from phalanx.checkpoints.manifest import Piece, RankFile, read_manifest
from phalanx.checkpoints.safetensors_file import SafetensorsFile
from phalanx.checkpoints.source import Array, Buffer, Index, TensorInfo, index_shape, result_array
from phalanx.parallel.errors import CheckpointError

__all__ = ["SplitSource"]


@dataclass(frozen=True, slots=True)
class _Home:
    """A piece and where it is; ``verified`` has one flag a chunk."""

    entry: RankFile
    piece: Piece
    verified: bytearray


class SplitSource:
    """Tensors of a directory that ``launch.split`` wrote. Files are opened when they are first needed.

    Raises:
        CheckpointError: the manifest is damaged or does not cover a tensor, or a file is missing or has another size.
    """

    def __init__(self, directory: ModelDirectory) -> None:
        self.manifest = read_manifest(directory)
        verify_coverage(self.manifest)
        self._directory = directory
        self._files: dict[int, SafetensorsFile] = {}
        self._opening = threading.Lock()
        self._homes: dict[str, dict[tuple[tuple[int, ...], tuple[int, ...]], _Home]] = {
            name: {} for name in self.manifest.sources
        }
        for entry in self.manifest.ranks:
            directory.check_size(entry.file, entry.num_bytes)
            for piece in entry.tensors:
                home = _Home(entry, piece, bytearray(len(piece.chunk_checksums)))
                self._homes[piece.source].setdefault((piece.start, piece.stop), home)

    def names(self) -> Collection[str]:
        """Names of the original checkpoint's tensors."""
        return self.manifest.sources.keys()

    def info(self, name: str) -> TensorInfo:
        """Shape and stored format."""
        return self.manifest.sources[name].info

    def read(self, name: str, index: Index, buffer: Buffer | None = None) -> Array:
        """As `TensorSource.read`; raises `CheckpointError` too where a checksum does not match."""
        info = self.info(name)
        out = result_array(index_shape(index), numpy_dtype(info.dtype, name), buffer)
        for home, box in self._covering(name, index):
            part = relative(box, home.piece.box)
            target = out[relative(box, index)] if index else out  # indexing without axes would copy
            self._verify(home, part)
            if target.flags.c_contiguous:
                self._file(home.entry).read(home.piece.name, part, target.reshape(-1).view(np.uint8))
            else:
                target[...] = self._file(home.entry).read(home.piece.name, part)
        return out

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()

    def _covering(self, name: str, index: Index) -> Iterator[tuple[_Home, Index]]:
        """Disjoint boxes that make up ``index``, each with a piece that holds it."""
        remaining = [index] if math.prod(index_shape(index)) else []
        for home in self._homes[name].values():
            left: list[Index] = []
            for wanted in remaining:
                box = intersect(wanted, home.piece.box)
                if box is None:
                    left.append(wanted)
                else:
                    yield home, box
                    left += subtract(wanted, box)
            remaining = left
        assert not remaining, "verify_coverage holds"

    def _file(self, entry: RankFile) -> SafetensorsFile:
        with self._opening:
            if entry.rank not in self._files:
                file = SafetensorsFile(self._directory, entry.file)
                self._files[entry.rank] = file
                _check_agreement(file, entry)
            return self._files[entry.rank]

    def _verify(self, home: _Home, part: Index) -> None:
        """Check the chunks between the first and the last byte of ``part`` that were not checked before."""
        piece, size = home.piece, self.manifest.chunk_bytes
        first = np.ravel_multi_index([axis.start for axis in part], piece.shape) if part else 0
        last = np.ravel_multi_index([axis.stop - 1 for axis in part], piece.shape) if part else 0
        item_size = ITEM_SIZES[piece.dtype]
        scratch: Buffer | None = None
        for chunk in range(int(first) * item_size // size, ((int(last) + 1) * item_size - 1) // size + 1):
            if home.verified[chunk]:
                continue
            scratch = np.empty(min(size, piece.num_bytes), np.uint8) if scratch is None else scratch
            data = scratch[: min(size, piece.num_bytes - chunk * size)]
            self._file(home.entry).read_bytes(piece.offset + chunk * size, data)
            if checksum(data) != piece.chunk_checksums[chunk]:
                raise CheckpointError(
                    f"checksum of {piece.name[:120]!r} in {home.entry.file!r} does not match at byte "
                    f"{piece.offset + chunk * size}; the file is damaged, copy it again or split again"
                )
            home.verified[chunk] = 1


def _check_agreement(file: SafetensorsFile, entry: RankFile) -> None:
    for piece in entry.tensors:
        stored = file.tensors.get(piece.name)
        if stored is None or stored.offset != piece.offset or stored.info != TensorInfo(piece.shape, piece.dtype):
            raise CheckpointError(
                f"{file.name!r} does not hold {piece.name[:120]!r} as manifest.json says; it belongs to another split"
            )
