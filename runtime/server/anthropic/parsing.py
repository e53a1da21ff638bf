# SPDX-License-Identifier: Apache-2.0
"""From the body of a Messages request to what has to be generated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from phalanx.parallel.errors import RequestError
from phalanx.runtime.sampling.guides import GuideRule
from phalanx.runtime.server.anthropic.protocol import (
    CountTokensRequest,
    DocumentBlock,
    ImageBlock,
    Message,
    MessagesRequest,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from phalanx.runtime.server.anthropic.reply import MessageReply
from phalanx.runtime.server.errors import from_request_error, invalid
from phalanx.runtime.server.openai.parsing import MAX_MESSAGES, ApiGeneration, Conversation
from phalanx.runtime.server.openai.protocol import decode_generation
from phalanx.runtime.server.openai.tools import FunctionTool, NamedTool, Tool, ToolChoice, ToolName, ToolUse, tool_use

__all__ = ["conversation", "parse_message"]

_Part = TextBlock | ImageBlock | DocumentBlock


def parse_message(body: bytes) -> ApiGeneration:
    """Read the body of ``POST /v1/messages``.

    Raises:
        ApiError: 400, naming the field.
    """
    request, sampling = decode_generation(body, MessagesRequest, "anthropic")
    if request.max_tokens < 1:
        raise invalid(f"max_tokens={request.max_tokens} asks for nothing; use at least 1", "max_tokens")
    prompt = conversation(request)
    sampling |= _guide(request)
    if prompt.tools is not None:
        sampling = prompt.tools.sampling(sampling)
    return ApiGeneration(
        model=request.model,
        prompts=[prompt],
        n=1,
        sampling=sampling,
        max_tokens=request.max_tokens,
        max_tokens_name="max_tokens",
        default_max_tokens=None,
        add_special_tokens=False,
        stream=request.stream,
        reply=lambda served: MessageReply(served, prompt.tools),
    )


def _guide(request: MessagesRequest) -> dict[str, Any]:
    """The sampling field for ``output_config.format``."""
    if request.output_config is None or request.output_config.format is None:
        return {}
    try:
        return {"structured_outputs": GuideRule().check("output_config", {"json": request.output_config.format.schema})}
    except RequestError as error:
        raise from_request_error(error) from None


def conversation(request: CountTokensRequest) -> Conversation:
    """Return the messages of a request; a last one of the assistant is continued.

    Raises:
        ApiError: 400: there are no messages or too many, one has no content or content that its role cannot have, or an effort is
            asked for.
    """
    messages = request.messages
    _refuse_effort(request)
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise invalid(f"{len(messages)} messages; use 1 to {MAX_MESSAGES}", "messages")
    system = [] if not request.system else [{"role": "system", "content": _texts(request.system)}]
    turns = [turn for message in messages for turn in _turns(message)]
    continued = messages[-1].role == "assistant"
    return Conversation(
        [*system, *turns],
        add_generation_prompt=not continued,
        continue_final_message=continued,
        tools=_tool_use(request),
    )


def _refuse_effort(request: CountTokensRequest) -> None:
    if request.output_config is None or (effort := request.output_config.effort) is None:
        return
    raise invalid(
        f"output_config.effort={str(effort)[:40]!r} is not supported by this server, which cannot tell a model how long to think; "
        "leave it out, or say it in the prompt",
        "output_config.effort",
        "unsupported_parameter",
    )


def _turns(message: Message) -> Iterator[dict[str, Any]]:
    """A message as chat templates know it: results of tools are messages of their own."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    if not message.content:
        raise invalid("a message has no content; give a text", "messages")
    texts: list[_Part] = []
    calls: list[dict[str, Any]] = []
    thoughts = ""
    for block in message.content:
        if isinstance(block, ThinkingBlock | RedactedThinkingBlock):
            thoughts += _thoughts(block, message.role)
        elif isinstance(block, ToolUseBlock):
            calls.append(_call(block, message.role))
        elif isinstance(block, ToolResultBlock):
            yield from _flushed(message.role, texts)
            yield _result(block, message.role)
        else:
            texts.append(block)
    shown = {"reasoning_content": thoughts, "reasoning": thoughts} if thoughts else {}
    if calls:
        yield {"role": message.role, "content": _texts(texts) if texts else None, "tool_calls": calls, **shown}
    elif (
        message.role == "assistant" and not texts
    ):  # thoughts alone are a turn, too, and may be the one that is continued
        yield {"role": message.role, "content": "", **shown}
    else:
        yield from ({**turn, **shown} for turn in _flushed(message.role, texts))


def _flushed(role: str, texts: list[_Part]) -> Iterator[dict[str, Any]]:
    if texts:
        yield {"role": role, "content": _texts(texts)}
        texts.clear()


def _thoughts(block: ThinkingBlock | RedactedThinkingBlock, role: str) -> str:
    if role != "assistant":
        raise invalid("only the assistant's messages may hold thinking", "messages")
    return block.thinking if isinstance(block, ThinkingBlock) else ""


def _call(block: ToolUseBlock, role: str) -> dict[str, Any]:
    if role != "assistant":
        raise invalid("only the assistant's messages may hold tool_use", "messages")
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}


def _result(block: ToolResultBlock, role: str) -> dict[str, Any]:
    if role != "user":
        raise invalid("only the user's messages may hold tool_result", "messages")
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": _texts(block.content or "")}


def _texts(content: str | Sequence[_Part]) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": _text(block)} for block in content]


def _text(block: _Part) -> str:
    if not isinstance(block, TextBlock):
        kind = block.__struct_config__.tag
        raise invalid(
            f"{kind} blocks are not supported by this server, whose models read text; leave them out", "messages"
        )
    return block.text


def _tool_use(request: CountTokensRequest) -> ToolUse | None:
    tools = [
        Tool(FunctionTool(tool.name, tool.description, tool.input_schema, tool.strict)) for tool in request.tools or ()
    ]
    given = request.tool_choice
    if given is None:
        return tool_use(tools, None, None)
    if (given.type == "tool") != (given.name is not None):
        raise invalid("tool_choice has a name with type 'tool' and no other", "tool_choice")
    choice: ToolChoice = NamedTool(ToolName(given.name)) if given.name is not None else _CHOICES[given.type]
    return tool_use(tools, choice, not given.disable_parallel_tool_use)


_CHOICES: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none"}
