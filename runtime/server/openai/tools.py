# SPDX-License-Identifier: Apache-2.0
"""Tools in the OpenAI protocol: the functions that a request offers, the choice among them, calls of earlier turns."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from phalanx.parallel.errors import RequestError
from phalanx.runtime.sampling.guides import Guide, GuideRule
from phalanx.runtime.server.errors import from_request_error, invalid
from phalanx.runtime.server.openai.forced_calls import arguments_schema, calls_schema, check_sizes
from phalanx.runtime.server.openai.strict_calls import strict_grammar
from phalanx.runtime.text import Tokenizer
from phalanx.runtime.text.tool_calls import ArgumentsReader, CallListReader, ToolCallReader, tool_call_reader

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
    "read_arguments",
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
        is_required: whether the answer must be calls.
        named: the function that must be called; None = any.
        strict: names of functions whose arguments must match their schema where the model is free to call or not.
    """

    described: Sequence[dict[str, Any]]
    names: tuple[str, ...]
    parallel: bool = True
    is_required: bool = False
    named: str | None = None
    strict: frozenset[str] = frozenset()

    @property
    def is_forced(self) -> bool:
        """Whether the answer is calls as JSON, because a grammar enforces it, and not in the model's own form."""
        return self.is_required or self.named is not None

    def reader(self, form: str | None) -> ToolCallReader:
        """Return a reader of one answer's calls; ``form`` is the model's own, a key of `TOOL_CALL_FORMS`."""
        if self.named is not None:
            return ArgumentsReader((self.named,))
        if self.is_required:
            return CallListReader(self.names, parallel=self.parallel)
        assert form is not None
        schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in self.described}
        return tool_call_reader(form, self.names, parallel=self.parallel, schemas=schemas)

    def sampling(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the sampling fields of a request, ``given``, with what the tools add to them.

        Raises:
            ApiError: 400: the request already has a guide other than a JSON schema, with which the answer could not be a call.
        """
        guide = given.get("structured_outputs")
        if guide is not None and guide.kind != "json":
            raise invalid(
                f"an answer that may be calls cannot be held to a {guide.kind}; leave tools or {guide.name} out, or use tool_choice 'none'",
                "tools",
                "unsupported_parameter",
            )
        if not self.is_forced:  # some forms mark a call with a special token
            return {"skip_special_tokens": False, **given}
        if self.named is not None:
            parameters = dict(self._functions)[self.named]
            check_sizes([parameters])
            return {**given, **_as_field({"json": arguments_schema(parameters)})}
        return {**given, **_as_field({"json": calls_schema(self._functions, parallel=self.parallel)})}

    def guide(self, form: str, tokenizer: Tokenizer, answer: Guide | None) -> dict[str, Any]:
        """Return the sampling field that holds calls in ``form`` to the schemas of the strict functions, and what is no call to ``answer``.

        None without such functions and without ``answer``, a guide for JSON.

        Raises:
            ApiError: 400: a schema says more than calls in this form can be held to.
        """
        if self.is_forced or not (self.strict or answer):
            return {}
        check_sizes(parameters for name, parameters in self._functions if name in self.strict)
        functions = [
            (name, arguments_schema(parameters) if name in self.strict else {"type": "object"})
            for name, parameters in self._functions
        ]
        schema = None if answer is None else json.loads(answer.text)
        if isinstance(schema, bool):
            schema = {} if schema else {"not": {}}
        return _as_field({"grammar": strict_grammar(form, functions, tokenizer, schema)})

    @property
    def _functions(self) -> list[tuple[str, dict[str, Any] | None]]:
        return [(tool["function"]["name"], tool["function"].get("parameters")) for tool in self.described]


def _as_field(guide: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"structured_outputs": GuideRule().check("tools", guide)}
    except RequestError as error:
        raise from_request_error(error) from None


def tool_use(tools: Sequence[Tool], choice: ToolChoice | None, parallel: bool | None) -> ToolUse | None:
    """Return the tools that the model is shown; None if there are none, or the choice is ``none``.

    Raises:
        ApiError: 400: too many tools, a name twice, or a choice without its tool.
    """
    names = tuple(tool.function.name for tool in tools)
    _check_names(names)
    named = choice.function.name if isinstance(choice, NamedTool) else None
    if named is not None and named not in names:
        raise invalid(f"tool_choice names {named!r}, which is not among tools", "tool_choice")
    if choice == "required" and not tools:
        raise invalid("tool_choice 'required' needs tools; give at least one", "tool_choice")
    if not tools or choice == "none":
        return None
    is_forced = choice == "required" or named is not None
    strict = frozenset(() if is_forced else (tool.function.name for tool in tools if tool.function.strict))
    described = [_described(tool) for tool in tools]
    return ToolUse(described, names, parallel is not False, choice == "required", named, strict)


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


def read_arguments(text: str) -> dict[str, Any] | None:
    """Return the arguments of a call that a model wrote; None if they are no JSON object, because the answer ended inside of them perhaps."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return None


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
