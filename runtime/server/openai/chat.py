# SPDX-License-Identifier: Apache-2.0
"""Answers of ``POST /v1/chat/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from phalanx.runtime.answer import Answer, TokenEvent
from phalanx.runtime.server.openai.answer_format import Served
from phalanx.runtime.server.openai.logprobs import chat_logprob, prompt_logprobs
from phalanx.runtime.server.openai.protocol import ChatRequest
from phalanx.runtime.server.openai.tools import ToolUse, new_call_id, read_arguments
from phalanx.runtime.text.tool_calls import CallPiece, ToolCallReader

__all__ = ["ChatFormat"]


@dataclass(slots=True)
class ChatFormat:
    """Writes ``chat.completion`` objects; see `AnswerFormat`.

    Attributes:
        tools: what the model may call; None = text only.
        readers: of tool calls, one for each answer.
        arguments: of each answer's last call, so far.
    """

    served: Served
    request: ChatRequest
    tools: ToolUse | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    readers: dict[int, ToolCallReader] = field(default_factory=dict)
    arguments: dict[int, str] = field(default_factory=dict)
    id: str = field(init=False)

    def __post_init__(self) -> None:
        self.id = f"chatcmpl-{self.request.request_id or uuid.uuid4().hex}"

    @property
    def has_plain_chunks(self) -> bool:
        """Whether chunks differ in their text only."""
        return not (self.request.logprobs or self.request.return_token_ids or self.tools)

    def opening(self, choice: Answer) -> list[dict[str, Any]]:
        """The role, and what is echoed."""
        first = self._chunk(choice, {"role": "assistant", "content": ""}) | self._prompt_ids(choice)
        return [first, self._chunk(choice, {"content": echoed})] if (echoed := self._echoed()) else [first]

    def chunks(self, choice: Answer, events: Sequence[TokenEvent]) -> list[dict[str, Any]]:
        """One chunk with all of ``events``, then an empty one with the reason for the end."""
        text, last = "".join(event.text for event in events), events[-1].last
        chunks = []
        if text or (last and self.tools) or any(event.token_id is not None for event in events):
            chunks.append(self._chunk(choice, self._delta(choice, text, last=last), events))
        if last:
            chunks.append(self._chunk(choice, {}, last=True))
        return chunks

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._object("chat.completion.chunk", []), "usage": usage}

    def whole(self, choices: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        entries = [
            {
                "index": choice.index,
                "message": self._message(choice),
                **self._details(choice, choice.events, last=True),
            }
            for choice in choices
        ]
        whole = {**self._object("chat.completion", entries), "usage": usage} | self._prompt_ids(choices[0])
        if (most := self.request.prompt_logprobs) is not None:
            whole["prompt_logprobs"] = prompt_logprobs(self.served.tokenizer, choices[0].prompt_logprobs or (), most)
        return whole

    def _delta(self, choice: Answer, text: str, *, last: bool) -> dict[str, Any]:
        if self.tools is None:
            return {"content": text}
        return self._merged(self._pieces(choice, text, last=last), "index")

    def _message(self, choice: Answer) -> dict[str, Any]:
        text = "".join(event.text for event in choice.events)
        message = {"role": "assistant", "content": text, "refusal": None}
        if self.tools is not None:
            merged = self._merged(self._pieces(choice, text, last=True))
            message |= {"content": merged.get("content", None if "tool_calls" in merged else ""), **merged}
        if echoed := self._echoed():
            message["content"] = echoed + (message["content"] or "")
        return message

    def _prompt_ids(self, choice: Answer) -> dict[str, Any]:
        return {"prompt_token_ids": choice.prompt_token_ids} if self.request.return_token_ids else {}

    def _echoed(self) -> str:
        """The last message, if the answer is to begin with it: it is the assistant's own."""
        last = self.request.messages[-1]
        if not self.request.echo or last.role != "assistant":
            return ""
        parts = [{"text": last.content}] if isinstance(last.content, str) else last.content or ()
        return "".join(part.get("text", "") for part in parts)

    def _pieces(self, choice: Answer, text: str, *, last: bool) -> list[CallPiece]:
        reader = self._reader(choice)
        pieces = reader.push(text) + (reader.finish() if last else [])
        for piece in pieces:
            if piece.call is not None:
                before = "" if piece.name is not None else self.arguments[choice.index]
                self.arguments[choice.index] = before + piece.text
        return pieces

    def _reader(self, choice: Answer) -> ToolCallReader:
        reader = self.readers.get(choice.index)
        if reader is None:
            assert self.tools is not None
            reader = self.readers[choice.index] = self.tools.reader(self.served.tool_call_form)
        return reader

    def _merged(self, pieces: Iterable[CallPiece], *numbered: str) -> dict[str, Any]:
        """Text and calls of some pieces as members of a message or a delta."""
        text, calls = "", dict[int, dict[str, Any]]()
        for piece in pieces:
            if piece.call is None:
                text += piece.text
                continue
            call = calls.setdefault(piece.call, {**dict.fromkeys(numbered, piece.call), "function": {"arguments": ""}})
            if piece.name is not None:
                call |= {"id": new_call_id(self.served.tool_call_form), "type": "function"}
                call["function"] = {"name": piece.name, "arguments": ""}
            call["function"]["arguments"] += piece.text
        merged: dict[str, Any] = {"content": text} if text else {}
        return merged | ({"tool_calls": list(calls.values())} if calls else {})

    def _finish_reason(self, choice: Answer) -> str | None:
        """Calls have a reason of their own, but not one that the request demanded by its name (as in OpenAI's API)."""
        reader = self.readers.get(choice.index)
        called = reader is not None and reader.num_calls > 0 and self.tools is not None and self.tools.named is None
        if not called or choice.finish_reason != "stop" or self._ends_inside_a_call(choice):
            return choice.finish_reason
        return "tool_calls"

    def _ends_inside_a_call(self, choice: Answer) -> bool:
        """Whether a stop text came before the end of the last call's arguments."""
        return choice.stopped_by_text and read_arguments(self.arguments.get(choice.index, "")) is None

    def _chunk(
        self, choice: Answer, delta: dict[str, Any], events: Sequence[TokenEvent] = (), *, last: bool = False
    ) -> dict[str, Any]:
        entry = {"index": choice.index, "delta": delta, **self._details(choice, events, last=last)}
        return self._object("chat.completion.chunk", [entry])

    def _details(self, choice: Answer, events: Sequence[TokenEvent], *, last: bool) -> dict[str, Any]:
        logprobs = None
        if self.request.logprobs and events:
            labels = None if self.request.return_tokens_as_token_ids else self.served.tokenizer
            logprobs = {
                "content": [chat_logprob(labels, e.logprob) for e in events if e.logprob is not None],
                "refusal": None,
            }
        details: dict[str, Any] = {
            "logprobs": logprobs,
            "finish_reason": self._finish_reason(choice) if last else None,
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
            "model": self.served.model_name,
            "choices": choices,
        }
