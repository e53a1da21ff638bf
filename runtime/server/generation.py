# SPDX-License-Identifier: Apache-2.0
"""What completions and chat completions have in common: from prompts to an answer, whole or streamed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from phalanx.parallel.errors import RequestError
from phalanx.runtime.request import SamplingParams, TokenDelta
from phalanx.runtime.server.api_error import ApiError, from_request_error, invalid
from phalanx.runtime.server.choice import Choice, TokenEvent
from phalanx.runtime.server.engine_client import EngineClient, GenerationGroup
from phalanx.runtime.server.http import EventStream, json_response, until_disconnect
from phalanx.runtime.server.messages import ModelInfo
from phalanx.runtime.server.metrics import Metrics
from phalanx.runtime.server.protocol import StreamOptions
from phalanx.runtime.server.sampling_fields import choice_params
from phalanx.runtime.server.settings import FrontendSettings
from phalanx.runtime.text import ChatTemplate, Tokenizer

__all__ = ["AnswerFormat", "GenerationJob", "Services"]

DONE = b"data: [DONE]\n\n"

Result = TypeVar("Result")


class AnswerFormat(Protocol):
    """How one of the protocols writes an answer down."""

    def opening(self, choice: Choice) -> list[dict[str, Any]]:
        """Chunks of a stream before the first token of ``choice``."""
        ...

    def chunks(self, choice: Choice, events: Sequence[TokenEvent]) -> list[dict[str, Any]]:
        """Chunks of a stream for some tokens."""
        ...

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last chunk of a stream that was asked to include the usage."""
        ...

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer in one piece; ``choice.events`` holds all events."""
        ...


@dataclass(slots=True)
class Services:
    """What handlers work with. ``model`` and ``tokenizer`` are there once the server is ready."""

    client: EngineClient
    settings: FrontendSettings
    metrics: Metrics
    workers: ThreadPoolExecutor
    tokenizer: Tokenizer | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def model(self) -> ModelInfo:
        """What the engine said about the model."""
        assert self.client.model is not None
        return self.client.model

    @property
    def model_name(self) -> str:
        """The name that answers carry."""
        return self.settings.model_names[0]

    def check_model(self, name: str | None) -> None:
        """Raise 404 when a request asks for another model."""
        if name is not None and name not in self.settings.model_names:
            known = ", ".join(self.settings.model_names)
            raise ApiError(
                404, f"model {name!r} is not served here; use {known}", param="model", code="model_not_found"
            )

    def need_tokenizer(self, param: str) -> Tokenizer:
        """The tokenizer, or 400 where the checkpoint has none."""
        if self.tokenizer is None:
            raise invalid(f"the checkpoint has no tokenizer.json, so {param} cannot be text; use token ids", param)
        return self.tokenizer

    def need_template(self) -> ChatTemplate:
        """The chat template, or 400 where the checkpoint has none."""
        template = self.need_tokenizer("messages").chat_template
        if template is None:
            raise invalid("this checkpoint has no chat template; use /v1/completions", "messages")
        return template

    async def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Token ids of a prompt, computed outside the event loop."""
        tokenizer = self.need_tokenizer("prompt")
        most = self.model.max_model_len * tokenizer.max_token_characters
        return await self.in_worker(
            lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens, max_characters=most)
        )

    async def in_worker(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` on a worker thread; `RequestError` becomes a 400."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.workers, work)
        except RequestError as error:
            raise from_request_error(error) from None

    def deadline(self, arrival: float) -> float | None:
        """Monotonic time at which a request that arrived at ``arrival`` must be over."""
        seconds = self.settings.request_timeout_seconds
        return None if seconds is None else arrival + seconds

    def completion_budget(self, num_prompt_tokens: int, asked: int | None, param: str) -> int:
        """How many tokens to generate: what was asked for, or what the context has room for.

        Raises:
            ApiError: 400 ``context_length_exceeded``.
        """
        room = self.model.max_model_len - num_prompt_tokens
        if asked is not None and asked < 0:
            raise invalid(f"{param}={asked} is negative; use 1 or more", param)
        if num_prompt_tokens == 0:
            raise invalid("the prompt is empty; give at least one token", "prompt")
        if (asked or 0) > room or room < (0 if asked == 0 else 1):
            wanted = "" if asked is None else f" and {param}={asked}"
            raise invalid(
                f"{num_prompt_tokens} prompt tokens{wanted} exceed this model's context of "
                f"{self.model.max_model_len} tokens; shorten the prompt or ask for fewer tokens",
                param if room > 0 else "prompt",
                "context_length_exceeded",
            )
        return room if asked is None else asked


@dataclass(slots=True)
class GenerationJob:
    """One HTTP request on its way through the engine. `run` answers it and releases everything it holds."""

    services: Services
    answer: AnswerFormat
    arrival: float
    stream: bool
    stream_options: StreamOptions
    held: ExitStack
    choices: list[Choice] = field(default_factory=list)
    group: GenerationGroup | None = None
    num_prompt_tokens: int = 0
    last_token: float | None = None

    def add_prompt(self, token_ids: tuple[int, ...], params: SamplingParams, num_choices: int) -> None:
        """Ask for ``num_choices`` answers to one prompt."""
        self.num_prompt_tokens += len(token_ids)
        for number in range(num_choices):
            self.choices.append(
                Choice.start(len(self.choices), token_ids, choice_params(params, number), self.services.tokenizer)
            )

    async def run(self, request: Request) -> Response:
        """Submit, and answer; also when the client leaves or the engine stops.

        Raises:
            ApiError: nothing was sent yet and the request failed.
            ClientGone: the client left before anything was sent.
        """
        try:
            self.services.metrics.prompt_tokens.inc(self.num_prompt_tokens)
            self.group = self.services.client.submit(
                [(choice.prompt_token_ids, choice.params) for choice in self.choices],
                self.services.deadline(self.arrival),
            )
            if not self.stream:
                return json_response(await until_disconnect(request.receive, self._collect()))
            first = await until_disconnect(request.receive, self._next())
        except BaseException:
            self.close()
            raise
        return EventStream(self._events(first), self.close)

    def close(self) -> None:
        """Cancel what still runs and make room for others."""
        if self.group is not None:
            self.group.close()
            self.group = None
            self._count()
        self.held.close()

    async def _next(self) -> list[tuple[Choice, list[TokenEvent]]]:
        """Wait for the engine; what became of which choice."""
        assert self.group is not None
        news: list[tuple[Choice, list[TokenEvent]]] = []
        for index, delta in await self.group.next():
            choice = self.choices[index]
            if choice.finish_reason is None:
                news.append((choice, self._take(choice, delta)))
        self._observe(news)
        return news

    def _take(self, choice: Choice, delta: TokenDelta) -> list[TokenEvent]:
        assert self.group is not None
        events = choice.take(delta)
        if choice.stopped_by_text and delta.finish_reason is None:
            self.group.cancel(choice.index)
        if choice.finish_reason == "error":
            raise self._failure(choice)
        return events

    def _failure(self, choice: Choice) -> ApiError:
        deadline = self.services.deadline(self.arrival)
        no_retry = {"x-should-retry": "false"}
        if deadline is not None and time.monotonic() >= deadline:
            seconds = self.services.settings.request_timeout_seconds
            message = f"the request took longer than {seconds:g} s; ask for fewer tokens"
            return ApiError(408, message, code="request_timeout", headers=no_retry)
        return ApiError(500, choice.error or "the engine gave no reason", code="generation_failed", headers=no_retry)

    @property
    def _unfinished(self) -> bool:
        return any(choice.finish_reason is None for choice in self.choices)

    async def _collect(self) -> dict[str, Any]:
        while self._unfinished:
            for choice, events in await self._next():
                choice.events += events
        answer = self.answer.whole(self.choices, self._usage())
        self.close()
        return answer

    async def _events(self, first: list[tuple[Choice, list[TokenEvent]]]) -> AsyncIterator[bytes]:
        """The whole stream; one item holds all chunks that were ready together."""
        try:
            yield self._encode(
                [chunk for choice in self.choices for chunk in self.answer.opening(choice)]
            ) + self._encode_news(first)
            while self._unfinished:
                yield self._encode_news(await self._next())
            if self.stream_options.include_usage:
                yield _event(self.answer.usage_chunk(self._usage()))
        except ApiError as error:
            yield _event(error.body())
        yield DONE

    def _encode_news(self, news: list[tuple[Choice, list[TokenEvent]]]) -> bytes:
        return b"".join(self._encode(self.answer.chunks(choice, events)) for choice, events in news)

    def _encode(self, chunks: list[dict[str, Any]]) -> bytes:
        if self.stream_options.continuous_usage_stats:
            usage = self._usage()
            chunks = [{**chunk, "usage": usage} for chunk in chunks]
        return b"".join(map(_event, chunks))

    def _usage(self) -> dict[str, Any]:
        completion = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.num_prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": sum(c.num_cached_tokens for c in self.choices)},
        }

    def _observe(self, news: list[tuple[Choice, list[TokenEvent]]]) -> None:
        now, metrics = time.monotonic(), self.services.metrics
        num_tokens = sum(event.token_id is not None for _, events in news for event in events)
        if num_tokens == 0:
            return
        metrics.generation_tokens.inc(num_tokens)
        if self.last_token is None:
            metrics.first_token.observe(now - self.arrival)
        else:
            metrics.inter_token.observe(now - self.last_token)
        self.last_token = now

    def _count(self) -> None:
        metrics = self.services.metrics
        metrics.duration.observe(time.monotonic() - self.arrival)
        for choice in self.choices:
            metrics.finished.labels(choice.finish_reason or "cancelled").inc()


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
