# SPDX-License-Identifier: Apache-2.0
"""From the body of a Responses request to what has to be generated."""

from __future__ import annotations

from typing import Any

from phalanx.parallel.errors import RequestError
from phalanx.runtime.sampling.guides import GuideRule
from phalanx.runtime.server.errors import from_request_error, invalid
from phalanx.runtime.server.openai.parsing import MAX_MESSAGES, ApiGeneration, Conversation, checked_salt
from phalanx.runtime.server.openai.protocol import convert_item, decode_generation
from phalanx.runtime.server.openai.tools import (
    FunctionCall,
    FunctionTool,
    NamedTool,
    Tool,
    ToolCall,
    ToolName,
    ToolUse,
    template_call,
    tool_use,
)
from phalanx.runtime.server.responses.protocol import (
    FunctionCallItem,
    FunctionCallOutputItem,
    InputItem,
    InputText,
    JsonObject,
    JsonSchema,
    MessageItem,
    NamedFunction,
    OutputText,
    ReasoningItem,
    ResponsesRequest,
)
from phalanx.runtime.server.responses.reply import ResponseReply

__all__ = ["parse_response"]


def parse_response(body: bytes) -> ApiGeneration:
    """Read the body of ``POST /v1/responses``.

    Raises:
        ApiError: 400, naming the field.
    """
    request, sampling = decode_generation(body, ResponsesRequest)
    if request.store:
        raise invalid(
            "store: this server keeps no responses; use false, or leave it out", "store", "unsupported_parameter"
        )
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options needs stream=true; leave it out or stream", "stream_options")
    sampling |= _guide(request, sampling)
    tools = _tool_use(request)
    if tools is not None:
        sampling = tools.sampling(sampling)
    return ApiGeneration(
        model=request.model,
        prompts=[Conversation(_messages(request), tools=tools)],
        n=1,
        sampling=sampling,
        max_tokens=request.max_output_tokens,
        max_tokens_name="max_output_tokens",
        default_max_tokens=None,
        add_special_tokens=False,
        stream=request.stream,
        reply=lambda served: ResponseReply(served, request, tools),
        cache_salt=checked_salt(request.cache_salt),
        priority=request.priority or 0,
    )


def _guide(request: ResponsesRequest, sampling: dict[str, Any]) -> dict[str, Any]:
    """The sampling field for ``text.format``."""
    form = None if request.text is None else request.text.format
    if not isinstance(form, (JsonObject, JsonSchema)):
        return {}
    if sampling.get("structured_outputs") is not None:
        raise invalid("text.format and structured_outputs both say what the answer must match; leave one out", "text")
    guide: dict[str, Any] = {"json": form.schema} if isinstance(form, JsonSchema) else {"json_object": True}
    try:
        return {"structured_outputs": GuideRule().check("text", guide)}
    except RequestError as error:
        raise from_request_error(error) from None


def _messages(request: ResponsesRequest) -> list[dict[str, Any]]:
    """Instructions and input as chat templates know them."""
    messages = [] if not request.instructions else [{"role": "system", "content": request.instructions}]
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    if not 0 < len(request.input) <= MAX_MESSAGES:
        raise invalid(f"{len(request.input)} items; use 1 to {MAX_MESSAGES}", "input")
    thoughts = ""
    for fields in request.input:
        item: InputItem = convert_item({"type": "message", **fields}, InputItem, "input")
        if isinstance(item, ReasoningItem):
            thoughts += "".join(part.text for part in item.content or ())
            continue
        _add(messages, item)
        if thoughts and messages[-1]["role"] == "assistant":
            earlier = messages[-1].get("reasoning")
            thoughts = f"{earlier}\n{thoughts}" if earlier else thoughts
            messages[-1] |= {"reasoning_content": thoughts, "reasoning": thoughts}
        thoughts = ""
    return messages


def _add(messages: list[dict[str, Any]], item: MessageItem | FunctionCallItem | FunctionCallOutputItem) -> None:
    """Append an item; calls join the message of the assistant that they follow."""
    if isinstance(item, MessageItem):
        role = "system" if item.role == "developer" else item.role
        messages.append({"role": role, "content": _content(item.content)})
    elif isinstance(item, FunctionCallItem):
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        call = ToolCall(FunctionCall(item.name, item.arguments), item.call_id)
        messages[-1].setdefault("tool_calls", []).append(template_call(call, "input"))
    else:
        messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)})


def _content(content: str | list[InputText] | list[InputText | OutputText]) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    if not content:
        raise invalid("an item has no content; give a text", "input")
    return [{"type": "text", "text": part.text} for part in content]


def _tool_use(request: ResponsesRequest) -> ToolUse | None:
    tools = [
        Tool(FunctionTool(tool.name, tool.description, tool.parameters, tool.strict)) for tool in request.tools or ()
    ]
    choice = request.tool_choice
    named = NamedTool(ToolName(choice.name)) if isinstance(choice, NamedFunction) else choice
    return tool_use(tools, named, request.parallel_tool_calls)
