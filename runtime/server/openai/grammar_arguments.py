# SPDX-License-Identifier: Apache-2.0
"""Rules of arguments that stand one by one in a call, in Python's notation or between tags, made from a function's schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from phalanx.runtime.server.errors import ApiError, invalid
from phalanx.runtime.server.openai.grammar_parts import Marks, SharedRules, json_rule, quoted
from phalanx.runtime.text.tool_calls import alternatives, members_of, property_schema, types_of

__all__ = ["TaggedValues", "python_arguments", "tagged_arguments"]

_DEFINITIONS = ("$defs", "definitions")
_ROOT_KEYS = {"type", "properties", "required", "additionalProperties", *_DEFINITIONS}
_ANNOTATIONS = {"title", "description", "$schema", "$id", "$comment", "default", "examples", "deprecated", "strict"}
_OF_TEXTS = ("pattern", "minLength", "maxLength", "format", "contentEncoding", "not", "allOf")
"""Keywords that bare text cannot be held to."""


class TaggedValues:
    """Rules of values that end with a tag.

    Args:
        closing: the tag.
        around: what may stand on both sides of a value and is no part of it.

    Attributes:
        text: the rule of free text.
    """

    text = "value"

    def __init__(self, marks: Marks, closing: str, around: str = "") -> None:
        self._free, self._end, self._around = marks.text_until(self.text, closing), marks(closing), around
        self._shared = SharedRules()

    def of(self, function: str, schema: Mapping[str, Any], key: str) -> str:
        """The name of the rule of an argument's value.

        Raises:
            ApiError: 400: it is a text of which the schema says more than text without quotes can be held to.
        """
        choices = alternatives(schema, property_schema(schema, key))
        value = choices[0] if len(choices) == 1 else property_schema(schema, key)
        given = [value["const"]] if "const" in value else value.get("enum")
        if given is not None:
            texts = " | ".join(quoted(one if isinstance(one, str) else json.dumps(one)) for one in given)
            return self._ended(f"({texts})")
        if "string" not in _types(choices):
            return self._ended(json_rule({**value, **_definitions(schema)}))
        if wrong := [word for word in _OF_TEXTS if f'"{word}":' in json.dumps(value)]:
            raise _refusal(function, f"{wrong[0]} of {key!r:.60}, a text without quotes in this model's calls")
        return self.text

    def _ended(self, body: str) -> str:
        return self._shared.name(f"{self._around} {body} {self._around} {self._end}")

    def __str__(self) -> str:
        return f"{self._free}{self._shared}"


def python_arguments(rule: str, function: str, schema: Mapping[str, Any], values: SharedRules) -> str:
    """The rule ``rule``: ``key=value, ...`` in the order of ``schema``; values are JSON, which Python reads alike, but True and False.

    Raises:
        ApiError: 400: the schema says more than that can be held to.
    """
    properties = _properties(function, schema)
    if properties is None:
        any_value = values.name(json_rule({}))
        return f"{rule}: (KEY EQUALS {any_value} (COMMA KEY EQUALS {any_value})*)?\n"
    if unnamed := [key for key in properties if not key.isidentifier()]:
        raise _refusal(function, f"{unnamed[0]!r:.60}, which is no name in Python")
    items = [f"{quoted(key)} EQUALS {values.name(_python_value(schema, key))}" for key in properties]
    return _in_order(rule, items, [key in schema.get("required", ()) for key in properties], "COMMA ")


def tagged_arguments(
    rule: str, function: str, schema: Mapping[str, Any], values: TaggedValues, opening: Callable[[str], str]
) -> str:
    """The rule ``rule``: values between tags in the order of ``schema``, texts without quotes, anything else as JSON.

    ``opening`` makes the grammar of what comes before a value of its key's.

    Raises:
        ApiError: 400: the schema says more than that can be held to.
    """
    properties = _properties(function, schema)
    if properties is None:
        return f"{rule}: ({opening('KEY')} {values.text} SPACE)*\n"
    items = [f"{opening(quoted(key))} {values.of(function, schema, key)} SPACE" for key in properties]
    return _in_order(rule, items, [key in schema.get("required", ()) for key in properties], "")


def _types(choices: Sequence[Mapping[str, Any]]) -> set[str]:
    texts = any(isinstance(member, str) for choice in choices for member in members_of(choice) or ())
    return {name for choice in choices for name in types_of(choice)} | ({"string"} if texts else set())


def _python_value(schema: Mapping[str, Any], key: str) -> str:
    choices = alternatives(schema, property_schema(schema, key))
    value = choices[0] if len(choices) == 1 else property_schema(schema, key)
    if _types(choices) == {"boolean"} and not {"enum", "const"} & set(value):
        return '("True" | "False")'
    return json_rule({**value, **_definitions(schema)})


def _in_order(rule: str, items: Sequence[str], required: Sequence[bool], separator: str) -> str:
    """Items in order, of which those that are not required may be left out, with separators between them."""
    if items and all(required):
        return f"{rule}: {f' {separator}'.join(items)}\n"
    count = len(items)
    rules = [f"{rule}: {rule}s0", f'{rule}s{count}: ""', f'{rule}r{count}: ""']
    for index, (item, is_required) in enumerate(zip(items, required, strict=True)):
        following = index + 1
        rules.append(f"{rule}i{index}: {item}")
        first, next_one = f"{rule}i{index} {rule}r{following}", f"{separator}{rule}i{index} {rule}r{following}"
        rules.append(f"{rule}s{index}: {first}" + ("" if is_required else f" | {rule}s{following}"))
        rules.append(f"{rule}r{index}: {next_one}" + ("" if is_required else f" | {rule}r{following}"))
    return "\n".join(rules) + "\n"


def _properties(function: str, schema: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The arguments that a schema names; None if it allows any."""
    if wrong := sorted(set(schema) - _ROOT_KEYS - _ANNOTATIONS):
        raise _refusal(function, f"{wrong[0]!r:.60} of its schema")
    properties = schema.get("properties")
    if properties is None and schema.get("additionalProperties") is not False:
        return None
    named: Mapping[str, Any] = properties or {}
    if missing := [key for key in schema.get("required", ()) if key not in named]:
        raise _refusal(function, f"{missing[0]!r:.60}, which is required and not among its properties")
    return named


def _definitions(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {key: schema[key] for key in _DEFINITIONS if key in schema}


def _refusal(function: str, what: str) -> ApiError:
    return invalid(
        f"tools: {function!r:.140} is strict, but a call in this model's form cannot be held to {what}; leave strict out, or use tool_choice "
        "'required'",
        "tools",
        "unsupported_parameter",
    )
