# SPDX-License-Identifier: Apache-2.0
"""One request of any protocol on its way through the engine: from prompts to answers, with what it holds meanwhile."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from phalanx.runtime.answer import Answer, TokenEvent
from phalanx.runtime.request import SamplingParams, TokenDelta
from phalanx.runtime.server.errors import ApiError, invalid
from phalanx.runtime.server.link.engine_client import EngineLost
from phalanx.runtime.server.link.generation_group import GenerationGroup
from phalanx.runtime.server.openai.encoding import choice_params, encode
from phalanx.runtime.server.openai.parsing import Generation
from phalanx.runtime.server.services import Services
from phalanx.runtime.server.time_limit import TimeLimit

__all__ = ["GenerationJob", "start_job"]

_NO_RETRY = {"x-should-retry": "false"}


@dataclass(slots=True)
class GenerationJob:
    """One request on its way through the engine; `close` releases everything that it holds.

    Attributes:
        n: answers to each prompt.
        choices: the answers, those to one prompt in a row.
        num_unfinished: choices that have not ended well.
        held: what is released when the request is over.
        limit: when it arrived, and when it must be over.
        cache_salt, priority: see `Request`.
        shares_prompt_logprobs: see `Generation`.
    """

    services: Services
    n: int
    limit: TimeLimit
    cache_salt: str = ""
    priority: int = 0
    shares_prompt_logprobs: bool = False
    held: ExitStack = field(default_factory=ExitStack)
    choices: list[Answer] = field(default_factory=list)
    num_unfinished: int = 0
    group: GenerationGroup | None = None
    num_prompt_tokens: int = 0
    first_token: float | None = None
    last_token: float = 0.0
    failed: Answer | None = None

    def submit(self, prompts: Sequence[tuple[tuple[int, ...], SamplingParams]]) -> None:
        """Ask the engine for ``n`` answers to each prompt.

        Raises:
            ApiError: the engine is gone.
        """
        for token_ids, params in prompts:
            self.num_prompt_tokens += len(token_ids)
            for number in range(self.n):
                own = choice_params(params, number, self.shares_prompt_logprobs)
                self.choices.append(Answer.start(len(self.choices), token_ids, own, self.services.tokenizer))
        self.num_unfinished = len(self.choices)
        self.services.metrics.prompt_tokens.inc(self.num_prompt_tokens)
        self.group = self._ask()

    def _ask(self) -> GenerationGroup:
        prompts = [(choice.prompt_token_ids, choice.params) for choice in self.choices]
        return self.services.client.submit(prompts, self.limit.deadline, self.n, self.cache_salt, self.priority)

    def close(self) -> None:
        """Cancel what still runs and make room for others."""
        if self.group is not None:
            self.group.close()
            self.group = None
            self._count()
        self.held.close()

    @property
    def only_text(self) -> Answer | None:
        """The only choice, if it has begun and is a text that plain next tokens cannot end, so that `take_text` may be asked first."""
        is_begun = len(self.choices) == 1 and self.first_token is not None
        return self.choices[0] if is_begun and self.choices[0].is_plain_text else None

    def take_text(self, now: float) -> str | None:
        """What `only_text` has grown by since the last call; None if `take` is needed, because more than plain next tokens has arrived."""
        assert self.group is not None
        token_ids = self.group.take_plain()
        if token_ids is None:
            return None
        self.services.metrics.next_tokens.add(len(token_ids), now - self.last_token)
        self.last_token = now
        return self.choices[0].extend_text(token_ids)

    def take(self, now: float) -> list[tuple[Answer, list[TokenEvent]]]:
        """Each choice that has grown since the last call, once, with all that it grew by. An error shows after all that came before it.

        Raises:
            ApiError: a choice failed, or the engine is gone.
        """
        assert self.group is not None
        if self.failed is not None:
            self.raise_failure()
        news = self.group.take()
        grown = [self._grow(index, item) for index, item in news]
        if len(news) != 1:
            grown = _by_choice(grown)
        taken = [(choice, events) for choice, events in grown if events]
        if not taken:
            self.raise_failure()
            return taken
        num_tokens = 0
        for _, events in taken:
            num_tokens += len(events) - (events[-1].token_id is None)
        if num_tokens:
            self._observe(num_tokens, now)
            if not self.num_unfinished:
                self.services.metrics.next_tokens.publish()  # a client that has its answer finds it in the metrics
        return taken

    def _grow(self, index: int, item: list[int] | TokenDelta) -> tuple[Answer, list[TokenEvent]]:
        """A choice and what it grows by with ``item``: nothing, if it had ended or fails now."""
        choice = self.choices[index]
        if choice.finish_reason is not None:
            return choice, []
        events = choice.extend(item) if isinstance(item, list) else choice.take(item)
        if choice.finish_reason is None:
            return choice, events
        if choice.finish_reason == "error":
            self.failed = choice
            return choice, []
        self.num_unfinished -= 1
        if choice.stopped_by_text and (isinstance(item, list) or item.finish_reason is None):
            assert self.group is not None
            self.group.cancel(index)  # the engine does not see texts
        return choice, events

    @property
    def is_finished(self) -> bool:
        """Whether every choice has ended well."""
        return not self.num_unfinished

    def usage(self) -> dict[str, Any]:
        """Tokens so far. What was cached counts once a prompt: for the first of its answers."""
        completion = sum(choice.num_tokens for choice in self.choices)
        cached = sum(choice.num_cached_tokens for choice in self.choices[:: self.n])
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.num_prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    async def next(self) -> list[tuple[Answer, list[TokenEvent]]]:
        """Wait until `take` returns something, or raises.

        Raises:
            ApiError: a choice failed, or the engine is gone.
        """
        assert self.group is not None
        while not (taken := self.take(time.monotonic())):
            await self.group.wait()
        return taken

    async def collect(self) -> list[Answer]:
        """Wait for the ends of all answers and return them with their events. Where another engine takes over, it is asked once more.

        Raises:
            ApiError: one of them failed, or the engine is gone.
        """
        try:
            return await self._collect()
        except EngineLost:
            await self._submit_again()
            return await self._collect()

    async def _collect(self) -> list[Answer]:
        while not self.is_finished:
            for choice, events in await self.next():
                choice.events += events
        if self.shares_prompt_logprobs:
            for choice in self.choices:
                choice.prompt_logprobs = self.choices[choice.index - choice.index % self.n].prompt_logprobs
        return self.choices

    async def _submit_again(self) -> None:
        """Forget what the lost engine gave, and ask the next one for all of it.

        Raises:
            ApiError: there is no other engine, or it did not come before the request's deadline.
        """
        async with self.limit.enforced():
            await self.services.client.wait_until_serving()
        self.choices = [
            Answer.start(choice.index, choice.prompt_token_ids, choice.params, self.services.tokenizer)
            for choice in self.choices
        ]
        self.failed, self.first_token, self.num_unfinished = None, None, len(self.choices)
        self.group = self._ask()

    def raise_failure(self) -> None:
        """Raise ApiError if a choice failed or the group ended with an error, after all that came before."""
        failed = self.failed
        if failed is None:
            if self.group is not None:
                self.group.raise_error()
            return
        if self.limit.is_over:
            raise self.limit.exceeded()
        if failed.error_param is not None:
            raise invalid(failed.error or "the request cannot be answered", failed.error_param)
        raise ApiError(500, failed.error or "the engine gave no reason", code="generation_failed", headers=_NO_RETRY)

    def _observe(self, num_tokens: int, now: float) -> None:
        metrics = self.services.metrics
        if self.first_token is None:
            self.first_token = now
            metrics.generation_tokens.inc(num_tokens)
            metrics.first_token.observe(now - self.limit.arrival)
        else:
            metrics.next_tokens.add(num_tokens, now - self.last_token)
        self.last_token = now

    def _count(self) -> None:
        metrics = self.services.metrics
        metrics.duration.observe(time.monotonic() - self.limit.arrival)
        if self.first_token is not None:
            metrics.decode.observe(self.last_token - self.first_token)
        for choice in self.choices:
            metrics.prompt_length.observe(len(choice.prompt_token_ids))
            metrics.generation_length.observe(choice.num_tokens)
            metrics.finished.labels(choice.finish_reason or "cancelled").inc()


def _by_choice(grown: Sequence[tuple[Answer, list[TokenEvent]]]) -> list[tuple[Answer, list[TokenEvent]]]:
    """Each choice once, in the order of its first event, with all its events."""
    merged: dict[int, tuple[Answer, list[TokenEvent]]] = {}
    for choice, events in grown:
        merged.setdefault(choice.index, (choice, []))[1].extend(events)
    return list(merged.values())


async def start_job(services: Services, generations: Sequence[Generation], limit: TimeLimit) -> GenerationJob:
    """Make room, encode and submit. All ``generations`` ask for the same number of answers. The job must be closed.

    Raises:
        ApiError: no room, a prompt that cannot be encoded, a time that is over before all are, or an engine that is gone.
    """
    with ExitStack() as held:
        held.enter_context(services.client.admit(sum(generation.num_answers for generation in generations)))
        async with limit.enforced():
            await services.turnstile.enter()
            prompts = [prompt for generation in generations for prompt in await encode(services, generation)]
            # The engine may have been lost meanwhile, and another one be on its way.
            await services.client.wait_until_serving()
        first = generations[0]
        job = GenerationJob(services, first.n, limit, first.cache_salt, first.priority, first.shares_prompt_logprobs)
        job.submit(prompts)
        job.held = held.pop_all()
    return job
