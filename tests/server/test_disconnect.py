"""What a request waits for is cancelled when its client leaves, in the request's own task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from phalanx.runtime.server.web.http import ClientGone, until_disconnect


class Connection:
    """A client that leaves when the test says so."""

    is_writable = True

    def __init__(self) -> None:
        self.is_lost = False
        self.callback: Callable[[], None] | None = None

    @property
    def scope(self) -> dict[str, Any]:
        return {"state": {"connection": self}}

    def write_body(self, data: bytes) -> None:
        raise AssertionError

    def call_when_writable(self, callback: Callable[[], None] | None) -> None:
        raise AssertionError

    def call_when_lost(self, callback: Callable[[], None] | None) -> None:
        self.callback = callback

    def leave(self) -> None:
        self.is_lost = True
        assert self.callback is not None
        self.callback()


async def endless(log: list[str]) -> None:
    log.append("begun")
    try:
        await asyncio.Event().wait()
    finally:
        log.append("ended")


def test_work_that_ends_gives_its_result_and_forgets_the_connection() -> None:
    connection = Connection()

    async def work() -> int:
        await asyncio.sleep(0)
        assert connection.callback is not None
        return 7

    assert asyncio.run(until_disconnect(connection.scope, work())) == 7
    assert connection.callback is None


def test_a_client_that_leaves_ends_the_work_and_the_task_goes_on() -> None:
    connection, log = Connection(), list[str]()

    async def request() -> None:
        with pytest.raises(ClientGone):
            await until_disconnect(connection.scope, endless(log))
        await asyncio.sleep(0)
        log.append("after")

    async def run() -> None:
        task = asyncio.create_task(request())
        await asyncio.sleep(0)
        connection.leave()
        await task
        assert not task.cancelling()

    asyncio.run(run())
    assert log == ["begun", "ended", "after"]
    assert connection.callback is None


def test_a_client_that_has_left_starts_no_work() -> None:
    connection, log = Connection(), list[str]()
    connection.is_lost = True
    with pytest.raises(ClientGone):
        asyncio.run(until_disconnect(connection.scope, endless(log)))
    assert log == []


def test_a_task_that_is_cancelled_itself_stays_cancelled() -> None:
    connection, log = Connection(), list[str]()

    async def run() -> None:
        task = asyncio.create_task(until_disconnect(connection.scope, endless(log)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert log == ["begun", "ended"]


def test_a_client_that_leaves_as_the_time_runs_out_has_left() -> None:
    connection, log = Connection(), list[str]()

    async def work() -> None:
        async with asyncio.timeout(0):
            await endless(log)

    async def run() -> None:
        task = asyncio.create_task(until_disconnect(connection.scope, work()))
        while not task.cancelling():
            await asyncio.sleep(0)
        connection.leave()
        with pytest.raises(ClientGone):
            await task

    asyncio.run(run())
