# SPDX-License-Identifier: Apache-2.0
"""Answers of ``POST /v1/responses``: one object, or its events.

The events: https://platform.openai.com/docs/api-reference/responses-streaming.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from phalanx.runtime.answer import Answer, TokenEvent
from phalanx.runtime.request import SamplingParams
from phalanx.runtime.server.errors import ApiError
from phalanx.runtime.server.openai.answer_format import Served
from phalanx.runtime.server.openai.blocks import Block, Blocks
from phalanx.runtime.server.openai.tools import ToolUse
from phalanx.runtime.server.responses.protocol import PlainText, ResponsesRequest

__all__ = ["ResponseReply"]


@dataclass(frozen=True, slots=True)
class ResponseReply:
    """Writes one response; see `Reply`."""

    served: Served
    request: ResponsesRequest
    tools: ToolUse | None
    id: str = field(default_factory=lambda: f"resp_{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        (choice,) = choices
        blocks = Blocks(self.served, self.tools)
        for _ in blocks.push("".join(event.text for event in choice.events), last=True):
            continue
        return self.ended(choice, blocks, usage)

    def stream(self, usage: Callable[[], dict[str, Any]]) -> ResponseEvents:
        return ResponseEvents(self, usage, Blocks(self.served, self.tools))

    def response(self, status: str, params: SamplingParams, output: list[dict[str, Any]]) -> dict[str, Any]:
        """The object that answers, as far as it does not depend on the end."""
        request = self.request
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "model": self.served.model_name,
            "output": output,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": params.temperature,
            "text": {"format": (request.text and request.text.format) or PlainText()},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": request.user,
            "metadata": request.metadata or {},
        }

    def ended(self, choice: Answer, blocks: Blocks, usage: dict[str, Any]) -> dict[str, Any]:
        """The whole response. A call that a stop text cut off is incomplete, as one that the length limit did."""
        is_cut = choice.finish_reason == "length"
        status = "incomplete" if is_cut else "completed"
        items = [self.item(block, "completed") for block in blocks.blocks[:-1]]
        items.append(self.item(blocks.blocks[-1], "incomplete" if is_cut or blocks.ends_inside_a_call else "completed"))
        response = self.response(status, choice.params, items)
        return response | {
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "usage": _usage(usage),
        }

    def item(self, block: Block, status: str) -> dict[str, Any]:
        """A member of ``output``."""
        common = {"id": self.item_id(block), "status": status}
        if block.name is None:
            content = [] if status == "in_progress" else [_part(block.text)]
            return {**common, "type": "message", "role": "assistant", "content": content}
        return {
            **common,
            "type": "function_call",
            "call_id": block.id,
            "name": block.name,
            "arguments": block.text,
        }

    def item_id(self, block: Block) -> str:
        """The id by which events name a member of ``output``."""
        return f"{'msg' if block.name is None else 'fc'}_{self.id.removeprefix('resp_')}_{block.index}"


@dataclass(slots=True)
class ResponseEvents:
    """Writes the events of one response; see `StreamChunks`."""

    reply: ResponseReply
    count: Callable[[], dict[str, Any]]
    blocks: Blocks
    done: bytes = b""
    num_events: int = 0
    choice: Answer | None = None

    def opening(self, choices: Sequence[Answer]) -> bytes:
        (self.choice,) = choices
        response = self.reply.response("in_progress", self.choice.params, [])
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def text_writer(self, choice: Answer) -> Callable[[str], bytes] | None:
        return self._grown

    def tokens(self, choice: Answer, events: Sequence[TokenEvent]) -> bytes:
        data = self._grown("".join(event.text for event in events), last=events[-1].last)
        if not events[-1].last:
            return data
        response = self.reply.ended(choice, self.blocks, self.count())
        data += self._block_done(self.blocks.blocks[-1], response["output"][-1]["status"])
        return data + self._event(f"response.{response['status']}", response=response)

    def usage(self) -> bytes:
        return b""

    def error(self, error: ApiError) -> bytes:
        assert self.choice is not None
        output = [self.reply.item(block, "incomplete") for block in self.blocks.blocks]
        response = self.reply.response("failed", self.choice.params, output)
        code = "invalid_prompt" if error.status == 400 else "server_error"
        return self._event("response.failed", response=response | {"error": {"code": code, "message": str(error)}})

    def _grown(self, pushed: str, *, last: bool = False) -> bytes:
        data = b""
        for block, text, is_new in self.blocks.push(pushed, last=last):
            if is_new:
                data += self._block_done(self.blocks.blocks[-2], "completed") if block.index else b""
                data += self._block_added(block)
            if text and block.name is None:
                data += self._event("response.output_text.delta", block, content_index=0, delta=text, logprobs=[])
            elif text:
                data += self._event("response.function_call_arguments.delta", block, delta=text)
        return data

    def _block_added(self, block: Block) -> bytes:
        item = self.reply.item(Block(block.index, block.name, "", block.id), "in_progress")
        data = self._event("response.output_item.added", output_index=block.index, item=item)
        if block.name is None:
            data += self._event("response.content_part.added", block, content_index=0, part=_part(""))
        return data

    def _block_done(self, block: Block, status: str) -> bytes:
        if block.name is None:
            data = self._event("response.output_text.done", block, content_index=0, text=block.text, logprobs=[])
            data += self._event("response.content_part.done", block, content_index=0, part=_part(block.text))
        else:
            data = self._event("response.function_call_arguments.done", block, name=block.name, arguments=block.text)
        item = self.reply.item(block, status)
        return data + self._event("response.output_item.done", output_index=block.index, item=item)

    def _event(self, kind: str, block: Block | None = None, **members: Any) -> bytes:
        """One event; those about a block name it."""
        place = {} if block is None else {"item_id": self.reply.item_id(block), "output_index": block.index}
        value = {"type": kind, "sequence_number": self.num_events, **place, **members}
        self.num_events += 1
        return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(value) + b"\n\n"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
