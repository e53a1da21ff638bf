# SPDX-License-Identifier: Apache-2.0
"""Tools in the OpenAI protocol: the functions that a request offers, the choice among them, calls of earlier turns."""

from __future__ import annotations

import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from phalanx.runtime.server.errors import invalid

__all__ = [
    "FunctionCall",
    "FunctionTool",
    "NamedTool",
    "Tool",
    "ToolCall",
    "ToolChoice",
    "ToolName",
    "ToolUse",
    "new_call_id",
    "template_call",
    "tool_use",
]

MAX_TOOLS = 128
MAX_NAME_CHARACTERS = 128


class FunctionTool(msgspec.Struct, forbid_unknown_fields=True):
    """A function that the model may call; ``parameters`` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, forbid_unknown_fields=True):
    """A member of ``tools``."""

    function: FunctionTool
    type: Literal["function"] = "function"


class ToolName(msgspec.Struct, forbid_unknown_fields=True):
    """The function of a `NamedTool`."""

    name: str


class NamedTool(msgspec.Struct, forbid_unknown_fields=True):
    """``tool_choice`` for one function."""

    function: ToolName
    type: Literal["function"] = "function"


class FunctionCall(msgspec.Struct, forbid_unknown_fields=True):
    """A function and its arguments: JSON text, or the object itself."""

    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(msgspec.Struct, forbid_unknown_fields=True):
    """A call in a message of the assistant."""

    function: FunctionCall
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None


ToolChoice = Literal["none", "auto", "required"] | NamedTool


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of one request, if the model may call any.

    Attributes:
        described: as chat templates take them.
        names: of the functions.
        parallel: whether an answer may hold several calls.
    """

    described: Sequence[dict[str, Any]]
    names: tuple[str, ...]
    parallel: bool = True


def tool_use(tools: Sequence[Tool], choice: ToolChoice | None, parallel: bool | None) -> ToolUse | None:
    """Return the tools that the model is shown; None if there are none, or the choice is ``none``.

    Raises:
        ApiError: 400: too many tools, a name twice, a choice without its tool, or one that cannot be enforced.
    """
    names = tuple(tool.function.name for tool in tools)
    _check_names(names)
    if choice not in (None, "none", "auto"):
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise invalid(f"tool_choice names {choice.function.name!r}, which is not among tools", "tool_choice")
        raise invalid(
            "tool_choice can be 'none' or 'auto' on this server: a call cannot be enforced",
            "tool_choice",
            "unsupported_parameter",
        )
    if any(tool.function.strict for tool in tools):
        raise invalid(
            "tools: strict is not supported by this server; leave it out, and check the arguments of calls",
            "tools",
            "unsupported_parameter",
        )
    if not tools or choice == "none":
        return None
    return ToolUse([_described(tool) for tool in tools], names, parallel is not False)


def template_call(call: ToolCall, param: str = "messages") -> dict[str, Any]:
    """Return a call of an earlier turn as chat templates take it: with its arguments as an object.

    Raises:
        ApiError: 400: the arguments are no JSON object.
    """
    arguments: Any = call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments or "{}")
        except (msgspec.DecodeError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise invalid(f"the arguments of the call of {call.function.name!r} are not a JSON object", param)
    known = {} if call.id is None else {"id": call.id}
    return {**known, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def new_call_id(form: str | None) -> str:
    """Return an id that no other call has. Templates of Mistral accept nothing but nine letters and digits."""
    if form == "mistral":
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"


def _check_names(names: Sequence[str]) -> None:
    if len(names) > MAX_TOOLS:
        raise invalid(f"{len(names)} tools are too many; use at most {MAX_TOOLS}", "tools")
    for name in names:
        if not 0 < len(name) <= MAX_NAME_CHARACTERS or not name.isprintable() or " " in name:
            raise invalid(
                f"tools: {name[:40]!r} is not a function's name; use 1 to {MAX_NAME_CHARACTERS} characters without spaces",
                "tools",
            )
    if len(set(names)) < len(names):
        raise invalid("tools: two functions have the same name; rename one", "tools")


def _described(tool: Tool) -> dict[str, Any]:
    function = {
        "name": tool.function.name,
        "description": tool.function.description,
        "parameters": tool.function.parameters,
    }
    return {"type": tool.type, "function": {name: value for name, value in function.items() if value is not None}}
