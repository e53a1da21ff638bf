# SPDX-License-Identifier: Apache-2.0
"""One client process: it makes its requests, waits for the common start, sends them in time and reports what came."""

from __future__ import annotations

import asyncio
import gc
import resource
import sys
import time
from collections.abc import Iterator

import msgspec
import numpy as np

from phalanx.launch.load.messages import Answer, Answers, ClientMessage, Load, Ready, Tokens
from phalanx.launch.load.stream import Target, send

__all__ = ["arrival_times", "main", "request_bodies"]

REPORT_SECONDS = 0.5


def main() -> int:
    """Read a `Load` from the first line of standard input, the start from the second; write messages to standard output."""
    load = msgspec.json.decode(sys.stdin.buffer.readline(), type=Load)
    _raise_descriptor_limit()
    gc.disable()  # a collection would be measured as a gap
    bodies, times = request_bodies(load), arrival_times(load)
    _say(Ready())
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=float)
    _say(Answers(asyncio.run(_run(load, bodies, [start + offset for offset in times]))))
    return 0


def request_bodies(load: Load) -> list[bytes]:
    """This client's requests."""
    shape = (load.num_prompts, load.input_len)
    prompts = np.random.default_rng(load.seed).integers(0, load.vocab_size, shape)[load.client :: load.num_clients]
    fields = {
        "model": load.model, "max_tokens": load.output_len, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    return [msgspec.json.encode({**fields, "prompt": prompt.tolist()}) for prompt in prompts]


def arrival_times(load: Load) -> list[float]:
    """When this client's requests may be sent, in seconds after the start."""
    if load.request_rate is None:
        return [0.0] * len(range(load.client, load.num_prompts, load.num_clients))
    shape = load.burstiness
    gaps = np.random.default_rng(load.seed + 1).gamma(shape, 1 / (shape * load.request_rate), load.num_prompts)
    return [float(offset) for offset in np.cumsum(gaps)[load.client :: load.num_clients]]


async def _run(load: Load, bodies: list[bytes], times: list[float]) -> list[Answer]:
    target, waiting, answers = Target(load.url, load.key), iter(zip(bodies, times, strict=True)), list[Answer]()
    num_tokens = 0

    def count() -> None:
        nonlocal num_tokens
        num_tokens += 1

    async def report() -> None:
        nonlocal num_tokens
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            _say(Tokens(num_tokens))
            num_tokens = 0

    async def work(requests: Iterator[tuple[bytes, float]]) -> None:
        for body, when in requests:
            await asyncio.sleep(max(0.0, when - time.monotonic()))
            answers.append(await send(target, body, count))

    reporting = asyncio.create_task(report())
    await asyncio.gather(*(work(waiting) for _ in range(min(load.max_concurrency, len(bodies)))))
    reporting.cancel()
    return answers


def _say(message: ClientMessage) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


def _raise_descriptor_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
