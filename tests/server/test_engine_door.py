"""Under a supervisor, engines follow one another through the door of an HTTP process, which may notice late that one has ended."""

from __future__ import annotations

import asyncio
import socket
import threading
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from phalanx.runtime.server import garbage
from phalanx.runtime.server.link import supervisor_link
from phalanx.runtime.server.link.engine_client import EngineClient, ServerState
from phalanx.runtime.server.link.messages import Failed, Job, ModelInfo, Phase, encode_frame
from phalanx.runtime.server.link.supervisor_link import EngineDoor
from phalanx.runtime.server.process import _load
from phalanx.runtime.text import Tokenizer

from .engine_clients import make_client

MODEL = encode_frame(ModelInfo("/model", 277, 512, 8))
Connect = Callable[[], Awaitable[socket.socket]]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


def run(body: Callable[[EngineClient, Connect], Awaitable[None]]) -> list[ServerState]:
    """With a client behind a door, and a way to connect to it; the states that its supervisor heard of."""
    heard: list[ServerState] = []
    name = f"\0phalanx-test-{uuid.uuid4().hex}"

    async def go() -> None:
        client = make_client(on_change=heard.append)
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(lambda: EngineDoor(client), name)
        opened = []

        async def connect() -> socket.socket:
            opened.append(socket.socket(socket.AF_UNIX))
            opened[-1].setblocking(False)
            await loop.sock_connect(opened[-1], name)
            return opened[-1]

        await body(client, connect)
        for sock in opened:
            sock.close()
        await until(lambda: not client.is_connected)
        server.close()

    asyncio.run(asyncio.wait_for(go(), 30))
    return heard


async def enter(client: EngineClient, connect: Connect, job: int) -> socket.socket:
    """Connect as the engine of a job, and be let in."""
    engine = await connect()
    engine.sendall(encode_frame(Job(job)))
    await until(lambda: client.job == job)
    return engine


def test_an_engine_that_comes_before_the_end_of_the_last_one_was_noticed_takes_its_place() -> None:
    async def body(client: EngineClient, connect: Connect) -> None:
        first = await enter(client, connect, 1)
        client.serve()
        second = await connect()
        second.sendall(encode_frame(Job(2)) + encode_frame(Phase("loading weights")))
        first.sendall(encode_frame(Failed("rank 1 has ended")))
        first.close()
        await until(lambda: client.job == 2)
        assert (client.is_connected, client.state, client.phase) == (True, ServerState.STARTING, "loading weights")
        client.serve()
        assert (await asyncio.get_running_loop().sock_recv(second, 1 << 16)).count(b"FrontendReady") == 1

    heard = run(body)
    assert heard[:2] == [ServerState.SERVING, ServerState.STARTING]


def test_a_tokenizer_that_is_loaded_after_the_end_of_its_engine_opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that loads meanwhile says itself when it is ready."""
    may_end = threading.Event()
    monkeypatch.setattr(Tokenizer, "from_directory", lambda _: may_end.wait(30))
    monkeypatch.setattr(garbage, "collect_seldom", lambda _: None)

    async def body(client: EngineClient, connect: Connect) -> None:
        first = await connect()
        first.sendall(MODEL)
        await until(lambda: client.model is not None)
        model = client.model
        assert model is not None
        with ThreadPoolExecutor(2) as workers:
            services = SimpleNamespace(client=client, workers=workers)
            loading = asyncio.create_task(_load(services, model))
            first.close()
            await until(lambda: not client.is_connected)
            second = await connect()
            await until(lambda: client.is_connected)
            may_end.set()
            await loading
            assert client.state is ServerState.STARTING
            second.sendall(MODEL)
            await until(lambda: client.model is not model)
            assert client.model is not None
            await _load(services, client.model)
        assert client.state is ServerState.SERVING

    assert run(body).count(ServerState.SERVING) == 1


def test_an_engine_whose_launcher_alone_was_killed_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_link, "PREDECESSOR_SECONDS", 0.0)

    async def body(client: EngineClient, connect: Connect) -> None:
        first = await enter(client, connect, 1)
        await enter(client, connect, 2)
        assert await asyncio.get_running_loop().sock_recv(first, 1) == b""

    run(body)


def test_an_engine_that_has_ended_before_it_was_let_in_is_heard_all_the_same() -> None:
    async def body(client: EngineClient, connect: Connect) -> None:
        first = await enter(client, connect, 1)
        second = await connect()
        second.sendall(encode_frame(Job(2)))
        second.close()
        first.close()
        await until(lambda: client.job == 2 and not client.is_connected)
        assert client.state is ServerState.STARTING

    run(body)
