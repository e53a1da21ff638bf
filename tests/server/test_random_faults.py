"""Faults at random moments under streams: no hang, no orphan, no wrong token, every request ended once.

``make faults`` runs a hundred rounds of another seed (``PHALANX_FAULT_ROUNDS``, ``PHALANX_FAULT_SEED``).
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from .jobs import Job
from .test_serve import serve_tiny, tiny

__all__ = ["tiny"]

ROUNDS = int(os.environ.get("PHALANX_FAULT_ROUNDS", "4"))
SEED = int(os.environ.get("PHALANX_FAULT_SEED", "14"))
NUM_STREAMS = 32
REQUEST: dict[str, Any] = {
    "prompt": "ab",
    "max_tokens": 400,
    "ignore_eos": True,
    "temperature": 0,
    "return_token_ids": True,
}


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[int]:
    """The whole answer, from one rank that nothing happens to."""
    with serve_tiny(tiny, 0) as job:
        token_ids: list[int] = job.server.post("/v1/completions", REQUEST).json["choices"][0]["token_ids"]
        return token_ids


def follow_stream(job: Job) -> tuple[list[int], int]:
    """Its tokens, and how many ends it had: the error event or the finish reason."""
    connection = job.server.connect()
    connection.request("POST", "/v1/completions", json.dumps({**REQUEST, "stream": True}))
    response = connection.getresponse()
    token_ids: list[int] = []
    if response.status != 200:
        return token_ids, 1
    chunks = [line.removeprefix("data: ") for line in response.read().decode().split("\n\n") if line.strip()]
    assert chunks[-1] == "[DONE]"
    ends = 0
    for chunk in map(json.loads, chunks[:-1]):
        if "error" in chunk:
            ends += 1
        for choice in chunk.get("choices", ()):
            token_ids += choice["token_ids"]
            ends += choice["finish_reason"] is not None
    return token_ids, ends


@pytest.mark.parametrize("round_", range(ROUNDS))
def test_a_random_fault_ends_every_request_once_and_leaves_nothing(
    tiny: Path, expected: list[int], round_: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(SEED * 1000 + round_)
    rank, delay = draw.randrange(4), draw.uniform(0.0, 0.5)
    fault = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGSTOP])
    monkeypatch.setenv("PHALANX_CACHE_DIR", str(tmp_path))
    with serve_tiny(tiny, 4, "--stall-timeout", "4") as job:
        with ThreadPoolExecutor(NUM_STREAMS) as pool:
            streams = [pool.submit(follow_stream, job) for _ in range(NUM_STREAMS)]
            threading.Event().wait(delay)  # the drawn moment, not a wait for something
            os.kill(job.rank(rank), fault)
            results = [stream.result(30) for stream in streams]
        assert job.server.wait()[0] != 0
        assert job.seconds_until_gone() < 10
    for token_ids, ends in results:
        assert token_ids == expected[: len(token_ids)]
        assert ends == 1
