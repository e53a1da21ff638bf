# SPDX-License-Identifier: Apache-2.0
"""The engine's ends of the socket pairs: they never block a step, and keep what an HTTP process has not read yet."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

import msgspec

from phalanx.parallel.errors import CommunicatorError
from phalanx.runtime.server.link.messages import FrameDecoder, FromFrontend, ToFrontend, encode_frame

__all__ = ["Channel", "FrontendChannel", "FrontendChannels", "ReplicaChannel"]

REQUEST_BYTES = 1 << 15
"""What a leader reads of an HTTP process before its next step: some 30 requests, a millisecond of work. The rest of a burst waits."""
MESSAGE_BYTES = 1 << 20
"""What is read at most of one message that is longer: a prompt of 100,000 tokens needs no dozen steps to arrive."""
DELTA_BYTES = 1 << 18
"""What rank 0 reads of another leader: more than one step writes, so that nothing piles up."""

Sent = TypeVar("Sent", FromFrontend, ToFrontend)
Received = TypeVar("Received", FromFrontend, ToFrontend)


class Channel(Generic[Sent, Received]):
    """Messages to and from another process. One thread receives; any may send, as the one that watches the ranks does.

    Args:
        name: of the process, for errors.
        received: the type of its messages.
        read_bytes: most that one `read` takes, unless a longer message comes.
    """

    def __init__(self, sock: socket.socket, name: str, received: Any, read_bytes: int) -> None:
        sock.setblocking(False)
        self._read_bytes = read_bytes
        self.name = name
        self._sock = sock
        self._frames = FrameDecoder()
        self._decoder: msgspec.msgpack.Decoder[Received] = msgspec.msgpack.Decoder(received)
        self._unsent = bytearray()
        self._sending = threading.Lock()

    @property
    def has_unsent(self) -> bool:
        """Whether something waits until the process reads."""
        return bool(self._unsent)

    def fileno(self) -> int:
        """Of the socket, for poll."""
        return self._sock.fileno()

    def send(self, *messages: Sent) -> None:
        """Send now what the socket takes, keep the rest for the next call of `send` or `flush`.

        Raises:
            CommunicatorError: the other end is closed.
        """
        data = b"".join(map(encode_frame, messages))
        with self._sending:
            self._unsent += data
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes now.

        Raises:
            CommunicatorError: the other end is closed.
        """
        try:
            with self._sending:
                while self._unsent:
                    sent = self._sock.send(self._unsent)
                    del self._unsent[:sent]
        except BlockingIOError:
            pass
        except OSError as error:
            raise self._gone() from error

    def read(self) -> list[Received]:
        """What has arrived, as far as ``read_bytes`` go, or up to the end of a longer message.

        Raises:
            CommunicatorError: the other end is closed.
        """
        messages: list[Received] = []
        num_bytes = 0
        while not messages and num_bytes < MESSAGE_BYTES and (data := self._receive()):
            num_bytes += len(data)
            messages = [self._decoder.decode(body) for body in self._frames.feed(data)]
        return messages

    def _receive(self) -> bytes:
        """Some bytes; none if none are there."""
        try:
            data = self._sock.recv(self._read_bytes)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise self._gone() from error
        if not data:
            raise self._gone()
        return data

    def close(self) -> None:
        """Close this end, which ends an HTTP process."""
        self._sock.close()

    def _gone(self) -> CommunicatorError:
        return CommunicatorError(f"{self.name} is gone; see its last message above, then start the server again")


class FrontendChannel(Channel[ToFrontend, FromFrontend]):
    """A leader's channel to what sends it requests: an HTTP process, or on another replica's leader rank 0."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        super().__init__(sock, name, FromFrontend, REQUEST_BYTES)


class ReplicaChannel(Channel[FromFrontend, ToFrontend]):
    """Rank 0's channel to another replica's leader."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        super().__init__(sock, name, ToFrontend, DELTA_BYTES)


class FrontendChannels:
    """The channels to all HTTP processes of a server, in the order of their numbers."""

    def __init__(self, channels: Sequence[FrontendChannel]) -> None:
        self._channels = tuple(channels)

    def __len__(self) -> int:
        return len(self._channels)

    def __getitem__(self, process: int) -> FrontendChannel:
        return self._channels[process]

    def send(self, message: ToFrontend) -> None:
        """Send a message to every process.

        Raises:
            CommunicatorError: one of them is gone; the others get it all the same.
        """
        errors = []
        for channel in self._channels:
            try:
                channel.send(message)
            except CommunicatorError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def receive(self, timeout_seconds: float) -> list[tuple[int, FromFrontend]]:
        """What has arrived from which process, after waiting for at most ``timeout_seconds`` for the first of it.

        Raises:
            CommunicatorError: a process is gone.
        """
        received: list[tuple[int, FromFrontend]] = []
        for process, events in self._wait(select.POLLIN, timeout_seconds):
            channel = self._channels[process]
            if events & select.POLLOUT:
                channel.flush()
            if events & ~select.POLLOUT:
                received += [(process, message) for message in channel.read()]
        return received

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until everything is sent to every process that is still there; False when time ran out or one is gone."""
        deadline, is_complete = time.monotonic() + timeout_seconds, True
        gone: set[int] = set()
        while any(channel.has_unsent for process, channel in enumerate(self._channels) if process not in gone):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            for process, _ in self._wait(0, left, gone):
                try:
                    self._channels[process].flush()
                except CommunicatorError:
                    gone.add(process)
                    is_complete = False
        return is_complete

    def close(self) -> None:
        """Close all of them, which ends the HTTP processes."""
        for channel in self._channels:
            channel.close()

    def _wait(
        self, interest: int, timeout_seconds: float, without: set[int] | frozenset[int] = frozenset()
    ) -> Iterator[tuple[int, int]]:
        """Which sockets are ready for what, or failed. Unlike select, poll takes any descriptor."""
        poll = select.poll()
        processes = {}
        for process, channel in enumerate(self._channels):
            events = interest | (select.POLLOUT if channel.has_unsent else 0)
            if process not in without and events:
                processes[channel.fileno()] = process
                poll.register(channel, events)
        for descriptor, events in poll.poll(max(0.0, timeout_seconds) * 1000):
            yield processes[descriptor], events
