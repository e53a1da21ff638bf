# SPDX-License-Identifier: Apache-2.0
"""``POST /v1/chat/completions``."""

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
from phalanx.runtime.server.openai.fields import num_choices, sampling_params
from phalanx.runtime.server.openai.generation import GenerationJob
from phalanx.runtime.server.openai.logprobs import chat_logprob
from phalanx.runtime.server.openai.protocol import ChatMessage, ChatRequest, StreamOptions
from phalanx.runtime.server.services import Services
from phalanx.runtime.text import Tokenizer

__all__ = ["chat_job", "render_messages"]

ROLES = ("system", "developer", "user", "assistant")
MAX_MESSAGES = 4096


async def chat_job(services: Services, request: ChatRequest, arrival: float, held: ExitStack) -> GenerationJob:
    """Check a request and render its messages; what it holds is released with ``held``.

    Raises:
        ApiError: a field is refused, or there is no room now.
    """
    services.check_model(request.model)
    _check_fields(request)
    n = num_choices(request)
    held.enter_context(services.client.admit(n))
    prompt = await render_messages(services, request)
    token_ids = await services.encode(prompt, add_special_tokens=request.add_special_tokens is True)
    name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    asked = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    if asked == 0:
        raise invalid(f"{name}=0 asks for nothing; use at least 1", name)
    params = sampling_params(
        request,
        services.model,
        max_tokens=services.completion_budget(len(token_ids), asked, name),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
    answer = ChatAnswer(services.model_name, services.tokenizer, request)
    options = request.stream_options or StreamOptions()
    job = GenerationJob(services, answer, arrival, bool(request.stream), options, held)
    job.add_prompt(token_ids, params, n)
    return job


async def render_messages(services: Services, request: ChatRequest) -> str:
    """The prompt text, as the checkpoint's template writes it.

    Raises:
        ApiError: 400: no template, or the template refuses the messages.
    """
    template = services.need_template()
    messages = [_template_message(message) for message in request.messages]
    return await services.in_worker(
        lambda: template.render(
            messages,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            options=request.chat_template_kwargs,
        )
    )


def _check_fields(request: ChatRequest) -> None:
    if not request.messages:
        raise invalid("messages is empty; give at least one", "messages")
    if len(request.messages) > MAX_MESSAGES:
        raise invalid(f"{len(request.messages)} messages are too many; use at most {MAX_MESSAGES}", "messages")
    for message in request.messages:
        if message.role not in ROLES:
            raise invalid(f"role {message.role!r} is not supported; use one of {', '.join(ROLES)}", "messages")
        if message.content is None:
            raise invalid("a message has no content; give a text", "messages")
    if request.top_logprobs is not None:
        if not request.logprobs:
            raise invalid("top_logprobs needs logprobs=true", "top_logprobs")
        if not 0 <= request.top_logprobs <= MAX_LOGPROBS:
            raise invalid(
                f"top_logprobs={request.top_logprobs} is out of range; use 0 to {MAX_LOGPROBS}",
                "top_logprobs",
            )
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options needs stream=true; leave it out or stream", "stream_options")
    if request.continue_final_message and request.messages[-1].role != "assistant":
        raise invalid("continue_final_message needs a last message of the assistant", "continue_final_message")


def _template_message(message: ChatMessage) -> dict[str, Any]:
    """A message as templates know it; ``developer`` is the newer name of ``system``."""
    role = "system" if message.role == "developer" else message.role
    named = {} if message.name is None else {"name": message.name}
    return {"role": role, "content": message.content, **named}


@dataclass(slots=True)
class ChatAnswer:
    """Writes ``chat.completion`` objects; see `AnswerFormat`."""

    model_name: str
    tokenizer: Tokenizer | None
    request: ChatRequest
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

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
        """See `AnswerFormat.usage_chunk`."""
        return {**self._object("chat.completion.chunk", []), "usage": usage}

    def whole(self, choices: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        """See `AnswerFormat.whole`."""
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
