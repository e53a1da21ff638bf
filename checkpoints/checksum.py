# SPDX-License-Identifier: Apache-2.0
"""Checksums of chunks of a file, cheap enough to be taken whenever weights are copied or read.

A chunk is laid out in rows of 512 little-endian 64-bit words (4 KiB, zeros after the end); its rows and its columns are summed
modulo 2^64, and the sums, with the chunk's length, are digested by BLAKE2b to 64 bits. Each word counts in one row and one
column: changes to fewer than four words always show in the sums, and so do blocks that are zeroed, shifted or swapped (a product
code; Elias 1954). It does not protect against deliberate forgery. NumPy takes both sums several times faster than zlib
takes a CRC-32, so that copying stays the larger part of the work.

Chunks are what a partial read verifies: a reader of some bytes reads and checks the chunks that hold them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from phalanx.checkpoints.source import Buffer

__all__ = ["CHUNK_BYTES", "ChunkedChecksum", "checksum", "combine"]

CHUNK_BYTES = 4 << 20
"""Bytes that one checksum covers."""

_ROW_WORDS = 512
_ROW_BYTES = 8 * _ROW_WORDS


class ChunkedChecksum:
    """Checksums of consecutive chunks of a stream of bytes that arrives in any portions."""

    def __init__(self, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._chunks: list[str] = []
        self._current = _Sums()
        self.num_bytes = 0

    def update(self, data: Buffer) -> None:
        """Take the next bytes of the stream."""
        done = 0
        while done < len(data):
            portion = data[done : done + self._chunk_bytes - self._current.num_bytes]
            self._current.update(portion)
            done += len(portion)
            if self._current.num_bytes == self._chunk_bytes:
                self._chunks.append(self._current.digest())
                self._current = _Sums()
        self.num_bytes += len(data)

    @property
    def chunks(self) -> tuple[str, ...]:
        """One checksum a chunk, the last of which may be short."""
        return (*self._chunks, self._current.digest()) if self._current.num_bytes else tuple(self._chunks)


def checksum(data: Buffer) -> str:
    """Checksum of one chunk: 16 hexadecimal digits."""
    sums = _Sums()
    sums.update(data)
    return sums.digest()


def combine(checksums: Iterable[str]) -> str:
    """One checksum over several, in order: of a piece from its chunks, of a file from its pieces."""
    return hashlib.blake2b("".join(checksums).encode(), digest_size=8).hexdigest()


class _Sums:
    """Row and column sums of a chunk, as far as it has arrived."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._columns = np.zeros(_ROW_WORDS, np.uint64)
        self._rows: list[bytes] = []
        self._row = np.zeros(_ROW_BYTES, np.uint8)

    def update(self, data: Buffer) -> None:
        """Complete the row that was begun, sum whole rows where they lie, keep what is left."""
        begun = self.num_bytes % _ROW_BYTES
        self.num_bytes += len(data)
        if begun:
            taken = min(_ROW_BYTES - begun, len(data))
            self._row[begun : begun + taken] = data[:taken]
            if begun + taken < _ROW_BYTES:
                return
            self._add(self._row)
            data = data[taken:]
        whole = len(data) - len(data) % _ROW_BYTES
        if whole:
            self._add(data[:whole])
        self._row[: len(data) - whole] = data[whole:]

    def digest(self) -> str:
        """Checksum of what has arrived so far."""
        last = np.zeros(_ROW_BYTES, np.uint8)
        begun = self.num_bytes % _ROW_BYTES
        last[:begun] = self._row[:begun]
        words = last.view("<u8")
        rows = [*self._rows, words.sum().tobytes()] if begun else self._rows
        parts = ((self._columns + words).tobytes(), *rows, self.num_bytes.to_bytes(8, "little"))
        return hashlib.blake2b(b"".join(parts), digest_size=8).hexdigest()

    def _add(self, rows: Buffer) -> None:
        words = rows.view("<u8").reshape(-1, _ROW_WORDS)
        self._columns += words.sum(axis=0)
        self._rows.append(words.sum(axis=1).tobytes())
