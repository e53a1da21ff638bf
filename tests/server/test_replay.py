"""A request that the engine is lost under before it was sent: under a supervisor the next engine answers it."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from phalanx.runtime.server.board import Board, Room
from phalanx.runtime.server.errors import ApiError
from phalanx.runtime.server.link.engine_client import EngineClient
from phalanx.runtime.server.link.messages import ModelInfo, encode_frame
from phalanx.runtime.server.metrics import Metrics
from phalanx.runtime.server.openai.generation_job import start_job
from phalanx.runtime.server.openai.parsing import Generation
from phalanx.runtime.server.services import Services
from phalanx.runtime.server.settings import FrontendSettings
from phalanx.runtime.server.time_limit import TimeLimit
from phalanx.runtime.text import Tokenizer

from .engine_clients import RecordingTransport, connect, make_client, submitted

GENERATION = Generation(None, ["ab"], 1, {}, 4, "max_tokens", None, add_special_tokens=True)
MODEL = encode_frame(ModelInfo("/model", 277, 512, 8))


def connect_engine(client: EngineClient) -> RecordingTransport:
    transport = connect(client)
    client.data_received(MODEL)
    return transport


@pytest.mark.parametrize("is_last", [False, True], ids=["another engine comes", "no other engine"])
def test_a_request_whose_prompt_is_encoded_meanwhile(is_last: bool, model_directory: Path) -> None:
    async def run() -> None:
        client = make_client(on_change=lambda _: None)
        board, workers = Board.of_one(), ThreadPoolExecutor(1)
        metrics, tokenizer = Metrics(board, Room(board)), Tokenizer.from_directory(model_directory)
        services = Services(client, FrontendSettings(), metrics, workers, tokenizer)
        first = connect_engine(client)
        client.serve()
        limit = TimeLimit(time.monotonic(), 1000.0)
        starting = asyncio.ensure_future(start_job(services, [GENERATION], limit))
        await asyncio.sleep(0)
        client.connection_lost(None)
        if is_last:
            client.fail("the ranks ended with status 1")
            with pytest.raises(ApiError, match="the ranks ended with status 1"):
                await starting
        else:
            second = connect_engine(client)
            await asyncio.sleep(0)
            assert submitted(second) == []
            client.serve()
            job = await starting
            assert (len(submitted(first)), len(submitted(second))) == (0, 1)
            job.close()
        workers.shutdown()

    asyncio.run(asyncio.wait_for(run(), 30))
