# SPDX-License-Identifier: Apache-2.0
"""An HTTP process's link to the supervisor that started it, where engines come and go."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import msgspec

from phalanx.parallel.peers import peer_of
from phalanx.runtime.server.link.engine_client import EngineClient, ServerState
from phalanx.runtime.server.link.messages import (
    DrainRequest,
    EngineGone,
    Failed,
    FrameDecoder,
    FromFrontend,
    FrontendReady,
    Phase,
    Stop,
    ToFrontend,
    encode_frame,
)

__all__ = ["EngineDoor", "SupervisorLink"]

PREDECESSOR_SECONDS = 2.0
"""How long an engine waits for the end of the one before."""
POLL_SECONDS = 0.02


class SupervisorLink(asyncio.Protocol):
    """Tells the supervisor when requests are answered, a drain begins or the engine is lost; is told when no further engine comes."""

    def __init__(self, client: EngineClient, on_gone: Callable[[], None]) -> None:
        self._client, self._on_gone = client, on_gone
        self._frames = FrameDecoder()
        self._decoder = msgspec.msgpack.Decoder(ToFrontend)
        self._transport: asyncio.Transport | None = None

    def tell(self, state: ServerState) -> None:
        """The server is in another state."""
        job = self._client.job
        messages: dict[ServerState, FromFrontend] = {
            ServerState.STARTING: EngineGone(job),
            ServerState.SERVING: FrontendReady(job),
            ServerState.DRAINING: DrainRequest(),
            ServerState.FAILED: EngineGone(job),
        }
        if self._transport is not None:
            self._transport.write(encode_frame(messages[state]))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for body in self._frames.feed(data):
            match self._decoder.decode(body):
                case Phase(text):
                    self._client.phase = text
                case Failed(text):
                    self._client.fail(text, is_said=self._client.state is ServerState.STARTING)
                case Stop():
                    self._leave()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._leave()

    def _leave(self) -> None:
        if self._client.state is ServerState.STARTING:
            self._client.fail("the server was told to end", is_said=True)
        self._on_gone()


class EngineDoor(asyncio.Protocol):
    """Where engines connect, one after the other: lets this user's processes through to the client, and no others.

    An engine may come before this process has noticed the end of the one before, if it was held up, or while that one still runs because
    only its launcher was killed. It waits for the other's end, or ends the connection.
    """

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._early = bytearray()
        self._is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if peer_of(transport.get_extra_info("socket")).user != os.getuid():
            transport.abort()
            return
        loop = asyncio.get_running_loop()
        self._enter(transport, loop, loop.time() + PREDECESSOR_SECONDS)

    def data_received(self, data: bytes) -> None:
        self._early += data

    def connection_lost(self, error: Exception | None) -> None:
        self._is_lost = True

    def _enter(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, give_up: float) -> None:
        if self._client.is_connected:
            if loop.time() >= give_up:
                self._client.disconnect()
            loop.call_later(POLL_SECONDS, self._enter, transport, loop, give_up)
            return
        transport.set_protocol(self._client)
        self._client.connection_made(transport)
        if self._early:
            self._client.data_received(bytes(self._early))
        if self._is_lost:
            self._client.connection_lost(None)
