# SPDX-License-Identifier: Apache-2.0
"""The engine's end of the socket pair: never blocks a step, keeps what the HTTP process has not read yet."""

from __future__ import annotations

import select
import socket
import threading
import time

import msgspec

from phalanx.parallel.errors import CommunicatorError
from phalanx.runtime.server.link.messages import FrameDecoder, FromFrontend, ToFrontend, encode_frame

__all__ = ["FrontendChannel"]

_READ_BYTES = 1 << 18


class FrontendChannel:
    """Messages to and from the HTTP process. One thread receives; any may send, as the one that watches the ranks does."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._frames = FrameDecoder()
        self._decoder = msgspec.msgpack.Decoder(FromFrontend)
        self._unsent = bytearray()
        self._sending = threading.Lock()

    def send(self, message: ToFrontend) -> None:
        """Send now what the socket takes, keep the rest for the next call of `send` or `receive`.

        Raises:
            CommunicatorError: the HTTP process is gone.
        """
        data = encode_frame(message)
        with self._sending:
            self._unsent += data
        self._flush()

    def receive(self, timeout_seconds: float) -> list[FromFrontend]:
        """What has arrived, after waiting for at most ``timeout_seconds`` for the first of it.

        Raises:
            CommunicatorError: the HTTP process is gone.
        """
        events = self._wait(select.POLLIN | (select.POLLOUT if self._unsent else 0), timeout_seconds)
        if events & select.POLLOUT:
            self._flush()
        return self._read() if events & ~select.POLLOUT else []

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until everything is sent; False when time ran out or the HTTP process is gone."""
        deadline = time.monotonic() + timeout_seconds
        try:
            while self._unsent:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._wait(select.POLLOUT, left)
                self._flush()
        except CommunicatorError:
            return False
        return True

    def close(self) -> None:
        """Close this end, which ends the HTTP process."""
        self._sock.close()

    def _wait(self, events: int, timeout_seconds: float) -> int:
        """Which of ``events`` the socket is ready for, or that it failed; 0 when time ran out. Unlike select, for any descriptor."""
        poll = select.poll()
        poll.register(self._sock, events)
        ready = poll.poll(max(0.0, timeout_seconds) * 1000)
        return ready[0][1] if ready else 0

    def _read(self) -> list[FromFrontend]:
        try:
            data = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise _gone() from error
        if not data:
            raise _gone()
        return [self._decoder.decode(body) for body in self._frames.feed(data)]

    def _flush(self) -> None:
        try:
            with self._sending:
                while self._unsent:
                    sent = self._sock.send(self._unsent)
                    del self._unsent[:sent]
        except BlockingIOError:
            pass
        except OSError as error:
            raise _gone() from error


def _gone() -> CommunicatorError:
    return CommunicatorError("the HTTP process is gone; see its last message above, then start the server again")
