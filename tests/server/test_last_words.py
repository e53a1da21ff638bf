"""What rank 0 says before it ends: clients hear it at once, and this process's log waits, so that rank 0's report is not cut off."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Iterator

import pytest

from phalanx.runtime.request import SamplingParams
from phalanx.runtime.server.board import Board, Room
from phalanx.runtime.server.link import engine_client
from phalanx.runtime.server.link.engine_client import EngineClient
from phalanx.runtime.server.link.messages import Draining, Failed, encode_frame
from phalanx.runtime.server.web.log import hold_log, start_logging

from .engine_clients import connect, make_client

LOST = "rank 3 (host, pid 7) has ended"


def failed_client(told: list[bool]) -> EngineClient:
    """A client with an open request that has heard why its engine ends, and again in fewer words."""
    client = make_client(on_quiet=told.append)
    connect(client)
    client.serve()
    client.submit([((1, 2), SamplingParams())], None)
    client.data_received(encode_frame(Failed(LOST)) + encode_frame(Failed("ended")))
    return client


def test_clients_hear_the_first_words_at_once_and_nothing_is_written_until_rank_0_has_ended() -> None:
    told: list[bool] = []

    async def run() -> None:
        client = failed_client(told)
        assert client.failure == LOST
        assert told == [True]
        client.connection_lost(None)
        assert client.failure == LOST

    asyncio.run(run())
    assert told == [True, False]


def test_a_rank_0_that_does_not_end_is_waited_for_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "REPORT_SECONDS", 0.0)
    told: list[bool] = []

    async def run() -> None:
        failed_client(told)
        while told != [True, False]:
            await asyncio.sleep(0)

    asyncio.run(run())


@pytest.mark.parametrize("has_open", [False, True])
def test_a_rank_0_that_ends_after_a_drain_has_not_failed_though_its_stop_was_never_read(has_open: bool) -> None:
    gone: list[bool] = []
    room = Room(Board.of_one())
    client = make_client(room, on_gone=lambda: gone.append(True))
    if has_open:
        room.enter(1, 1)

    async def run() -> None:
        connect(client)
        client.serve()
        client.data_received(encode_frame(Draining()))
        client.connection_lost(BrokenPipeError())

    asyncio.run(run())
    assert (client.failure is not None) == has_open
    assert gone == [True]


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What a log writes to; the root logger is left as it was."""
    root, written = logging.getLogger(), io.StringIO()
    handlers, level = root.handlers[:], root.level
    yield written
    root.handlers[:], root.level = handlers, level


def test_a_held_log_writes_its_lines_later(stream: io.StringIO) -> None:
    log = start_logging(stream, "info", "text")
    hold_log(True)
    logging.getLogger("phalanx.server").info("a request has failed")
    assert stream.getvalue() == ""
    hold_log(False)
    log.stop()
    assert "a request has failed" in stream.getvalue()
