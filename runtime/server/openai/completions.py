# SPDX-License-Identifier: Apache-2.0
"""Answers of ``POST /v1/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from phalanx.runtime.answer import Answer, TokenEvent
from phalanx.runtime.server.openai.answer_format import Served
from phalanx.runtime.server.openai.logprobs import CompletionLogprobs, prompt_logprobs
from phalanx.runtime.server.openai.protocol import CompletionRequest
from phalanx.runtime.text import Tokenizer
from phalanx.runtime.text.detokenizer import Detokenizer

__all__ = ["CompletionFormat"]

Prompt = str | tuple[int, ...]


@dataclass(slots=True)
class CompletionFormat:
    """Writes ``text_completion`` objects; see `AnswerFormat`.

    Attributes:
        num_candidates: answers to each prompt, of which the best are returned.
        prompt_logprobs: by the index of a prompt, those that are written.
    """

    served: Served
    request: CompletionRequest
    prompts: Sequence[Prompt]
    num_candidates: int
    created: int = field(default_factory=lambda: int(time.time()))
    logprobs: dict[int, CompletionLogprobs] = field(default_factory=dict)
    echoed: set[int] = field(default_factory=set)
    prompt_logprobs: dict[int, msgspec.Raw] = field(default_factory=dict)
    id: str = field(init=False)

    def __post_init__(self) -> None:
        self.id = f"cmpl-{self.request.request_id or uuid.uuid4().hex}"

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer; None if it has none."""
        return self.served.tokenizer

    @property
    def has_plain_chunks(self) -> bool:
        """Whether chunks differ in their text only, once the prompt was echoed."""
        return self.request.logprobs is None and not (self.request.return_token_ids or self.tokenizer is None)

    def opening(self, choice: Answer) -> list[dict[str, Any]]:
        """Nothing: the echo needs the log-probabilities that come with the first token."""
        return []

    def chunks(self, choice: Answer, events: Sequence[TokenEvent]) -> list[dict[str, Any]]:
        chunks = [self._choice(choice, [], last=False)] if self._echo_is_due(choice) else []
        chunks.append(self._choice(choice, events, last=events[-1].last))
        return [self._object([chunk]) for chunk in chunks]

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._object([]), "usage": usage}

    def whole(self, choices: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        entries = [self._choice(choice, choice.events, last=True) for choice in self._best(choices)]
        for index, entry in enumerate(entries):
            entry["index"] = index
        return {**self._object(entries), "usage": usage}

    def _best(self, choices: Sequence[Answer]) -> list[Answer]:
        """The ``n`` answers to each prompt with the highest log-probability per token, best first."""
        if self.num_candidates == self.request.n:
            return list(choices)
        starts = range(0, len(choices), self.num_candidates)
        groups = [
            sorted(choices[start : start + self.num_candidates], key=_mean_logprob, reverse=True) for start in starts
        ]
        return [choice for group in groups for choice in group[: self.request.n]]

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.served.model_name,
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
        if self.request.prompt_logprobs is not None:
            entry["prompt_logprobs"] = self._prompt_logprobs(choice, self.request.prompt_logprobs)
        return entry

    def _prompt_logprobs(self, choice: Answer, num_alternatives: int) -> msgspec.Raw:
        """Written once a prompt, whose choices have the same."""
        prompt = choice.index // self.num_candidates
        if prompt not in self.prompt_logprobs:
            known = choice.prompt_logprobs or ()
            self.prompt_logprobs[prompt] = prompt_logprobs(self.tokenizer, known, num_alternatives)
        return self.prompt_logprobs[prompt]

    def _logprobs(self, choice: Answer, events: Sequence[TokenEvent], echo: bool) -> dict[str, list[Any]]:
        lists = self.logprobs.get(choice.index)
        if lists is None:
            labels = None if self.request.return_tokens_as_token_ids else self.tokenizer
            lists = self.logprobs[choice.index] = CompletionLogprobs(
                labels, self._counter(choice), self.request.logprobs or 0
            )
        if echo:
            known = choice.prompt_logprobs or ()
            for index, token_id in enumerate(choice.prompt_token_ids):
                lists.add(token_id, known[index] if index < len(known) else None)
        for event in events:
            if event.token_id is not None:
                lists.add(event.token_id, event.logprob)
        return lists.take()

    def _prompt(self, choice: Answer) -> Prompt:
        return self.prompts[choice.index // self.num_candidates]

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
            skip_special_tokens=choice.params.skip_special_tokens,
            spaces_between_special_tokens=choice.params.spaces_between_special_tokens,
            prompt_token_ids=choice.prompt_token_ids,
        )


def _mean_logprob(choice: Answer) -> float:
    """The mean over the tokens of an answer, so that longer ones are not at a disadvantage."""
    logprobs = [event.logprob.logprob for event in choice.events if event.logprob is not None]
    return sum(logprobs) / max(1, len(logprobs))
