# SPDX-License-Identifier: Apache-2.0
"""Results of several replicas on rank 0 as each is done, so that an interruption loses no more of theirs than of its own."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from phalanx.parallel.connections import connect_ranks
from phalanx.parallel.errors import CommunicatorError
from phalanx.parallel.frames import FrameDecoder, frame

if TYPE_CHECKING:
    from phalanx.parallel.communicator import Communicator
    from phalanx.runtime.request import RequestOutput

__all__ = ["Gathering"]

RECEIVE_BYTES = 1 << 16


class Gathering:
    """Hands each result on once, whichever way it comes first. *Collective* to make.

    Where ranks cannot connect to rank 0, results of other replicas come at the end of a call, by `take_shared`.

    Args:
        num_replicas: without several there is nothing to gather.
        take: takes one result at a time, on rank 0 also in a thread.
    """

    def __init__(self, world: Communicator, num_replicas: int, take: Callable[[RequestOutput], None]) -> None:
        self._take, self._lock = take, threading.Lock()
        self._seen: set[int] = set()
        self._is_over = False
        self._error: Exception | None = None
        sockets, _ = connect_ranks(world) if num_replicas > 1 else ({}, None)
        self._rank_0 = sockets.get(0)
        for sock in sockets.values():
            sock.settimeout(None)
            if world.rank == 0:
                threading.Thread(target=self._receive, args=(sock,), name="results", daemon=True).start()

    def take(self, output: RequestOutput) -> None:
        """A result of this rank's replica; raises what kept one from being handed on."""
        if self._rank_0 is not None:
            import msgspec

            with contextlib.suppress(OSError):  # rank 0 is lost, which the watch says
                self._rank_0.sendall(frame(msgspec.msgpack.encode(output)))
        self.take_shared(output)

    def close(self) -> None:
        """Hand nothing on any more."""
        with self._lock:
            self._is_over = True
        if self._rank_0 is not None:
            self._rank_0.close()

    def take_shared(self, output: RequestOutput) -> None:
        """A result that this rank has been given; raises what kept one from being handed on."""
        with self._lock:
            if self._error is not None:
                raise self._error
            if not self._is_over and output.index not in self._seen:
                self._seen.add(output.index)
                try:
                    self._take(output)
                except Exception as error:
                    self._error = error
                    raise

    def _receive(self, sock: socket.socket) -> None:
        import msgspec

        from phalanx.runtime.request import RequestOutput

        frames, outputs = FrameDecoder(), msgspec.msgpack.Decoder(RequestOutput)
        with sock:
            while data := _received(sock):
                try:
                    for body in frames.feed(data):
                        self.take_shared(outputs.decode(body))
                except (OSError, CommunicatorError, msgspec.DecodeError) as error:
                    with self._lock:
                        self._error = self._error or error
                    return


def _received(sock: socket.socket) -> bytes:
    """Some bytes; none when the other end is gone."""
    try:
        return sock.recv(RECEIVE_BYTES)
    except OSError:
        return b""
