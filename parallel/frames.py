# SPDX-License-Identifier: Apache-2.0
"""Messages on a byte stream: each after its length."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from phalanx.parallel.errors import CommunicatorError

__all__ = ["FrameDecoder", "frame"]

MAX_FRAME_BYTES = 1 << 30
_LENGTH = struct.Struct("<I")


def frame(body: bytes) -> bytes:
    """A message with its length in front."""
    return _LENGTH.pack(len(body)) + body


class FrameDecoder:
    """Cuts a byte stream into the bodies of its messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The bodies completed by ``data``.

        Raises:
            CommunicatorError: a length that no message of ours has; the stream is out of step.
        """
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MAX_FRAME_BYTES:
                raise CommunicatorError(f"a message claims {length} bytes; at most {MAX_FRAME_BYTES} are sent")
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            yield bytes(memoryview(self._buffer)[start + _LENGTH.size : end])
            start = end
        del self._buffer[:start]
