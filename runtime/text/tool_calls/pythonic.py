# SPDX-License-Identifier: Apache-2.0
"""Calls in Python's notation."""

from __future__ import annotations

from collections.abc import Callable

from phalanx.runtime.text.tool_calls.arguments import PythonArgument, of_python, property_names
from phalanx.runtime.text.tool_calls.reader import ToolCallReader

__all__ = ["PythonicReader"]


class PythonicReader(ToolCallReader):
    """``[f(city="Oslo", days=3), g()]`` as the whole answer: Llama 4, and Llama 3.2 with such a prompt.

    Llama 4 may put ``<|python_start|>`` and ``<|python_end|>`` around it. Only a list that begins with one of the functions is calls.
    Arguments without a name take the names of the schema, in its order.
    """

    _argument = PythonArgument()

    def _first_step(self) -> Callable[[], bool]:
        return self._start

    def _start(self) -> bool:
        tag = "<|python_start|>"
        begun = self._buffer.lstrip()
        if not begun or (tag.startswith(begun) and begun != tag):
            return False
        rest = begun.removeprefix(tag).lstrip()
        if rest.startswith("["):
            self._raw, self._buffer = self._buffer[: -len(rest)] + "[", rest[1:]
            self._step = self._head
            return True
        if not rest:
            return False
        self._step = self._plain
        return True

    def _plain(self) -> bool:
        self._is_named = False
        self._add_text(self._buffer)
        self._buffer = ""
        return False

    def _not_a_call(self) -> None:
        super()._not_a_call()
        self._step = self._plain

    def _head(self) -> bool:
        """A function's name; its bracket ends it."""
        name, bracket, rest = self._buffer.partition("(")
        begun = name.strip()
        if not any(known.startswith(begun) for known in self._names) or (bracket and begun not in self._names):
            self._not_a_call()
            return True
        if not bracket:
            return False
        self._begin_call(begun)
        self._raw, self._buffer, self._argument, self._step = "", rest, PythonArgument(), self._arguments
        return True

    def _arguments(self) -> bool:
        used, ended = self._argument.push(self._buffer)
        self._buffer = self._buffer[used:]
        if not ended:
            return False
        mark, self._buffer = self._buffer[0], self._buffer[1:]
        self._take_argument(self._argument.text.strip())
        self._argument = PythonArgument()
        if mark == ")":
            self._end_arguments()
            self._step = self._after_call
        return True

    def _take_argument(self, text: str) -> None:
        if not text:
            return
        key, equals, value = text.partition("=")
        if equals and key.strip().isidentifier():
            self._add_argument(key.strip(), of_python(value))
            return
        names = property_names(self._schema)
        position = self._num_arguments
        self._add_argument(names[position] if position < len(names) else str(position), of_python(text))

    def _after_call(self) -> bool:
        if not self._skip_spaces():
            return False
        mark, self._buffer = self._buffer[0], self._buffer[1:]
        if mark == ",":
            self._is_named, self._raw, self._step = False, mark, self._head
        elif mark == "]":
            self._step = self._end
        else:
            self._buffer, self._step = mark + self._buffer, self._plain
        return True

    def _end(self) -> bool:
        if not self._skip_spaces():
            return False
        tag = self._tag("<|python_end|>")
        if tag is None:
            return False
        self._buffer = self._buffer.removeprefix(tag).lstrip()
        self._step = self._plain
        return bool(self._buffer)
