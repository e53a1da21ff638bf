"""``launch.bench serve``: load from outside against any OpenAI-compatible server, timed as its clients see it."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np

from phalanx.launch.bench_report import summary
from phalanx.launch.progress import Progress
from phalanx.launch.version import installed_versions
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.launcher import launch_info

__all__ = ["run_serve"]

PATH = "/v1/completions"
CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 600.0
"""Longest wait for the next part of an answer: as long as OpenAI's own client waits."""


@dataclass(slots=True)
class _Answer:
    """One request's answer as it came.

    Attributes:
        start: when it was sent.
        arrivals: when each event with output came.
        usage: the server's own count; empty until the last event.
        error: why it failed; empty = it did not.
    """

    start: float
    arrivals: list[float] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)
    error: str = ""

    @property
    def output_tokens(self) -> int:
        """As the server counted them; servers that do not are taken to send one token an event."""
        return self.usage.get("completion_tokens", len(self.arrivals))

    @property
    def time_per_output_token(self) -> float:
        """Seconds between tokens after the first, on average."""
        return (self.arrivals[-1] - self.arrivals[0]) / (self.output_tokens - 1)


def run_serve(args: argparse.Namespace) -> dict[str, Any]:
    """Send ``args.num_prompts`` requests, at most ``args.max_concurrency`` at once; what ``--json`` holds.

    Raises:
        ConfigError: the server cannot be reached or refuses such requests, or a number is out of range.
    """
    for name in ("max_concurrency", "vocab_size"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(args, name)} is below 1; use at least 1")
    if launch_info().size > 1:
        raise ConfigError(f"launch.bench serve was started on {launch_info().size} ranks; start it without mpirun")
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> dict[str, Any]:
    async with _client(args) as client:
        model = await _model(client, args)
        bodies = _bodies(args, model)
        await _try_one(client, args, bodies[0])
        with Progress("measuring", args.num_prompts * args.output_len, "output tokens") as progress:
            start = time.perf_counter()
            answers = await _send_all(client, bodies, args.max_concurrency, progress)
            seconds = time.perf_counter() - start
    return _report(args, model, answers, seconds)


def _client(args: argparse.Namespace) -> httpx.AsyncClient:
    key = _read_key(args.api_key_file)
    try:
        return httpx.AsyncClient(
            base_url=args.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=args.max_concurrency),
            trust_env=False,
        )
    except httpx.InvalidURL as error:
        raise ConfigError(f"--url {args.url} is not a valid address ({error}); use http://HOST:PORT") from None


def _read_key(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text().split("\n", 1)[0].strip()
    except OSError as error:
        raise ConfigError(f"--api-key-file {path} cannot be read: {error.strerror}; check the path") from None


async def _model(client: httpx.AsyncClient, args: argparse.Namespace) -> str:
    """The name to ask for; the first question to the server, so it also finds out whether there is one.

    Raises:
        ConfigError: the address does not answer, or is not an OpenAI-compatible server.
    """
    try:
        response = await client.get("/v1/models")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(
            f"--url {args.url} cannot be reached ({str(error) or type(error).__name__}); start a server "
            "(python -m launch.serve), or correct the address: http://HOST:PORT"
        ) from None
    if response.status_code != 200:
        raise ConfigError(f"--url {args.url} refused /v1/models: {_refusal(response.status_code, response.content)}")
    if args.served_model_name is not None:
        return str(args.served_model_name)
    try:
        return str(msgspec.json.decode(response.content)["data"][0]["id"])
    except (msgspec.DecodeError, LookupError, TypeError):
        raise ConfigError(f"--url {args.url} lists no model at /v1/models; give --served-model-name") from None


def _refusal(status: int, content: bytes) -> str:
    """A server's error in a line, with the way out where we know it."""
    try:
        message = str(msgspec.json.decode(content)["error"]["message"])
    except (msgspec.DecodeError, LookupError, TypeError):
        message = content[:200].decode(errors="replace")
    ways_out = {
        401: "give --api-key-file", 403: "give --api-key-file", 404: "give --served-model-name, or another --url",
        429: "use a smaller --max-concurrency", 503: "wait until the server is ready",
    }  # fmt: skip
    way_out = ways_out.get(status, "change --input-len, --output-len or --vocab-size to fit the server's model")
    return f"{status} {' '.join(message.split())}; {way_out}"


def _bodies(args: argparse.Namespace, model: str) -> list[bytes]:
    prompts = np.random.default_rng(args.seed).integers(0, args.vocab_size, (args.num_prompts, args.input_len))
    fields = {
        "model": model, "max_tokens": args.output_len, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    return [msgspec.json.encode({**fields, "prompt": prompt.tolist()}) for prompt in prompts]


async def _try_one(client: httpx.AsyncClient, args: argparse.Namespace, body: bytes) -> None:
    """Warm up, and find out before the load whether the server takes such requests at all."""
    if error := (await _send(client, body)).error:
        raise ConfigError(f"--url {args.url} refused the first request: {error}")


async def _send_all(
    client: httpx.AsyncClient, bodies: list[bytes], max_concurrency: int, progress: Progress
) -> list[_Answer]:
    waiting: Iterator[bytes] = iter(bodies)
    answers: list[_Answer] = []

    async def work() -> None:
        for body in waiting:
            answer = await _send(client, body)
            answers.append(answer)
            progress.advance(answer.output_tokens)

    await asyncio.gather(*(work() for _ in range(min(max_concurrency, len(bodies)))))
    return answers


async def _send(client: httpx.AsyncClient, body: bytes) -> _Answer:
    answer = _Answer(time.perf_counter())
    try:
        async with client.stream("POST", PATH, content=body, headers={"Content-Type": "application/json"}) as response:
            if response.status_code != 200:
                answer.error = _refusal(response.status_code, await response.aread())
                return answer
            async for line in _lines(response.aiter_bytes()):
                if line.startswith(b"data: ") and line != b"data: [DONE]":
                    _take(answer, msgspec.json.decode(line[6:]))
    except (httpx.HTTPError, msgspec.DecodeError) as error:
        answer.error = f"{type(error).__name__}: {error}; look at the server's log"
    if not answer.arrivals and not answer.error:
        answer.error = "the stream ended without a token; look at the server's log"
    return answer


async def _lines(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Lines of an event stream: only CR and LF end one, not U+2028 and the like, which a text may hold."""
    rest = b""
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")
    if rest:
        yield rest


def _take(answer: _Answer, event: dict[str, Any]) -> None:
    if "error" in event:
        answer.error = str(event["error"].get("message", event["error"]))
    if event.get("choices"):
        answer.arrivals.append(time.perf_counter())
    if event.get("usage"):
        answer.usage = event["usage"]


def _report(args: argparse.Namespace, model: str, answers: list[_Answer], seconds: float) -> dict[str, Any]:
    done = [answer for answer in answers if not answer.error]
    output_tokens = sum(answer.output_tokens for answer in done)
    prompt_tokens = sum(answer.usage.get("prompt_tokens", args.input_len) for answer in done)
    return {
        "mode": "serve",
        "url": args.url,
        "model": model,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "num_prompts": args.num_prompts,
        "max_concurrency": args.max_concurrency,
        "completed_requests": len(done),
        "failed_requests": len(answers) - len(done),
        "errors": sorted({answer.error for answer in answers if answer.error})[:5],
        "seconds": seconds,
        "output_tokens": output_tokens,
        "requests_per_second": len(done) / seconds,
        "output_tokens_per_second": output_tokens / seconds,
        "total_tokens_per_second": (output_tokens + prompt_tokens) / seconds,
        "time_to_first_token_ms": summary([answer.arrivals[0] - answer.start for answer in done]),
        "time_per_output_token_ms": summary([a.time_per_output_token for a in done if a.output_tokens > 1]),
        "inter_token_latency_ms": summary([gap for answer in done for gap in np.diff(answer.arrivals)]),
        "versions": installed_versions(),
        "command": " ".join(["python -m launch.bench", *sys.argv[1:]]),
    }
