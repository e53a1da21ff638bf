# SPDX-License-Identifier: Apache-2.0
"""Request bodies of the Messages protocol, as https://docs.anthropic.com/en/api/messages lists them.

Unknown fields and kinds of content are refused by name; null means absent.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

__all__ = [
    "CountTokensRequest",
    "DocumentBlock",
    "ImageBlock",
    "Message",
    "MessagesRequest",
    "TextBlock",
    "ToolResultBlock",
    "ToolUseBlock",
]


class TextBlock(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """A text. Marks for a cache change nothing: every prefix is cached."""

    text: str
    cache_control: Any = None
    citations: list[Any] | None = None


class ImageBlock(msgspec.Struct, tag_field="type", tag="image"):
    """Known, and refused by name."""

    source: Any


class DocumentBlock(msgspec.Struct, tag_field="type", tag="document"):
    """Known, and refused by name."""

    source: Any


class ThinkingBlock(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="thinking"):
    """What the assistant thought before its answer; the chat template decides whether to show it."""

    thinking: str
    signature: Any = None


class RedactedThinkingBlock(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="redacted_thinking"):
    """Thoughts that nothing here can read; left out."""

    data: Any = None


class ToolUseBlock(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="tool_use"):
    """A call that the assistant made."""

    id: str
    name: str
    input: dict[str, Any]
    cache_control: Any = None
    caller: Any = None
    toolset_name: str | None = None


class ToolResultBlock(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="tool_result"):
    """What a call returned; a text that reports an error is a text like others."""

    tool_use_id: str
    content: str | list[TextBlock | ImageBlock | DocumentBlock] | None = None
    is_error: bool | None = None
    cache_control: Any = None
    toolset_name: str | None = None


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """One turn."""

    role: Literal["user", "assistant"]
    content: (
        str
        | list[
            TextBlock
            | ImageBlock
            | DocumentBlock
            | ToolUseBlock
            | ToolResultBlock
            | ThinkingBlock
            | RedactedThinkingBlock
        ]
    )


class Tool(msgspec.Struct, forbid_unknown_fields=True):
    """A function of the client; ``input_schema`` is a JSON schema."""

    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] = "custom"
    strict: bool | None = None
    cache_control: Any = None
    eager_input_streaming: bool | None = None

    # Known, and accepted only with a value that changes nothing (see `NEUTRAL_VALUES`)
    allowed_callers: Any = None
    defer_loading: Any = None
    input_examples: Any = None


class ToolChoice(msgspec.Struct, forbid_unknown_fields=True):
    """Whether a tool must be used; ``name`` with type ``tool``."""

    type: Literal["auto", "any", "tool", "none"] = "auto"
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True):
    """JSON that matches a schema, which is enforced."""

    schema: dict[str, Any]
    type: Literal["json_schema"] = "json_schema"


class OutputConfig(msgspec.Struct, forbid_unknown_fields=True):
    """What the answer looks like; ``effort`` is known, and refused."""

    format: JsonSchema | None = None
    effort: Any = None


class CountTokensRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of ``POST /v1/messages/count_tokens``, and what it has in common with a request for a message."""

    messages: list[Message]
    model: str | None = None
    system: str | list[TextBlock | ImageBlock | DocumentBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None

    # Accepted, and without effect on the answer
    billing_policy: Any = None
    cache_control: Any = None
    user_profile_id: Any = None
    workspace_id: Any = None

    # Known, and accepted only with a value that changes nothing (see `NEUTRAL_VALUES`)
    compaction: Any = None
    context_management: Any = None
    mcp_servers: Any = None
    speed: Any = None
    thinking: Any = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    """Body of ``POST /v1/messages``, less the sampling fields."""

    max_tokens: int
    stream: bool = False

    metadata: Any = None
    service_tier: Any = None
    inference_geo: Any = None

    container: Any = None
    diagnostics: Any = None
    fallback_credit_token: Any = None
    fallbacks: Any = None
    thread: Any = None
