# SPDX-License-Identifier: Apache-2.0
"""Values of arguments that a model writes as bare text or in Python's notation, as JSON values."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping
from typing import Any

import msgspec

__all__ = ["PythonArgument", "json_text", "of_python", "of_text", "property_names"]

_CLOSING = {"(": ")", "[": "]", "{": "}"}


def json_text(value: Any) -> str:
    """Return a value as JSON text."""
    return msgspec.json.encode(value).decode()


def of_text(text: str, schema: Any, key: str) -> Any:
    """Return the value of argument ``key``, written without quotes, by its type in a function's ``schema``.

    Text where the schema takes text; else JSON, or text if it is none.
    """
    types = _types(_properties(schema).get(key))
    if text == "null" and ("null" in types or not types):
        return None
    if "string" in types:
        return text
    word = text.strip()
    if "boolean" in types and word.lower() in ("true", "false"):
        return word.lower() == "true"
    try:
        return msgspec.json.decode(word)
    except (msgspec.DecodeError, RecursionError):
        return text


def of_python(text: str) -> Any:
    """Return the value of a Python literal, or of JSON; the text itself if it is neither, or is infinite."""
    text = text.strip()
    for read in (_literal, msgspec.json.decode):
        try:
            value = read(text)
            if value is None or json_text(value) != "null":
                return value
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, OverflowError):
            continue
    return text


def property_names(schema: Any) -> list[str]:
    """Return the arguments that a function's schema names, in its order."""
    return list(_properties(schema))


class PythonArgument:
    """Finds the end of one argument of a call in Python's notation, by its brackets and quotes.

    Attributes:
        text: of the argument so far.
    """

    def __init__(self) -> None:
        self.text = ""
        self._open: list[str] = []
        self._quote = ""
        self._is_escaped = False

    def push(self, text: str) -> tuple[int, bool]:
        """Return how many characters of ``text`` belong to the argument, and whether the next one, ``,`` or ``)``, ends it."""
        for index, character in enumerate(text):
            if not (self._quote or self._open) and character in ",)":
                self.text += text[:index]
                return index, True
            self._step(character)
        self.text += text
        return len(text), False

    def _step(self, character: str) -> None:
        if self._quote:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == self._quote:
                self._quote = ""
        elif character in "'\"":
            self._quote = character
        elif character in _CLOSING:
            self._open.append(_CLOSING[character])
        elif self._open and character == self._open[-1]:
            self._open.pop()


def _literal(text: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes like "\d"
        return ast.literal_eval(text)


def _properties(schema: Any) -> Mapping[str, Any]:
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return properties if isinstance(properties, Mapping) else {}


def _types(schema: Any) -> frozenset[str]:
    """The types that a property's schema names, alternatives included; none = anything."""
    if not isinstance(schema, Mapping):
        return frozenset()
    named = schema.get("type")
    found = {named} if isinstance(named, str) else set()
    found |= {one for one in named if isinstance(one, str)} if isinstance(named, list) else set()
    for key in ("anyOf", "oneOf"):
        alternatives = schema.get(key, ())
        for alternative in alternatives if isinstance(alternatives, list) else ():
            found |= _types(alternative)
    return frozenset(found)
