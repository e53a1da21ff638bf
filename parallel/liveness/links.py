# SPDX-License-Identifier: Apache-2.0
"""Connections of the watch to other ranks."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Mapping

import msgspec

from phalanx.parallel.frames import FrameDecoder
from phalanx.parallel.liveness.messages import Message, encode

__all__ = ["Link", "Links"]


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


class Links:
    """All connections of a rank: rank 0's to every other rank, another's to rank 0. Any thread may send."""

    def __init__(self, sockets: Mapping[int, socket.socket]) -> None:
        self._links = {rank: Link(rank, sock) for rank, sock in sockets.items()}
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Link]:
        return iter(list(self._links.values()))

    def forget(self, rank: int) -> None:
        """Its connection has ended."""
        del self._links[rank]

    def send(self, rank: int, message: Message) -> None:
        """To one rank, if it is still there."""
        with self._lock, contextlib.suppress(KeyError, OSError):
            self._links[rank].send(message)

    def send_all(self, message: Message, droppable: bool = False) -> None:
        """To all that are still there; the end of another shows when its connection is read."""
        with self._lock:
            for link in self:
                with contextlib.suppress(OSError):
                    link.send(message, droppable)

    def flush(self, seconds: float) -> None:
        """Wait until everything for those that are still there has left this process, or for ``seconds``."""
        deadline = time.monotonic() + seconds
        with self._lock:
            while any(map(_has_more, self)) and time.monotonic() < deadline:
                time.sleep(0.005)


def _has_more(link: Link) -> bool:
    """Send what waits; whether there is more of it for a rank that is still there."""
    try:
        return not link.flush()
    except OSError:
        return False
