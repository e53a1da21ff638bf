# SPDX-License-Identifier: Apache-2.0
"""Rules of the values of arguments, between tags or in Python's notation, made from a function's schema."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from phalanx.runtime.server.openai.grammar_parts import Marks, SharedRules, json_rule, quoted, refusal
from phalanx.runtime.text.tool_calls import (
    ANNOTATIONS,
    alternatives,
    members_of,
    pointer_names,
    property_schema,
    types_of,
)

__all__ = ["DEFINITIONS", "PythonValues", "TaggedValues", "Values"]

DEFINITIONS = ("$defs", "definitions")

_OF_TEXTS = (
    "pattern", "minLength", "maxLength", "format", "contentEncoding", "not", "if", "allOf", "anyOf", "oneOf", "$ref",
)  # fmt: skip
"""Keywords that bare text cannot be held to."""

_FURTHER = frozenset({"not", "if", "allOf", "anyOf", "oneOf", "$ref"})
"""Keywords that may forbid a word."""

_WORDS = {True: "True", False: "False", None: "None"}

_DEEPEST = 4
"""How deep in lists values may be Python's words."""


class Values(ABC):
    """Rules of values, one for all arguments of the same kind."""

    def __init__(self) -> None:
        self.shared = SharedRules()
        self._known: dict[tuple[str, str, int], str] = {}

    def of(self, function: str, schema: Mapping[str, Any], key: str) -> str:
        """Return the name of the rule of an argument's value; ``key`` "" stands for arguments that ``schema`` does not name.

        Raises:
            ApiError: 400: the form cannot be held to what the schema says of it, or the grammar has become too long.
        """
        value = property_schema(schema, key)
        same = function, json.dumps(value), -1
        if same not in self._known:
            choices = alternatives(schema, value)
            if wrong := [choice for choice in choices if "enum" in choice and members_of(choice) is None]:
                raise refusal(function, f"the enum of {key!r:.60}, {wrong[0]['enum']!r:.60}, which is not a list")
            self._known[same] = self._rule(function, schema, key, choices)
        return self._known[same]

    @abstractmethod
    def _rule(self, function: str, schema: Mapping[str, Any], key: str, choices: list[Mapping[str, Any]]) -> str:
        """The name of the rule of a value that is one of ``choices``."""


class TaggedValues(Values):
    """Values that end with a tag: texts without quotes, anything else as JSON.

    Args:
        closing: the tag.
        around: what may stand on both sides of a value and is no part of it.

    Attributes:
        text: the rule of free text.
    """

    text = "value"

    def __init__(self, marks: Marks, closing: str, around: str = "") -> None:
        super().__init__()
        self._free, self._end, self._closing = marks.text_until(self.text, closing), marks(closing), closing
        self._around = around
        self._between = f"{quoted(around)}?" if around else ""

    def __str__(self) -> str:
        return f"{self._free}{self.shared}"

    def _rule(self, function: str, schema: Mapping[str, Any], key: str, choices: list[Mapping[str, Any]]) -> str:
        if not any(_takes_text(choice) or _text_members(choice) for choice in choices):
            return self._ended(json_rule(_whole(schema, property_schema(schema, key))))
        bodies = []
        for choice in choices:
            if not (_takes_text(choice) or _text_members(choice)):
                bodies.append(self.shared.name(json_rule(_whole(schema, choice))))
                continue
            if wrong := [word for word in _OF_TEXTS if word in choice]:
                raise refusal(function, f"{wrong[0]} of {key!r:.60}, a text without quotes in this model's calls")
            if _takes_text(choice):
                return self.text  # and so is whatever the others take
            bodies += [self._spelt(function, key, member) for member in _members(choice)]
        return self._ended(f"({' | '.join(bodies)})")

    def _spelt(self, function: str, key: str, member: Any) -> str:
        text = member if isinstance(member, str) else json.dumps(member)
        is_cut = self._around and (text.startswith(self._around) or text.endswith(self._around))
        if is_cut or self._closing in text:
            raise refusal(function, f"{text!r:.60} of {key!r:.60}, which this model's calls cannot spell")
        return quoted(text)

    def _ended(self, body: str) -> str:
        return self.shared.name(f"{self._between} {body} {self._between} {self._end}")


class PythonValues(Values):
    """Values as JSON or, where Python has other words, with those: True, False and None, also in lists."""

    def __str__(self) -> str:
        return str(self.shared)

    def _rule(self, function: str, schema: Mapping[str, Any], key: str, choices: list[Mapping[str, Any]]) -> str:
        spelt = self._spelt(function, schema, choices, 0)
        return self.shared.name(" | ".join([json_rule(_whole(schema, property_schema(schema, key))), *spelt]))

    def _spelt(
        self, function: str, schema: Mapping[str, Any], choices: list[Mapping[str, Any]], depth: int
    ) -> list[str]:
        """What Python spells otherwise than JSON."""
        found: dict[str, None] = {}
        for choice in choices:
            if not _FURTHER & set(choice):
                found |= dict.fromkeys([quoted(_WORDS[member]) for member in _words(choice)])
            if depth < _DEEPEST and "array" in types_of(choice) and set(choice) <= {"type", "items", *ANNOTATIONS}:
                found |= dict.fromkeys(self._lists(function, schema, choice.get("items", {}), depth))
        return list(found)

    def _lists(self, function: str, schema: Mapping[str, Any], items: Any, depth: int) -> list[str]:
        """Lists of items some of which Python spells otherwise."""
        same = function, json.dumps(items), depth
        if same not in self._known:
            spelt = self._spelt(function, schema, alternatives(schema, items), depth + 1)
            body = " | ".join([json_rule(_whole(schema, items)), *spelt])
            self._known[same] = self.shared.name(body) if spelt else ""
        item = self._known[same]
        return [f'"[" SPACE ({item} (COMMA {item})*)? SPACE "]"'] if item else []


def _words(choice: Mapping[str, Any]) -> list[bool | None]:
    """The values of JSON's words that an alternative allows."""
    if members_of(choice) is not None:
        return [member for member in _members(choice) if member is None or isinstance(member, bool)]
    types = types_of(choice)
    return [value for value, name in ((True, "boolean"), (False, "boolean"), (None, "null")) if name in types]


def _members(choice: Mapping[str, Any]) -> list[Any]:
    """What an alternative lists, of the types that it names."""
    members, types = members_of(choice) or [], types_of(choice)
    return [member for member in members if not types or types & _types_of_value(member)]


def _types_of_value(value: Any) -> set[str]:
    match value:
        case None:
            return {"null"}
        case bool():
            return {"boolean"}
        case str():
            return {"string"}
        case int():
            return {"integer", "number"}
        case float():
            return {"number", "integer"} if value.is_integer() else {"number"}
    return {"array" if isinstance(value, list) else "object"}


def _text_members(choice: Mapping[str, Any]) -> bool:
    return any(isinstance(member, str) for member in _members(choice))


def _takes_text(choice: Mapping[str, Any]) -> bool:
    """Whether an alternative takes texts that it does not list."""
    if members_of(choice) is not None:
        return False
    return "string" in types_of(choice) or not set(choice) - ANNOTATIONS


def _whole(schema: Mapping[str, Any], value: Any) -> dict[str, Any]:
    """``value``, a part of ``schema``, with the definitions to which its references lead."""
    if not isinstance(value, Mapping):
        return {} if value is not False else {"enum": []}
    found: dict[str, dict[str, Any]] = {}
    waiting: list[Any] = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting += one
        elif isinstance(one, Mapping):
            waiting += one.values()
            key, name = _defined(one.get("$ref"))
            definitions = schema.get(key)
            if isinstance(definitions, Mapping) and name in definitions and name not in found.get(key, {}):
                found.setdefault(key, {})[name] = definitions[name]
                waiting.append(definitions[name])
    return {**value, **found}


def _defined(target: Any) -> tuple[str, str]:
    """The keyword and name of the definition to which a reference leads."""
    names = pointer_names(target) if isinstance(target, str) and target.startswith("#/") else []
    return (names[0], names[1]) if len(names) > 1 and names[0] in DEFINITIONS else ("", "")
