# SPDX-License-Identifier: Apache-2.0
"""What one alternative of an argument's schema allows: listed values, free text, words; and a schema that stands alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phalanx.runtime.text.tool_calls import ANNOTATIONS, members_of, pointer_names, types_of

__all__ = ["DEFINITIONS", "lists_text", "takes_free_text", "typed_members", "with_definitions", "words_of"]

DEFINITIONS = ("$defs", "definitions")


def typed_members(choice: Mapping[str, Any]) -> list[Any]:
    """Return the values that an alternative lists, of the types that it names."""
    members, types = members_of(choice) or [], types_of(choice)
    return [member for member in members if not types or types & _types_of_value(member)]


def lists_text(choice: Mapping[str, Any]) -> bool:
    """Return whether an alternative lists a text."""
    return any(isinstance(member, str) for member in typed_members(choice))


def takes_free_text(choice: Mapping[str, Any]) -> bool:
    """Return whether an alternative takes texts that it does not list."""
    if members_of(choice) is not None:
        return False
    return "string" in types_of(choice) or not set(choice) - ANNOTATIONS


def words_of(choice: Mapping[str, Any]) -> list[bool | None]:
    """Return which of JSON's true, false and null an alternative allows."""
    if members_of(choice) is not None:
        return [member for member in typed_members(choice) if member is None or isinstance(member, bool)]
    types = types_of(choice)
    return [value for value, name in ((True, "boolean"), (False, "boolean"), (None, "null")) if name in types]


def with_definitions(schema: Mapping[str, Any], value: Any) -> dict[str, Any]:
    """Return ``value``, a part of ``schema``, with the definitions to which its references lead."""
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


def _defined(target: Any) -> tuple[str, str]:
    """The keyword and name of the definition to which a reference leads."""
    names = pointer_names(target) if isinstance(target, str) and target.startswith("#/") else []
    return (names[0], names[1]) if len(names) > 1 and names[0] in DEFINITIONS else ("", "")
