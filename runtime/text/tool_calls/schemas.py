# SPDX-License-Identifier: Apache-2.0
"""What the JSON schema of a function says of one of its arguments: references followed, alternatives apart.

A schema comes with a request, so nothing here recurses, and each walk has a bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

__all__ = [
    "ANNOTATIONS",
    "alternatives",
    "members_of",
    "pointer_names",
    "property_names",
    "property_schema",
    "types_of",
]

ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "$comment", "readOnly", "writeOnly"}
)
"""Keywords that allow and forbid nothing."""

_MOST_STEPS = 1_000
"""References and alternatives that one walk follows."""


def property_names(schema: Any) -> list[str]:
    """Return the arguments that a function's schema names, in its order."""
    return list(_properties(schema))


def property_schema(schema: Any, key: str) -> Any:
    """Return the schema of argument ``key``; an empty one if there is none. Unnamed arguments have that of ``additionalProperties``."""
    named = _properties(schema)
    if key in named:
        return named[key]
    rest = schema.get("additionalProperties") if isinstance(schema, Mapping) else None
    return rest if isinstance(rest, Mapping) else {}


def alternatives(schema: Any, value: Any) -> list[Mapping[str, Any]]:
    """Return schemas of which one matches whatever ``value``, a part of ``schema``, matches.

    References, ``anyOf``, ``oneOf`` and an ``allOf`` of one schema are followed. Left as they are: a reference that leads nowhere, and
    what is beyond the bound. Empty if ``value`` is nothing but references to itself, or False.
    """
    found: list[Mapping[str, Any]] = []
    waiting, followed = [value], set[str]()
    for _ in range(_MOST_STEPS):
        if not waiting:
            break
        one = waiting.pop()
        if not isinstance(one, Mapping):
            found += [{}] if one is not False else []
            continue
        target = one.get("$ref")
        if isinstance(target, str) and len(one) == 1:
            if target in followed:
                continue
            followed.add(target)
        more = _next(schema, one)
        if more is None or len(waiting) + len(more) > _MOST_STEPS:
            found.append(one)
        else:
            waiting += reversed(more)
    return found + [one for one in waiting if isinstance(one, Mapping)]


def members_of(alternative: Mapping[str, Any]) -> list[Any] | None:
    """Return the values that an alternative lists; None if it lists none."""
    if "const" in alternative:
        return [alternative["const"]]
    listed = alternative.get("enum")
    return listed if isinstance(listed, list) else None


def types_of(alternative: Mapping[str, Any]) -> frozenset[str]:
    """Return the types that an alternative names; none = anything."""
    named = alternative.get("type")
    return frozenset(one for one in (named if isinstance(named, list) else [named]) if isinstance(one, str))


def pointer_names(target: str) -> list[str]:
    """Return the names on the way to which a reference points, from the top of its schema. Source: RFC 6901, section 6."""
    return [part.replace("~1", "/").replace("~0", "~") for part in unquote(target.removeprefix("#")).split("/")[1:]]


def _next(schema: Any, one: Mapping[str, Any]) -> list[Any] | None:
    """What stands for ``one``, or is one of its alternatives; None if it is none but itself."""
    key, choices = _choices(schema, one)
    rest = {name: value for name, value in one.items() if name != key and name not in ANNOTATIONS}
    if not choices or len(choices) * (1 + len(rest)) > _MOST_STEPS:
        return None
    both = [_both(rest, choice) for choice in choices]
    return None if None in both else both


def _choices(schema: Any, one: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """The keyword of ``one`` that leads on, and where to."""
    if isinstance(target := one.get("$ref"), str):
        return "$ref", _definition(schema, target)
    lists = {key: value for key in ("anyOf", "oneOf") if isinstance(value := one.get(key), list)}
    if len(lists) == 1:
        return next(iter(lists.items()))
    every = one.get("allOf")
    return "allOf", every if isinstance(every, list) and len(every) == 1 and not lists else []


def _definition(schema: Any, target: str) -> list[Any]:
    """What a reference inside ``schema`` leads to, if anything."""
    if not target.startswith("#"):
        return []
    found: Any = schema
    for name in pointer_names(target):
        if not isinstance(found, Mapping) or name not in found:
            return []
        found = found[name]
    return [found]


def _both(rest: Mapping[str, Any], other: Any) -> Any:
    """A schema of what matches both; None if they cannot simply be joined."""
    if not rest or other is False:
        return other
    if not isinstance(other, Mapping):
        return rest
    shared = {name for name in rest if name in other}
    is_same_type = shared == {"type"} and isinstance(rest["type"], str) and rest["type"] == other["type"]
    return {**other, **rest} if (not shared or is_same_type) and "additionalProperties" not in {*rest, *other} else None


def _properties(schema: Any) -> Mapping[str, Any]:
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return properties if isinstance(properties, Mapping) else {}
