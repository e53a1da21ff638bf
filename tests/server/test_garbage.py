"""Garbage collections of an HTTP process: of young objects only, but for those that run by the clock, and not needed for connections."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from phalanx.runtime.server.garbage import collect_seldom
from phalanx.runtime.server.web.h11_protocol import BoundedH11Protocol
from phalanx.runtime.server.web.http import ClientGone, until_disconnect


def test_many_new_objects_are_looked_at_once() -> None:
    before, loop, again = gc.get_threshold(), asyncio.new_event_loop(), []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] > 0:
            again.append(phase)

    try:
        collect_seldom(loop)
        assert gc.get_freeze_count() > 0
        gc.callbacks.append(note)
        kept = [[number] for number in range(300_000)]
        assert len(kept) == 300_000
        assert again == []
    finally:
        gc.callbacks.remove(note)
        gc.unfreeze()
        gc.set_threshold(*before)
        loop.close()


class ClosedTransport(asyncio.Transport):
    """Takes everything, and closes when it is told to."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """To nowhere."""

    def close(self) -> None:
        """As with a loop, `connection_lost` comes later."""

    def is_closing(self) -> bool:
        return False


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    with pytest.raises(ClientGone):
        await until_disconnect(scope, asyncio.sleep(3600))


def test_a_closed_connection_is_freed_without_a_collection() -> None:
    async def run() -> None:
        config = uvicorn.Config(answer, ws="none", lifespan="off", log_config=None)
        config.load()
        connection = BoundedH11Protocol(config, ServerState(), {})
        connection.connection_made(ClosedTransport())
        connection.data_received(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.sleep(0)
        (task,) = connection.tasks
        connection.connection_lost(None)
        await task
        freed = weakref.ref(connection)
        del connection, task
        await asyncio.sleep(0)
        assert freed() is None

    gc.collect()
    gc.disable()
    try:
        asyncio.run(run())
    finally:
        gc.enable()
