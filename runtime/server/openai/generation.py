# SPDX-License-Identifier: Apache-2.0
"""What completions and chat completions have in common: from prompts to an answer, whole or streamed."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from phalanx.runtime.answer import Answer, TokenEvent
from phalanx.runtime.request import SamplingParams, TokenDelta
from phalanx.runtime.server.errors import ApiError
from phalanx.runtime.server.link.engine_client import GenerationGroup
from phalanx.runtime.server.openai.fields import choice_params
from phalanx.runtime.server.openai.protocol import StreamOptions
from phalanx.runtime.server.services import Services
from phalanx.runtime.server.web.http import EventStream, json_response, until_disconnect

__all__ = ["AnswerFormat", "GenerationJob"]

DONE = b"data: [DONE]\n\n"


class AnswerFormat(Protocol):
    """How one of the protocols writes an answer down."""

    def opening(self, choice: Answer) -> list[dict[str, Any]]:
        """Chunks of a stream before the first token of ``choice``."""
        ...

    def chunks(self, choice: Answer, events: Sequence[TokenEvent]) -> list[dict[str, Any]]:
        """Chunks of a stream for some tokens."""
        ...

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last chunk of a stream that was asked to include the usage."""
        ...

    def whole(self, choices: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer in one piece; ``choice.events`` holds all events."""
        ...


@dataclass(slots=True)
class GenerationJob:
    """One HTTP request on its way through the engine. `run` answers it and releases everything it holds."""

    services: Services
    answer: AnswerFormat
    arrival: float
    stream: bool
    stream_options: StreamOptions
    held: ExitStack
    choices: list[Answer] = field(default_factory=list)
    group: GenerationGroup | None = None
    num_prompt_tokens: int = 0
    last_token: float | None = None

    def add_prompt(self, token_ids: tuple[int, ...], params: SamplingParams, num_choices: int) -> None:
        """Ask for ``num_choices`` answers to one prompt."""
        self.num_prompt_tokens += len(token_ids)
        for number in range(num_choices):
            self.choices.append(
                Answer.start(len(self.choices), token_ids, choice_params(params, number), self.services.tokenizer)
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

    async def _next(self) -> list[tuple[Answer, list[TokenEvent]]]:
        """Wait for the engine; what became of which choice. An error shows after all that came before it."""
        assert self.group is not None
        news: list[tuple[Answer, list[TokenEvent]]] = []
        while not news:
            self._raise_failure()
            for index, delta in await self.group.next():
                choice = self.choices[index]
                if choice.finish_reason is None and (events := self._take(choice, delta)):
                    news.append((choice, events))
        self._observe(news)
        return news

    def _take(self, choice: Answer, delta: TokenDelta) -> list[TokenEvent]:
        assert self.group is not None
        events = choice.take(delta)
        if choice.stopped_by_text and delta.finish_reason is None:
            self.group.cancel(choice.index)
        return events if choice.finish_reason != "error" else []

    def _raise_failure(self) -> None:
        failed = next((choice for choice in self.choices if choice.finish_reason == "error"), None)
        if failed is None:
            return
        deadline = self.services.deadline(self.arrival)
        no_retry = {"x-should-retry": "false"}
        if deadline is not None and time.monotonic() >= deadline:
            seconds = self.services.settings.request_timeout_seconds
            message = f"the request took longer than {seconds:g} s; ask for fewer tokens"
            raise ApiError(408, message, code="request_timeout", headers=no_retry)
        raise ApiError(500, failed.error or "the engine gave no reason", code="generation_failed", headers=no_retry)

    @property
    def _unfinished(self) -> bool:
        return any(choice.finish_reason in (None, "error") for choice in self.choices)

    async def _collect(self) -> dict[str, Any]:
        while self._unfinished:
            for choice, events in await self._next():
                choice.events += events
        answer = self.answer.whole(self.choices, self._usage())
        self.close()
        return answer

    async def _events(self, first: list[tuple[Answer, list[TokenEvent]]]) -> AsyncIterator[bytes]:
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

    def _encode_news(self, news: list[tuple[Answer, list[TokenEvent]]]) -> bytes:
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

    def _observe(self, news: list[tuple[Answer, list[TokenEvent]]]) -> None:
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
