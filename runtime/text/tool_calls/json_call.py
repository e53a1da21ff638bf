# SPDX-License-Identifier: Apache-2.0
"""Reads one call, ``{"name": "f", "arguments": {...}}``, from text that arrives in pieces."""

from __future__ import annotations

import json
from collections.abc import Callable

__all__ = ["JsonCall", "JsonValue"]

_SPACE = " \t\r\n"
_ARGUMENTS = frozenset({"arguments", "parameters"})


class JsonValue:
    """Finds the end of one JSON value by its brackets and quotes; what it holds is not checked."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = self._begun = self._scalar = False

    def push(self, text: str) -> tuple[int, bool]:
        """Return how many characters of ``text`` belong to the value, and whether it ends there."""
        for index, character in enumerate(text):
            if self._in_string:
                if self._end_string(character):
                    return index + 1, True
            elif character == '"':
                self._in_string = self._begun = True
            elif self._scalar and character in _SPACE + ",]}":
                return index, True
            elif character in "[{":
                self._depth, self._begun = self._depth + 1, True
            elif character in "]}":
                self._depth -= 1
                if self._depth <= 0:
                    return index + 1, True
            elif not self._begun and character not in _SPACE:
                self._begun = self._scalar = True
        return len(text), False

    def _end_string(self, character: str) -> bool:
        """Step through a string; True if it ends here and was the whole value."""
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
            return self._depth == 0
        return False


class JsonCall:
    """An object with a name and arguments (Llama: ``parameters``), in either order.

    Attributes:
        name: known once it was read.
        is_done: the object's closing bracket was read.
        is_broken: this is no such object; nothing more is read.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_done = self.is_broken = False
        self._arguments: list[str] = []
        self._key = ""
        self._text = ""
        self._value = JsonValue()
        self._step: Callable[[str], int] = self._begin
        self._has_arguments = False

    def push(self, text: str) -> int:
        """Read on; return how many characters were used: all, unless the object ended or is broken."""
        used = 0
        while used < len(text) and not (self.is_done or self.is_broken):
            used += self._step(text[used:])
        return used

    def take_arguments(self) -> str:
        """The arguments' JSON text since the last call; nothing before the name is known."""
        if self.name is None:
            return ""
        taken, self._arguments = "".join(self._arguments), []
        return taken

    def _begin(self, text: str) -> int:
        return self._expect(text, {"{": self._before_key})

    def _before_key(self, text: str) -> int:
        return self._expect(text, {'"': self._in_key, ",": self._before_key, "}": self._end})

    def _in_key(self, text: str) -> int:
        used = self._read_string(text)
        if self._text.endswith('"'):
            self._key, self._text, self._step = self._text[:-1], "", self._before_value
        return used

    def _before_value(self, text: str) -> int:
        return self._expect(text, {":": self._before_value_text})

    def _before_value_text(self, text: str) -> int:
        """The first character of the value decides: arguments in quotes are JSON inside JSON."""
        stripped = text.lstrip(_SPACE)
        if stripped:
            self._value = JsonValue()
            streams = self._key in _ARGUMENTS and stripped[0] == "{"
            self._step = self._in_arguments if streams else self._in_value
        return len(text) - len(stripped)

    def _in_arguments(self, text: str) -> int:
        used, ended = self._value.push(text)
        self._arguments.append(text[:used])
        self._has_arguments = True
        if ended:
            self._step = self._before_key
        return used

    def _in_value(self, text: str) -> int:
        used, ended = self._value.push(text)
        self._text += text[:used]
        if ended:
            self._take_value(self._text)
            self._text, self._step = "", self._before_key
        return used

    def _take_value(self, text: str) -> None:
        if self._key != "name" and self._key not in _ARGUMENTS:
            return
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if self._key == "name" and isinstance(value, str) and value:
            self.name = value
        elif self._key in _ARGUMENTS and (value is None or _is_object(value)):
            self._arguments.append(value or "{}")
            self._has_arguments = True
        else:
            self.is_broken = True

    def _end(self, text: str) -> int:
        raise AssertionError("nothing is read after the end")

    def _expect(self, text: str, steps: dict[str, Callable[[str], int]]) -> int:
        """Skip spaces; go on with the step of the next character, or stop."""
        stripped = text.lstrip(_SPACE)
        used = len(text) - len(stripped)
        if not stripped:
            return used
        step = steps.get(stripped[0])
        if step is None or (step == self._end and self.name is None):
            self.is_broken = True
            return used
        if step == self._end:
            self.is_done = True
            if not self._has_arguments:
                self._arguments.append("{}")
        self._step = step
        return used + 1

    def _read_string(self, text: str) -> int:
        """Add to ``_text`` up to the closing quote. Keys of calls have no escapes."""
        end = text.find('"')
        used = len(text) if end < 0 else end + 1
        self._text += text[:used]
        return used


def _is_object(text: object) -> bool:
    """Whether a string holds the JSON text of an object."""
    try:
        return isinstance(text, str) and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
