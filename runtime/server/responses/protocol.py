# SPDX-License-Identifier: Apache-2.0
"""The request body of the Responses API, as https://platform.openai.com/docs/api-reference/responses/create lists it.

Unknown fields, items and kinds of content are refused by name; null means absent.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

__all__ = [
    "FunctionCallItem",
    "FunctionCallOutputItem",
    "InputItem",
    "InputText",
    "JsonObject",
    "JsonSchema",
    "MessageItem",
    "NamedFunction",
    "OutputText",
    "PlainText",
    "ReasoningItem",
    "ResponsesRequest",
    "ResponsesTool",
]


class InputText(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="input_text"):
    """A text of the user or the operator. Marks for a cache change nothing: every prefix is cached."""

    text: str
    prompt_cache_breakpoint: Any = None


class OutputText(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="output_text"):
    """A text of the assistant."""

    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class MessageItem(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="message"):
    """One turn; ``type`` may be left out."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText | OutputText]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class FunctionCallItem(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="function_call"):
    """A call that the assistant made; ``arguments`` is JSON text."""

    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class FunctionCallOutputItem(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="function_call_output"):
    """What a call returned."""

    call_id: str
    output: str | list[InputText]
    id: str | None = None
    status: str | None = None
    name: str | None = None


class ReasoningText(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="reasoning_text"):
    """A part of a `ReasoningItem`."""

    text: str


class ReasoningItem(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="reasoning"):
    """What the assistant thought before its next item; the chat template decides whether to show it. Summaries and what is encrypted are left out."""

    content: list[ReasoningText] | None = None
    summary: Any = None
    encrypted_content: Any = None
    id: str | None = None
    status: str | None = None


InputItem = MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem


class ResponsesTool(msgspec.Struct, forbid_unknown_fields=True):
    """A function that the model may call; ``parameters`` is a JSON schema."""

    name: str
    type: Literal["function"] = "function"
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    # Known, and accepted only with a value that changes nothing (see `NEUTRAL_VALUES`)
    allowed_callers: Any = None
    defer_loading: Any = None
    output_schema: Any = None


class NamedFunction(msgspec.Struct, forbid_unknown_fields=True):
    """``tool_choice`` for one function."""

    name: str
    type: Literal["function"] = "function"


class PlainText(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """Any text."""


class JsonObject(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="json_object"):
    """Any JSON object."""


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    """JSON that matches a schema, which is enforced whether ``strict`` or not."""

    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What the text of the answer looks like."""

    format: PlainText | JsonObject | JsonSchema | None = None
    verbosity: Literal["medium"] | None = None


class ResponseStreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """Padding against measuring answers by their packets is never added."""

    include_obfuscation: bool = False


class ResponsesRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of ``POST /v1/responses``, less the sampling fields."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream: bool = False
    stream_options: ResponseStreamOptions | None = None
    tools: list[ResponsesTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    text: TextOptions | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    cache_salt: str | None = None
    priority: int | None = None

    # Accepted, and without effect on the answer
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    service_tier: Any = None

    # Known, and accepted only with a value that changes nothing (see `NEUTRAL_VALUES`)
    access_programs: Any = None
    background: Any = None
    background_options: Any = None
    context_management: Any = None
    conversation: Any = None
    image: Any = None
    include: Any = None
    max_tool_calls: Any = None
    moderation: Any = None
    previous_response_id: Any = None
    prompt: Any = None
    reasoning: Any = None
    top_logprobs: Any = None
    truncation: Any = None
