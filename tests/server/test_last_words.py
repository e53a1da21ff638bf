"""What rank 0 says before it ends: kept until it has ended, so that nothing this process writes cuts its report off."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

import pytest

from phalanx.runtime.request import SamplingParams
from phalanx.runtime.server.board import Board, Room
from phalanx.runtime.server.link import engine_client
from phalanx.runtime.server.link.engine_client import EngineClient, ServerState
from phalanx.runtime.server.link.messages import Failed, encode_frame

from .test_shared_prompts import RecordingTransport


def after_failure(then: Callable[[EngineClient], None]) -> EngineClient:
    """A client with an open request that has heard why its engine ends, and again in fewer words; what comes ``then``."""

    async def run() -> EngineClient:
        client = EngineClient(lambda model: None, lambda: None, lambda stats: None, Room(Board.of_one()))
        ours, theirs = socket.socketpair()
        with ours, theirs:
            client.connection_made(RecordingTransport(ours))
        client.serve()
        client.submit([((1, 2), SamplingParams())], None)
        client.data_received(encode_frame(Failed("rank 3 (host, pid 7) has ended")) + encode_frame(Failed("ended")))
        then(client)
        await asyncio.sleep(0)
        return client

    return asyncio.run(run())


def test_nothing_is_written_until_rank_0_has_ended(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "phalanx.server"):
        client = after_failure(lambda client: None)
        assert client.state is ServerState.SERVING
        assert not caplog.records


def test_the_first_words_are_told_when_rank_0_has_ended(caplog: pytest.LogCaptureFixture) -> None:
    client = after_failure(lambda client: client.connection_lost(None))
    assert client.failure == "rank 3 (host, pid 7) has ended"
    assert [record.message for record in caplog.records] == ["the engine stopped: rank 3 (host, pid 7) has ended"]


def test_a_rank_0_that_does_not_end_is_waited_for_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "REPORT_SECONDS", 0.0)

    async def run() -> EngineClient:
        client = EngineClient(lambda model: None, lambda: None, lambda stats: None, Room(Board.of_one()))
        client.data_received(encode_frame(Failed("rank 3 (host, pid 7) has ended")))
        while client.failure is None:
            await asyncio.sleep(0)
        return client

    assert asyncio.run(run()).failure == "rank 3 (host, pid 7) has ended"
