"""Several answers to one prompt reach the engine as requests that share its computation."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from phalanx.runtime.request import SamplingParams
from phalanx.runtime.server.board import Board, Room
from phalanx.runtime.server.link.engine_client import ServerState
from phalanx.runtime.server.metrics import Metrics
from phalanx.runtime.server.openai.generation_job import GenerationJob
from phalanx.runtime.server.services import Services
from phalanx.runtime.server.settings import FrontendSettings
from phalanx.runtime.server.time_limit import TimeLimit
from phalanx.runtime.text import Tokenizer

from .engine_clients import connect, make_client, submitted


def test_a_search_that_is_asked_once_more_is_one_search_again(model_directory: Path) -> None:
    client = make_client()
    transport = connect(client)
    client.state = ServerState.SERVING
    board = Board.of_one()
    metrics, workers = Metrics(board, Room(board)), ThreadPoolExecutor(1)
    services = Services(client, FrontendSettings(), metrics, workers, Tokenizer.from_directory(model_directory))
    job = GenerationJob(services, 2, TimeLimit(time.monotonic(), 1000.0), cache_salt="s")
    job.submit([((30, 31), SamplingParams(beam_width=2)), ((30, 31), SamplingParams(beam_width=2))])
    asyncio.run(job._submit_again())
    workers.shutdown()
    ids = [request.request_id for request in submitted(transport)]
    assert [request.fork_from for request in submitted(transport)] == [
        None,
        ids[0],
        None,
        ids[2],
        None,
        ids[4],
        None,
        ids[6],
    ]
    assert [request.num_followers for request in submitted(transport)] == [1, 0] * 4
    assert {request.cache_salt for request in submitted(transport)} == {"s"}


def test_requests_with_one_prompt_name_the_first_of_them() -> None:
    client = make_client()
    transport = connect(client)
    client.submit([(prompt, SamplingParams(seed=seed)) for prompt in ((1, 2), (3, 4)) for seed in range(3)], None)
    requests = submitted(transport)
    first, second = requests[0].request_id, requests[3].request_id
    assert [request.fork_from for request in requests] == [None, first, first, None, second, second]
