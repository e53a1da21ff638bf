"""When a request must be over, from its arrival on."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from phalanx.runtime.sampling.guides import Guide
from phalanx.runtime.server.board import Board, Room
from phalanx.runtime.server.errors import ApiError
from phalanx.runtime.server.guides import GuideChecker
from phalanx.runtime.server.link.messages import ModelInfo
from phalanx.runtime.server.metrics import Metrics
from phalanx.runtime.server.openai.generation_job import start_job
from phalanx.runtime.server.openai.parsing import Generation
from phalanx.runtime.server.services import Services
from phalanx.runtime.server.settings import FrontendSettings
from phalanx.runtime.server.time_limit import TimeLimit
from phalanx.runtime.text import Tokenizer

from .engine_clients import make_client


def test_the_strictest_limit_counts_from_the_arrival() -> None:
    limit = TimeLimit.shortest(100.0, None, 3.0, 2.0)
    assert (limit.deadline, limit.is_over) == (102.0, time.monotonic() >= 102.0)
    assert TimeLimit.shortest(100.0, None, None) == TimeLimit(100.0)
    assert not TimeLimit(0.0).is_over


def test_what_is_awaited_ends_with_the_time() -> None:
    async def wait() -> None:
        async with TimeLimit(time.monotonic() - 10.0, 5.0).enforced():
            await asyncio.Event().wait()

    with pytest.raises(ApiError, match="the request took longer than 5 s") as refusal:
        asyncio.run(wait())
    assert refusal.value.status == 408


def test_a_guide_is_not_compiled_longer_than_its_request_may_take(model_directory: Path) -> None:
    may_end = threading.Event()

    def compile_slowly(guide: Guide) -> None:
        assert may_end.wait(60)

    board = Board.of_one()
    room = Room(board)
    client = make_client(room)
    client.model = ModelInfo(str(model_directory), 400, 256, 8)
    with ThreadPoolExecutor(1) as workers:
        tokenizer = Tokenizer.from_directory(model_directory)
        guides = GuideChecker(compile_slowly)
        services = Services(client, FrontendSettings(), Metrics(board, room), workers, tokenizer, guides)
        guided = {"structured_outputs": Guide("regex", "a")}
        generation = Generation(None, ["ab"], 1, guided, 3, "max_tokens", None, add_special_tokens=True)
        try:
            with pytest.raises(ApiError, match=r"longer than 0\.05 s"):
                asyncio.run(start_job(services, [generation], TimeLimit(time.monotonic(), 0.05)))
        finally:
            may_end.set()
    with client.admit(8):
        """The refused request has left its place to others."""
