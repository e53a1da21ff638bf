"""The HTTP side's end of the engine's connection, without an engine: clients that nothing reacts to, and what they send."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import msgspec

from phalanx.runtime.request import Request
from phalanx.runtime.server.board import Board, Room
from phalanx.runtime.server.link.engine_client import EngineClient
from phalanx.runtime.server.link.messages import FrameDecoder, FromFrontend, Submit

__all__ = ["RecordingTransport", "connect", "make_client", "submitted"]


class RecordingTransport(asyncio.Transport):
    """Keeps what is written to the engine at the other end of ``sock``."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__({"socket": sock})
        self.written = bytearray()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data


def make_client(room: Room | None = None, **options: Any) -> EngineClient:
    """Of a process alone, not connected; ``options`` are those of `EngineClient`."""
    silent: dict[str, Any] = {"load_model": lambda _: None, "on_gone": lambda: None, "on_stats": lambda _: None}
    return EngineClient(room=room or Room(Board.of_one()), **{**silent, **options})


def connect(client: EngineClient) -> RecordingTransport:
    """Connect it to what seems to be an engine of this process."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        transport = RecordingTransport(ours)
        client.connection_made(transport)
    return transport


def submitted(transport: RecordingTransport) -> list[Request]:
    """The requests that the engine has been sent."""
    frames = FrameDecoder().feed(bytes(transport.written))
    messages = [msgspec.msgpack.decode(body, type=FromFrontend) for body in frames]
    return [message.request for message in messages if isinstance(message, Submit)]
