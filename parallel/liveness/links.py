"""A connection of the watch to another rank."""

from __future__ import annotations

import contextlib
import socket

import msgspec

from phalanx.parallel.frames import FrameDecoder
from phalanx.parallel.liveness.messages import Message, encode

__all__ = ["Link"]


class Link:
    """A connection to another rank; never blocks."""

    def __init__(self, rank: int, sock: socket.socket) -> None:
        self.rank, self.sock = rank, sock
        sock.setblocking(False)
        self._unsent = bytearray()
        self._frames = FrameDecoder()
        self._decoder = msgspec.msgpack.Decoder(Message)

    def send(self, message: Message, droppable: bool = False) -> None:
        """Send what the kernel takes now and keep the rest; a ``droppable`` message is left out when something waits.

        Raises:
            OSError: the other end is gone.
        """
        if droppable and self._unsent:
            self.flush()
            return
        self._unsent += encode(message)
        self.flush()

    def flush(self) -> bool:
        """Send what waits; whether all of it has left."""
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                del self._unsent[: self.sock.send(self._unsent)]
        return not self._unsent

    def receive(self) -> list[Message] | None:
        """What has arrived; None = the other end is gone."""
        try:
            data = self.sock.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            return None
        return [self._decoder.decode(body) for body in self._frames.feed(data)] if data else None

    def close(self) -> None:
        """Close this end."""
        self.sock.close()
