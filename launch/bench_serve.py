# SPDX-License-Identifier: Apache-2.0
"""``launch.bench serve``: load from outside against any OpenAI-compatible server, timed as its clients see it."""

from __future__ import annotations

import argparse
import asyncio
import math
import os
from collections.abc import Sequence
from typing import Any

import httpx
import msgspec
import numpy as np

from phalanx.launch.bench_report import summary
from phalanx.launch.load.client import request_bodies
from phalanx.launch.load.clients import run_clients
from phalanx.launch.load.health import HealthProbe
from phalanx.launch.load.messages import Answer, Load
from phalanx.launch.load.plot import check_plot, write_plot
from phalanx.launch.load.stream import CONNECT_SECONDS, Target, refusal, send
from phalanx.launch.progress import Progress
from phalanx.launch.version import installed_versions
from phalanx.parallel.errors import ConfigError
from phalanx.parallel.launcher import launch_info
from phalanx.runtime.server.web.api_keys import read_api_keys

__all__ = ["run_serve"]

MAX_DEFAULT_CLIENTS = 8


def run_serve(args: argparse.Namespace) -> dict[str, Any]:
    """Send ``args.num_prompts`` requests, at most ``args.max_concurrency`` at once; what ``--json`` holds.

    Raises:
        ConfigError: the server cannot be reached or refuses such requests, or a number is out of range.
    """
    _check(args)
    if args.num_clients is None:
        args.num_clients = max(1, min(MAX_DEFAULT_CLIENTS, len(os.sched_getaffinity(0)) // 4))
    args.num_clients = min(args.num_clients, args.max_concurrency, args.num_prompts)
    key = next(iter(read_api_keys(args.api_key_file)), b"").decode()
    model = _model(args, key)
    loads = _loads(args, model, key)
    _try_one(args, loads[0])
    health = HealthProbe(args.url)
    with Progress("measuring", args.num_prompts * args.output_len, "output tokens") as progress:
        health.start()
        answers, start = run_clients(loads, progress.advance)
    report = _report(args, model, answers, start, health.stop())
    if args.plot is not None:
        write_plot(args.plot, answers, start, f"{model}, {args.num_prompts} requests, {args.max_concurrency} at once")
    return report


def _check(args: argparse.Namespace) -> None:
    for name in ("max_concurrency", "vocab_size", "num_clients"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(args, name)} is below 1; use at least 1")
    for name in ("request_rate", "burstiness", "stream_gap", "first_token"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(args, name)} is not above 0; use a larger number")
    if args.plot is not None:
        check_plot(args.plot)
        if not os.access(args.plot.absolute().parent, os.W_OK):
            raise ConfigError(
                f"--plot {args.plot} cannot be written: {args.plot.parent} is missing or not writable; choose another place"
            )
    if launch_info().size > 1:
        raise ConfigError(f"phalanx bench serve was started on {launch_info().size} ranks; start it without mpirun")


def _model(args: argparse.Namespace, key: str) -> str:
    """The name to ask for; the first question to the server, so it also finds out whether there is one.

    Raises:
        ConfigError: nothing answers, or no OpenAI-compatible server does.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        response = httpx.get(
            args.url.rstrip("/") + "/v1/models", headers=headers, timeout=CONNECT_SECONDS, trust_env=False
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(
            f"--url {args.url} cannot be reached ({str(error) or type(error).__name__}); start a server "
            "(phalanx serve), or correct the address: http://HOST:PORT"
        ) from None
    if response.status_code != 200:
        raise ConfigError(f"--url {args.url} refused /v1/models: {refusal(response.status_code, response.content)}")
    if args.served_model_name is not None:
        return str(args.served_model_name)
    try:
        return str(msgspec.json.decode(response.content)["data"][0]["id"])
    except (msgspec.DecodeError, LookupError, TypeError):
        raise ConfigError(f"--url {args.url} lists no model at /v1/models; give --served-model-name") from None


def _loads(args: argparse.Namespace, model: str, key: str) -> list[Load]:
    """One share a client; those of the first are larger by one where the number of requests in flight does not divide."""
    share, rest = divmod(args.max_concurrency, args.num_clients)
    return [
        Load(
            url=args.url.rstrip("/"),
            key=key,
            model=model,
            client=client,
            num_clients=args.num_clients,
            max_concurrency=share + (client < rest),
            num_prompts=args.num_prompts,
            input_len=args.input_len,
            output_len=args.output_len,
            vocab_size=args.vocab_size,
            seed=args.seed,
            request_rate=args.request_rate,
            burstiness=args.burstiness,
        )
        for client in range(args.num_clients)
    ]


def _try_one(args: argparse.Namespace, load: Load) -> None:
    """Warm up, and find out before the load whether the server takes such requests at all."""
    body = request_bodies(load)[0]
    if error := asyncio.run(send(Target(load.url, load.key), body)).error:
        raise ConfigError(f"--url {args.url} refused the first request: {error}")


def _report(
    args: argparse.Namespace, model: str, answers: Sequence[Answer], start: float, health: Sequence[float]
) -> dict[str, Any]:
    done = [answer for answer in answers if not answer.error]
    seconds = max((time for answer in answers for time in answer.arrivals), default=start) - start
    output_tokens = sum(answer.output_tokens for answer in done)
    prompt_tokens = sum(answer.usage.get("prompt_tokens") or args.input_len for answer in done)
    gaps = np.concatenate([np.empty(0), *(np.diff(answer.arrivals) for answer in done)])
    return {
        "mode": "serve",
        "url": args.url,
        "model": model,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "num_prompts": args.num_prompts,
        "max_concurrency": args.max_concurrency,
        "num_clients": args.num_clients,
        "request_rate": args.request_rate,
        "burstiness": args.burstiness if args.request_rate is not None else None,
        "completed_requests": len(done),
        "failed_requests": len(answers) - len(done),
        "errors": sorted({answer.error for answer in answers if answer.error})[:5],
        "seconds": seconds,
        "output_tokens": output_tokens,
        "output_tokens_per_event": output_tokens / max(1, sum(len(answer.arrivals) for answer in done)),
        "requests_per_second": len(done) / seconds if seconds else 0.0,
        "good_requests_per_second": sum(_is_good(args, answer) for answer in done) / seconds if seconds else 0.0,
        "output_tokens_per_second": output_tokens / seconds if seconds else 0.0,
        "total_tokens_per_second": (output_tokens + prompt_tokens) / seconds if seconds else 0.0,
        "time_to_first_token_ms": summary([answer.time_to_first_token for answer in done]),
        "time_per_output_token_ms": summary([a.time_per_output_token for a in done if a.output_tokens > 1]),
        "inter_token_latency_ms": summary(gaps.tolist()),
        "stream_gap_ms": summary([answer.longest_gap for answer in done if len(answer.arrivals) > 1]),
        "health_ms": summary(health),
        "versions": installed_versions(),
    }


def _is_good(args: argparse.Namespace, answer: Answer) -> bool:
    """Whether an answer keeps the limits of ``--first-token`` and ``--stream-gap``; without limits every answer does."""
    first, gap = args.first_token or math.inf, args.stream_gap or math.inf
    return 1e3 * answer.time_to_first_token <= first and 1e3 * answer.longest_gap <= gap
