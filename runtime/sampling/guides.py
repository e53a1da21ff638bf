# SPDX-License-Identifier: Apache-2.0
"""Guides: what an answer must look like, as a JSON schema, a regular expression, a grammar or a choice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import msgspec

from phalanx.parallel.errors import RequestError
from phalanx.runtime.sampling.rules import shown

__all__ = ["MAX_GUIDE_CHARACTERS", "Guide", "GuideKind", "GuideRule"]

MAX_GUIDE_CHARACTERS = 1 << 16
"""Longest guide, as text."""

GuideKind = Literal["json", "regex", "grammar", "choice"]

_ANY_OBJECT = '{"type":"object"}'


@dataclass(frozen=True, slots=True)
class Guide:
    """A checked guide.

    Attributes:
        text: a JSON schema, a regular expression, a grammar of Lark or GBNF, or a JSON list of texts.
        name: the field that held it, for errors.
    """

    kind: GuideKind
    text: str
    name: str = field(default="structured_outputs", compare=False)


class GuideRule:
    """A `Guide`, or a mapping with one key: ``json`` (a schema), ``json_object`` (true), ``regex``, ``grammar`` or ``choice``.

    These are the keys of vLLM's ``structured_outputs``.
    """

    __slots__ = ()

    def schema(self) -> dict[str, Any]:
        text = {"type": "string", "minLength": 1, "maxLength": MAX_GUIDE_CHARACTERS}
        kinds = {
            "json": {"type": ["object", "string", "boolean"]},
            "json_object": {"const": True},
            "regex": text,
            "grammar": text,
            "choice": {"type": "array", "items": text, "minItems": 1},
        }
        return {"type": ["object", "null"], "properties": kinds, "additionalProperties": False}

    def check(self, name: str, value: Any) -> Guide:
        if isinstance(value, Guide):
            name = value.name
            value = {value.kind: json.loads(value.text) if value.kind == "choice" else value.text}
        if not isinstance(value, Mapping):
            raise RequestError(f"{name}={shown(value)} is not an object; {_WAY_OUT}", name)
        given = {key: item for key, item in value.items() if item is not None and item is not False}
        if len(given) != 1 or (key := next(iter(given))) not in _READERS:
            raise RequestError(f"{name} has {shown(sorted(map(str, given)))}; {_WAY_OUT}", name)
        guide = _READERS[key](name, given[key])
        if len(guide.text) > MAX_GUIDE_CHARACTERS:
            raise RequestError(
                f"{name} holds a guide of {len(guide.text)} characters; use at most {MAX_GUIDE_CHARACTERS}", name
            )
        return guide


_WAY_OUT = "give one of json, json_object, regex, grammar and choice"


def _schema(name: str, value: Any) -> Guide:
    """A schema as an object, or as JSON text."""
    try:
        schema = msgspec.json.decode(value) if isinstance(value, str) else value
        text = msgspec.json.encode(schema).decode()
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{name} holds a schema that is not JSON: {shown(str(error))}", name) from None
    if not isinstance(schema, (Mapping, bool)):
        raise RequestError(f"{name} holds the schema {shown(schema)}; use an object", name)
    return Guide("json", text, name)


def _any_object(name: str, value: Any) -> Guide:
    if value is not True:
        raise RequestError(f"{name}: json_object={shown(value)} is not true", name)
    return Guide("json", _ANY_OBJECT, name)


def _regex(name: str, value: Any) -> Guide:
    return Guide("regex", _text(name, value), name)


def _grammar(name: str, value: Any) -> Guide:
    return Guide("grammar", _text(name, value), name)


def _choice(name: str, value: Any) -> Guide:
    if not isinstance(value, (list, tuple)) or not value:
        raise RequestError(f"{name}: choice={shown(value)} is not a list of strings", name)
    return Guide("choice", msgspec.json.encode([_text(name, text) for text in value]).decode(), name)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value or any("\ud800" <= character <= "\udfff" for character in value):
        raise RequestError(f"{name} holds {shown(value)}, which is not a text of at least one character", name)
    return value


_READERS = MappingProxyType(
    {"json": _schema, "json_object": _any_object, "regex": _regex, "grammar": _grammar, "choice": _choice}
)
