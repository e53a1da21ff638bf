# SPDX-License-Identifier: Apache-2.0
"""Answers of ``POST /v1/messages``: one object, or its events (https://docs.anthropic.com/en/api/messages-streaming)."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from phalanx.runtime.answer import Answer, TokenEvent
from phalanx.runtime.server.errors import ApiError
from phalanx.runtime.server.openai.answer_format import Served
from phalanx.runtime.server.openai.blocks import Block, Blocks
from phalanx.runtime.server.openai.tools import ToolUse, read_arguments

__all__ = ["MessageReply"]


@dataclass(frozen=True, slots=True)
class MessageReply:
    """Writes one message; see `Reply`."""

    served: Served
    tools: ToolUse | None
    id: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")

    def whole(self, choices: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        (choice,) = choices
        blocks = Blocks(self.served, self.tools)
        for _ in blocks.push("".join(event.text for event in choice.events), last=True):
            continue
        content = [_content(block) for block in blocks.blocks]
        return self.message(content, usage) | _end(choice, blocks)

    def stream(self, usage: Callable[[], dict[str, Any]]) -> MessageEvents:
        return MessageEvents(self, usage, Blocks(self.served, self.tools))

    def message(self, content: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """The object that answers, as long as it has no end."""
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.served.model_name,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(usage),
        }


@dataclass(slots=True)
class MessageEvents:
    """Writes the events of one message; see `StreamChunks`."""

    reply: MessageReply
    count: Callable[[], dict[str, Any]]
    blocks: Blocks
    done: bytes = b""

    def opening(self, choices: Sequence[Answer]) -> bytes:
        return _event("message_start", message=self.reply.message([], self.count()))

    def text_writer(self, choice: Answer) -> Callable[[str], bytes] | None:
        return self._grown

    def tokens(self, choice: Answer, events: Sequence[TokenEvent]) -> bytes:
        data = self._grown("".join(event.text for event in events), last=events[-1].last)
        if not events[-1].last:
            return data
        end = _end(choice, self.blocks)
        return data + self._block_stop() + _event("message_delta", delta=end, usage=_usage(self.count()))

    def usage(self) -> bytes:
        return _event("message_stop")

    def error(self, error: ApiError) -> bytes:
        return b"event: error\ndata: " + error.for_path("/v1/messages")[1] + b"\n\n"

    def _grown(self, pushed: str, *, last: bool = False) -> bytes:
        data = b""
        for block, text, is_new in self.blocks.push(pushed, last=last):
            if is_new:
                data += self._block_stop(block.index - 1) if block.index else b""
                begun = {"type": "text", "text": ""} if block.name is None else _tool_use(block, {})
                data += _event("content_block_start", index=block.index, content_block=begun)
            if text:
                kind = ("text_delta", "text") if block.name is None else ("input_json_delta", "partial_json")
                data += _event("content_block_delta", index=block.index, delta={"type": kind[0], kind[1]: text})
        return data

    def _block_stop(self, index: int | None = None) -> bytes:
        return _event("content_block_stop", index=len(self.blocks.blocks) - 1 if index is None else index)


def _content(block: Block) -> dict[str, Any]:
    """A block of the content. A call whose arguments are no JSON object, cut off perhaps, is the text that it is."""
    if block.name is None:
        return {"type": "text", "text": block.text}
    if (arguments := read_arguments(block.text)) is None:
        return {"type": "text", "text": f"{block.name} {block.text}"}
    return _tool_use(block, arguments)


def _tool_use(block: Block, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": block.id, "name": block.name, "input": arguments}


def _end(choice: Answer, blocks: Blocks) -> dict[str, Any]:
    """Why the message ended."""
    if choice.finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if blocks.has_calls and not (choice.stopped_by_text and blocks.ends_inside_a_call):
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if choice.stopped_by_text:
        return {"stop_reason": "stop_sequence", "stop_sequence": choice.stop_reason}
    return {"stop_reason": "end_turn", "stop_sequence": None}


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    """Tokens of the prompt are either read from the cache or not."""
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
    }


def _event(kind: str, **members: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode({"type": kind, **members}) + b"\n\n"
