# SPDX-License-Identifier: Apache-2.0
"""``POST /v1/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from phalanx.runtime.answer import Answer, TokenEvent
from phalanx.runtime.request import MAX_LOGPROBS
from phalanx.runtime.server.errors import invalid
from phalanx.runtime.server.openai.fields import checked_token_ids, num_choices, sampling_params
from phalanx.runtime.server.openai.generation import GenerationJob
from phalanx.runtime.server.openai.logprobs import CompletionLogprobs
from phalanx.runtime.server.openai.protocol import CompletionRequest, StreamOptions
from phalanx.runtime.server.services import Services
from phalanx.runtime.text import Tokenizer
from phalanx.runtime.text.detokenizer import Detokenizer

__all__ = ["completion_job"]

DEFAULT_MAX_TOKENS = 16
Prompt = str | list[int]


async def completion_job(
    services: Services, request: CompletionRequest, arrival: float, held: ExitStack
) -> GenerationJob:
    """Check a request and prepare its prompts; what it holds is released with ``held``.

    Raises:
        ApiError: a field is refused, or there is no room now.
    """
    services.check_model(request.model)
    _check_fields(request)
    prompts, n = _prompts(request), num_choices(request)
    held.enter_context(services.client.admit(len(prompts) * n))
    answer = CompletionAnswer(services.model_name, services.tokenizer, request, prompts, len(prompts) * n)
    options = request.stream_options or StreamOptions()
    job = GenerationJob(services, answer, arrival, bool(request.stream), options, held)
    for prompt in prompts:
        token_ids = await _token_ids(services, request, prompt)
        asked = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        params = sampling_params(
            request,
            services.model,
            max_tokens=services.completion_budget(len(token_ids), asked, "max_tokens"),
            logprobs=request.logprobs,
            prompt_logprobs=request.logprobs if request.echo else None,
        )
        job.add_prompt(token_ids, params, n)
    return job


def _check_fields(request: CompletionRequest) -> None:
    if request.max_tokens == 0 and not request.echo:
        raise invalid("max_tokens=0 without echo asks for nothing; use at least 1, or echo", "max_tokens")
    if request.logprobs is not None and not 0 <= request.logprobs <= MAX_LOGPROBS:
        raise invalid(f"logprobs={request.logprobs} is out of range; use 0 to {MAX_LOGPROBS}", "logprobs")
    if request.best_of not in (None, request.n or 1):
        raise invalid(f"best_of={request.best_of} is not supported unless equal to n; leave it out", "best_of")
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options needs stream=true; leave it out or stream", "stream_options")


def _prompts(request: CompletionRequest) -> list[Prompt]:
    given = request.prompt
    if isinstance(given, str):
        return [given]
    if not given:
        raise invalid("the prompt is empty; give at least one", "prompt")
    kinds = {type(item) for item in given}
    if kinds == {int}:
        return [[item for item in given if isinstance(item, int)]]
    if len(kinds) > 1:
        raise invalid("prompt mixes texts and token ids; send them as separate requests", "prompt")
    return [item for item in given if not isinstance(item, int)]


async def _token_ids(services: Services, request: CompletionRequest, prompt: Prompt) -> tuple[int, ...]:
    if request.stop:
        services.need_tokenizer("stop")
    if isinstance(prompt, str):
        return await services.encode(prompt, add_special_tokens=request.add_special_tokens is not False)
    return checked_token_ids(prompt, services.model, "prompt")


@dataclass(slots=True)
class CompletionAnswer:
    """Writes ``text_completion`` objects; see `AnswerFormat`. ``num_choices`` counts those of all prompts."""

    model_name: str
    tokenizer: Tokenizer | None
    request: CompletionRequest
    prompts: Sequence[Prompt]
    num_choices: int
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    logprobs: dict[int, CompletionLogprobs] = field(default_factory=dict)
    echoed: set[int] = field(default_factory=set)

    def opening(self, choice: Answer) -> list[dict[str, Any]]:
        """Nothing: the echo needs the log-probabilities that come with the first token."""
        return []

    def chunks(self, choice: Answer, events: Sequence[TokenEvent]) -> list[dict[str, Any]]:
        """See `AnswerFormat.chunks`: one chunk a token."""
        chunks = [self._choice(choice, [], last=False)] if self._echo_is_due(choice) else []
        chunks += [self._choice(choice, [event], last=event.last) for event in events]
        return [self._object([chunk]) for chunk in chunks]

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """See `AnswerFormat.usage_chunk`."""
        return {**self._object([]), "usage": usage}

    def whole(self, choices: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        """See `AnswerFormat.whole`."""
        return {
            **self._object([self._choice(choice, choice.events, last=True) for choice in choices]),
            "usage": usage,
        }

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model_name,
            "choices": choices,
        }

    def _echo_is_due(self, choice: Answer) -> bool:
        return self.request.echo and choice.index not in self.echoed

    def _choice(self, choice: Answer, events: Sequence[TokenEvent], *, last: bool) -> dict[str, Any]:
        echo = self._echo_is_due(choice)
        self.echoed.add(choice.index)
        text = None
        if self.tokenizer is not None:
            text = "".join(event.text for event in events)
            text = self._prompt_text(choice, self.tokenizer) + text if echo else text
        entry: dict[str, Any] = {
            "index": choice.index,
            "text": text,
            "logprobs": self._logprobs(choice, events, echo) if self.request.logprobs is not None else None,
            "finish_reason": choice.finish_reason if last else None,
            "stop_reason": choice.stop_reason if last else None,
        }
        if self.request.return_token_ids or self.tokenizer is None:
            entry["token_ids"] = [event.token_id for event in events if event.token_id is not None]
            if last or echo:
                entry["prompt_token_ids"] = choice.prompt_token_ids
        return entry

    def _logprobs(self, choice: Answer, events: Sequence[TokenEvent], echo: bool) -> dict[str, list[Any]]:
        lists = self.logprobs.get(choice.index)
        if lists is None:
            lists = self.logprobs[choice.index] = CompletionLogprobs(self.tokenizer, self._counter(choice))
        if echo:
            known = choice.prompt_logprobs or ()
            for index, token_id in enumerate(choice.prompt_token_ids):
                lists.add(token_id, known[index] if index < len(known) else None)
        for event in events:
            if event.token_id is not None:
                lists.add(event.token_id, event.logprob)
        return lists.take()

    def _prompt(self, choice: Answer) -> Prompt:
        return self.prompts[choice.index * len(self.prompts) // self.num_choices]

    def _prompt_text(self, choice: Answer, tokenizer: Tokenizer) -> str:
        prompt = self._prompt(choice)
        return prompt if isinstance(prompt, str) else tokenizer.decode(prompt, skip_special_tokens=False)

    def _counter(self, choice: Answer) -> Detokenizer | None:
        """Counts the characters of the reported text; tokens that encoding put around a text are not in it."""
        if self.tokenizer is None:
            return None
        if self.request.echo:
            return self.tokenizer.detokenizer(skip_special_tokens=isinstance(self._prompt(choice), str))
        return self.tokenizer.detokenizer(
            skip_special_tokens=self.request.skip_special_tokens, prompt_token_ids=choice.prompt_token_ids
        )
