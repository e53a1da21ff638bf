"""CRC-32 (the one of gzip and PNG) of pieces of a file, chunk by chunk, and of the whole from its chunks.

Chunks are what a partial read verifies: whoever needs some bytes reads and checks the chunks that hold them. The checksum of a
whole file is combined from those of its chunks without reading it again, and is the number that any CRC-32 tool prints.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence

from phalanx.checkpoints.source import Buffer

__all__ = ["CHUNK_BYTES", "ChunkedChecksum", "combine"]

CHUNK_BYTES = 4 << 20
"""Bytes that one checksum covers."""

_POLYNOMIAL = 0xEDB88320


class ChunkedChecksum:
    """Checksums of consecutive chunks of a stream of bytes that arrives in any portions."""

    def __init__(self, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._chunks: list[int] = []
        self._filled = chunk_bytes
        self.num_bytes = 0

    def update(self, data: Buffer) -> None:
        """Take the next bytes of the stream."""
        done = 0
        while done < len(data):
            if self._filled == self._chunk_bytes:
                self._chunks.append(0)
                self._filled = 0
            portion = data[done : done + self._chunk_bytes - self._filled]
            self._chunks[-1] = zlib.crc32(portion.data, self._chunks[-1])
            self._filled += len(portion)
            done += len(portion)
        self.num_bytes += len(data)

    @property
    def chunks(self) -> tuple[int, ...]:
        """One checksum a chunk, the last of which may be short."""
        return tuple(self._chunks)

    @property
    def total(self) -> int:
        """Checksum of all bytes."""
        result = 0
        for number, checksum in enumerate(self._chunks):
            result = combine(result, checksum, min(self._chunk_bytes, self.num_bytes - number * self._chunk_bytes))
        return result


def combine(first: int, second: int, second_bytes: int) -> int:
    """CRC-32 of two byte strings put together, from their own checksums and the length of the second.

    Appending zero bytes to a string is a linear map of its checksum over GF(2); see zlib's ``crc32_combine``.
    """
    return _apply(_zeros(second_bytes), first) ^ second


def _apply(matrix: Sequence[int], vector: int) -> int:
    result = 0
    for column in matrix:
        if vector & 1:
            result ^= column
        vector >>= 1
        if not vector:
            break
    return result


@functools.cache
def _power(exponent: int) -> tuple[int, ...]:
    """The map that appends ``2**exponent`` zero bits, as 32 columns."""
    if exponent == 0:
        return (_POLYNOMIAL, *(1 << bit for bit in range(31)))
    half = _power(exponent - 1)
    return tuple(_apply(half, column) for column in half)


@functools.lru_cache(maxsize=64)
def _zeros(num_bytes: int) -> tuple[int, ...]:
    """The map that appends ``num_bytes`` zero bytes."""
    matrix = tuple(1 << bit for bit in range(32))
    for exponent in range(num_bytes.bit_length()):
        if num_bytes >> exponent & 1:
            step = _power(exponent + 3)
            matrix = tuple(_apply(step, column) for column in matrix)
    return matrix
