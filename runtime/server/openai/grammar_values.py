# SPDX-License-Identifier: Apache-2.0
"""Rules of the values of arguments, between tags or in Python's notation, made from a function's schema."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from phalanx.runtime.server.openai.grammar_choices import (
    lists_text,
    takes_free_text,
    typed_members,
    with_definitions,
    words_of,
)
from phalanx.runtime.server.openai.grammar_parts import Marks, SharedRules, json_rule, quoted, refusal
from phalanx.runtime.text.tool_calls import ANNOTATIONS, alternatives, members_of, property_schema, types_of

__all__ = ["PythonValues", "TaggedValues", "Values"]

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
        if not any(takes_free_text(choice) or lists_text(choice) for choice in choices):
            return self._ended(json_rule(with_definitions(schema, property_schema(schema, key))))
        bodies = []
        for choice in choices:
            if not (takes_free_text(choice) or lists_text(choice)):
                bodies.append(self.shared.name(json_rule(with_definitions(schema, choice))))
                continue
            if wrong := [word for word in _OF_TEXTS if word in choice]:
                raise refusal(function, f"{wrong[0]} of {key!r:.60}, a text without quotes in this model's calls")
            if takes_free_text(choice):
                return self.text  # and so is whatever the others take
            bodies += [self._spelt(function, key, member) for member in typed_members(choice)]
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
        return self.shared.name(" | ".join([json_rule(with_definitions(schema, property_schema(schema, key))), *spelt]))

    def _spelt(
        self, function: str, schema: Mapping[str, Any], choices: list[Mapping[str, Any]], depth: int
    ) -> list[str]:
        """What Python spells otherwise than JSON."""
        found: dict[str, None] = {}
        for choice in choices:
            if not _FURTHER & set(choice):
                found |= dict.fromkeys([quoted(_WORDS[member]) for member in words_of(choice)])
            if depth < _DEEPEST and "array" in types_of(choice) and set(choice) <= {"type", "items", *ANNOTATIONS}:
                found |= dict.fromkeys(self._lists(function, schema, choice.get("items", {}), depth))
        return list(found)

    def _lists(self, function: str, schema: Mapping[str, Any], items: Any, depth: int) -> list[str]:
        """Lists of items some of which Python spells otherwise."""
        same = function, json.dumps(items), depth
        if same not in self._known:
            spelt = self._spelt(function, schema, alternatives(schema, items), depth + 1)
            body = " | ".join([json_rule(with_definitions(schema, items)), *spelt])
            self._known[same] = self.shared.name(body) if spelt else ""
        item = self._known[same]
        return [f'"[" SPACE ({item} (COMMA {item})*)? SPACE "]"'] if item else []
