"""An engine whose process is silent is ended by the HTTP side, where no other rank does it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from phalanx.runtime.server.link.engine_client import EngineClient
from phalanx.runtime.server.link.messages import Pulse, encode_frame
from phalanx.runtime.server.link.pulse import CHECK_SECONDS, RANKS_FIRST_SECONDS, PulseCheck

from .engine_clients import connect, make_client
from .jobs import serve
from .test_lifecycle import events
from .test_serve import LONG, tiny
from .test_supervise import PATH, engine, supervised
from .test_unusual_faults import serve_faulty

__all__ = ["tiny"]

SERVING, STARTING = 30.0, 300.0
BLOCKS_PYTHON = "ctypes.PyDLL(None).sleep(1000)"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def run(body: Callable[[EngineClient, PulseCheck, Clock], None]) -> None:
    """With a client whose engine is connected and has given a sign of life."""

    async def go() -> None:
        clock = Clock()
        client = make_client(clock=clock)
        connect(client)
        client._engine_process = 0  # it is this one
        client.data_received(encode_frame(Pulse()))
        body(client, PulseCheck(client, SERVING, STARTING, clock), clock)

    asyncio.run(go())


def check_for(check: PulseCheck, clock: Clock, seconds: float) -> None:
    end = clock.now + seconds
    while clock.now < end:
        clock.now += CHECK_SECONDS
        check.check()


@pytest.mark.parametrize(("is_serving", "limit"), [(True, SERVING), (False, STARTING)], ids=["serving", "starting"])
def test_silence_has_a_limit(is_serving: bool, limit: float) -> None:
    def body(client: EngineClient, check: PulseCheck, clock: Clock) -> None:
        if is_serving:
            client.serve()
        check_for(check, clock, limit + RANKS_FIRST_SECONDS - 1)
        client.data_received(encode_frame(Pulse()))
        check_for(check, clock, limit + RANKS_FIRST_SECONDS)
        assert client.failure is None
        check_for(check, clock, CHECK_SECONDS)
        assert client.failure is not None
        assert "has given no sign of life for" in client.failure

    run(body)


def test_time_in_which_this_process_was_suspended_does_not_count() -> None:
    def body(client: EngineClient, check: PulseCheck, clock: Clock) -> None:
        client.serve()
        clock.now += 1000.0
        check.check()
        check_for(check, clock, SERVING)
        assert client.failure is None

    run(body)


def test_a_sign_of_life_that_waited_here_meanwhile_is_not_of_the_future() -> None:
    def body(client: EngineClient, check: PulseCheck, clock: Clock) -> None:
        client.serve()
        clock.now += 1000.0
        client.data_received(encode_frame(Pulse()))
        check.check()
        assert client.pulse_at == clock.now

    run(body)


def test_before_the_first_sign_of_life_and_after_the_end_nothing_is_expected() -> None:
    def body(client: EngineClient, check: PulseCheck, clock: Clock) -> None:
        client.pulse_at = None
        check_for(check, clock, 2 * STARTING)
        assert client.failure is None
        client.data_received(encode_frame(Pulse()))
        client.connection_lost(None)
        failure = client.failure
        check_for(check, clock, 2 * STARTING)
        assert client.failure == failure

    run(body)


def test_a_stopped_server_of_one_rank_ends_and_its_clients_are_told(tiny: Path) -> None:
    with serve(0, "--model", str(tiny), "--load-format", "dummy", "--stall-timeout", "2") as job:
        stream = job.server.open_stream(PATH, LONG)
        os.kill(job.server.process.pid, signal.SIGSTOP)
        error = events(stream)[-1]["error"]
        assert error["code"] == "engine_failed"
        assert f"pid {job.server.process.pid}) has given no sign of life" in error["message"]
        assert job.server.wait()[0] == -signal.SIGKILL


@pytest.mark.slow
def test_a_stopped_rank_is_started_again_by_its_supervisor(tiny: Path) -> None:
    with supervised(tiny, 1, "--stall-timeout", "2") as job:
        os.kill(engine(job), signal.SIGSTOP)
        job.server.wait_for("READY", 2)
        assert job.server.post(PATH, {"prompt": "ab", "max_tokens": 2}).status == 200
        os.kill(job.server.process.pid, signal.SIGTERM)
        assert job.server.wait()[0] == 0


@pytest.mark.slow
def test_code_that_keeps_the_only_rank_from_running_ends_it(tiny: Path, tmp_path: Path) -> None:
    with serve_faulty(tiny, tmp_path, {0: BLOCKS_PYTHON}, "--tp", "1", num_ranks=0) as (job, trigger):
        stream = job.server.open_stream(PATH, LONG)
        trigger.touch()
        assert "no sign of life" in events(stream)[-1]["error"]["message"]
        assert job.server.wait()[0] == -signal.SIGKILL
