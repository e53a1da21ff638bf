# SPDX-License-Identifier: Apache-2.0
"""Answers of ``POST /v1/chat/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from phalanx.runtime.answer import Answer, TokenEvent
from phalanx.runtime.server.openai.logprobs import chat_logprob
from phalanx.runtime.server.openai.protocol import ChatRequest
from phalanx.runtime.text import Tokenizer

__all__ = ["ChatFormat"]


@dataclass(slots=True)
class ChatFormat:
    """Writes ``chat.completion`` objects; see `AnswerFormat`."""

    model_name: str
    tokenizer: Tokenizer | None
    request: ChatRequest
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def has_plain_chunks(self) -> bool:
        """Whether chunks differ in their text only."""
        return not (self.request.logprobs or self.request.return_token_ids)

    def opening(self, choice: Answer) -> list[dict[str, Any]]:
        """The role."""
        return [self._chunk(choice, {"role": "assistant", "content": ""})]

    def chunks(self, choice: Answer, events: Sequence[TokenEvent]) -> list[dict[str, Any]]:
        """One chunk a token, then an empty one with the reason for the end."""
        chunks = [
            self._chunk(choice, {"content": event.text}, [event])
            for event in events
            if event.token_id is not None or event.text
        ]
        if events and events[-1].last:
            chunks.append(self._chunk(choice, {}, last=True))
        return chunks

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._object("chat.completion.chunk", []), "usage": usage}

    def whole(self, choices: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        entries = [
            {
                "index": choice.index,
                "message": {
                    "role": "assistant",
                    "content": "".join(event.text for event in choice.events),
                    "refusal": None,
                },
                **self._details(choice, choice.events, last=True),
            }
            for choice in choices
        ]
        return {**self._object("chat.completion", entries), "usage": usage}

    def _chunk(
        self, choice: Answer, delta: dict[str, Any], events: Sequence[TokenEvent] = (), *, last: bool = False
    ) -> dict[str, Any]:
        entry = {"index": choice.index, "delta": delta, **self._details(choice, events, last=last)}
        return self._object("chat.completion.chunk", [entry])

    def _details(self, choice: Answer, events: Sequence[TokenEvent], *, last: bool) -> dict[str, Any]:
        logprobs = None
        if self.request.logprobs and events:
            logprobs = {
                "content": [chat_logprob(self.tokenizer, e.logprob) for e in events if e.logprob is not None],
                "refusal": None,
            }
        details: dict[str, Any] = {
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason if last else None,
        }
        if last:
            details["stop_reason"] = choice.stop_reason
        if self.request.return_token_ids:
            details["token_ids"] = [event.token_id for event in events if event.token_id is not None]
        return details

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model_name,
            "choices": choices,
        }
