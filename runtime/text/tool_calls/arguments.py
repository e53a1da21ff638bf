# SPDX-License-Identifier: Apache-2.0
"""Values of arguments that a model writes as bare text or in Python's notation, as JSON values."""

from __future__ import annotations

import ast
import warnings
from typing import Any

import msgspec

from phalanx.runtime.text.tool_calls.schemas import alternatives, members_of, property_schema, types_of

__all__ = ["PythonArgument", "json_text", "of_python", "of_text"]

_CLOSING = {"(": ")", "[": "]", "{": "}"}
_JSON_WORDS = {"true": True, "false": False, "null": None}


def json_text(value: Any) -> str:
    """Return a value as JSON text."""
    return msgspec.json.encode(value).decode()


def of_text(text: str, schema: Any, key: str) -> Any:
    """Return the value of argument ``key``, written without quotes, by its type in a function's ``schema``.

    The member of an ``enum`` whose spelling it is; text where the schema takes text; else JSON, or text if it is none.
    """
    choices = alternatives(schema, property_schema(schema, key))
    listed = [members for choice in choices if (members := members_of(choice)) is not None]
    word, value = text.strip(), _decoded(text)
    for members in listed:
        if text in members:
            return text
        if value is not text and _is_listed(value, members):
            return value
    free = [types_of(choice) for choice in choices if members_of(choice) is None]
    types = frozenset[str]().union(*free)
    if text == "null" and ("null" in types or (not types and (free or not listed))):
        return None
    if "string" in types or (not free and any(isinstance(member, str) for members in listed for member in members)):
        return text
    if "boolean" in types and word.lower() in ("true", "false"):
        return word.lower() == "true"
    return value


def _decoded(text: str) -> Any:
    """The value of JSON; ``text`` itself if it is none."""
    try:
        return msgspec.json.decode(text.strip())
    except (msgspec.DecodeError, RecursionError):
        return text


def _is_listed(value: Any, members: list[Any]) -> bool:
    """Whether JSON's ``value`` is among the members: 1 is where 1.0 is, but not where true is."""
    try:
        return any(isinstance(value, bool) == isinstance(one, bool) and value == one for one in members)
    except RecursionError:
        return False


def of_python(text: str) -> Any:
    """Return the value of a literal in JSON's notation, Python's or both mixed; the text itself if it is neither, or is infinite."""
    text = text.strip()
    for read in (msgspec.json.decode, _literal, _literal_of_lines):
        try:
            value = read(text)
            if value is None or json_text(value) != "null":
                return value
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, OverflowError):
            continue
    return text


class PythonArgument:
    """Finds the end of one argument of a call in Python's notation, by its brackets and quotes.

    Attributes:
        text: of the argument so far.
    """

    def __init__(self) -> None:
        self.text = ""
        self._open: list[str] = []
        self._quotes = PythonQuotes()

    def push(self, text: str) -> tuple[int, bool]:
        """Return how many characters of ``text`` belong to the argument, and whether the next one, ``,`` or ``)``, ends it."""
        for index, character in enumerate(text):
            if self._quotes.take(character):
                continue
            if not self._open and character in ",)":
                self.text += text[:index]
                return index, True
            if character in _CLOSING:
                self._open.append(_CLOSING[character])
            elif self._open and character == self._open[-1]:
                self._open.pop()
        self.text += text
        return len(text), False


class PythonQuotes:
    """Tells what belongs to a string, in one quote or three, character by character."""

    def __init__(self) -> None:
        self._quote = self._just_closed = ""
        self._is_long = self._is_empty = self._is_escaped = False
        self._num_closing = 0

    def take(self, character: str) -> bool:
        """Whether this character is a quote or inside a string."""
        if self._is_escaped:
            self._is_escaped = False
        elif self._quote:
            self._read_on(character)
        elif character == self._just_closed:  # the third in a row
            self._open(character, is_long=True)
        elif character in "'\"":
            self._open(character, is_long=False)
        else:
            self._just_closed = ""
            return False
        return True

    def _open(self, quote: str, is_long: bool) -> None:
        self._quote, self._is_long, self._is_empty, self._just_closed = quote, is_long, True, ""

    def _read_on(self, character: str) -> None:
        if character != self._quote:
            self._is_escaped, self._is_empty, self._num_closing = character == "\\", False, 0
            return
        self._num_closing += 1
        if not self._is_long or self._num_closing == 3:
            self._just_closed = character if self._is_empty and not self._is_long else ""
            self._quote, self._num_closing = "", 0


def _literal_of_lines(text: str) -> Any:
    """As `_literal`, of a string with line ends in one quote, which Python does not allow."""
    return _literal(text.replace("\n", "\\n"))


def _literal(text: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes like "\d"
        return _value(ast.parse(text, mode="eval").body)


def _value(node: ast.expr) -> Any:
    """The value of an expression of Python's literals, JSON's words and Python's names of containers.

    Raises:
        ValueError: it is another expression.
    """
    match node:
        case ast.Constant(str() | int() | float() | None as value):
            return value
        case ast.Name(name) if name in _JSON_WORDS:
            return _JSON_WORDS[name]
        case ast.UnaryOp(ast.USub() | ast.UAdd() as sign, ast.Constant(int() | float() as number)):
            return -number if isinstance(sign, ast.USub) else number
        case ast.List(items) | ast.Tuple(items) | ast.Set(items):
            return [_value(item) for item in items]
        case ast.Dict(keys, values) if None not in keys:
            return {_value(key): _value(value) for key, value in zip(keys, values, strict=True) if key is not None}
        case ast.Call(ast.Name("dict"), [], keywords) if all(keyword.arg for keyword in keywords):
            return {keyword.arg: _value(keyword.value) for keyword in keywords}
        case ast.Call(ast.Name("list" | "tuple" | "set"), [ast.List() | ast.Tuple() | ast.Set() as items], []):
            return _value(items)
        case ast.Call(ast.Name("list" | "tuple" | "set"), [], []):
            return []
    raise ValueError
