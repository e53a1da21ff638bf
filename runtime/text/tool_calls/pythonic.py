# SPDX-License-Identifier: Apache-2.0
"""Calls in Python's notation."""

from __future__ import annotations

import re

from phalanx.runtime.text.tool_calls.arguments import PythonArgument, of_python
from phalanx.runtime.text.tool_calls.places import ListReader
from phalanx.runtime.text.tool_calls.schemas import property_names

__all__ = ["PythonicReader"]

_NAME = re.compile(r"[^\W\d][\w.-]*")


class PythonicReader(ListReader):
    """``[f(city="Oslo", days=3), g()]`` as the whole answer: Llama 4, and Llama 3.2 with such a prompt.

    Llama 4 may put ``<|python_start|>`` and ``<|python_end|>`` around it; a list without them must begin with one of the functions.
    Arguments without a name take the names of the schema, in its order.
    """

    _lead = "<|python_start|>"
    _argument = PythonArgument()

    def _item(self) -> bool:
        """A function's name; its bracket ends it."""
        name, bracket, rest = self._buffer.partition("(")
        begun = name.strip()
        if not (self._is_name(begun) if bracket else self._may_become_name(begun)):
            self._not_a_call()
            return True
        if not bracket:
            return False
        self._begin_call(begun)
        self._raw, self._buffer, self._argument, self._step = "", rest, PythonArgument(), self._arguments
        return True

    def _is_name(self, text: str) -> bool:
        return text in self._names or (self._is_marked and _NAME.fullmatch(text) is not None)

    def _may_become_name(self, text: str) -> bool:
        return not text or self._is_name(text) or any(known.startswith(text) for known in self._names)

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

    def _end(self) -> bool:
        if not self._skip_spaces():
            return False
        tag = self._tag("<|python_end|>")
        if tag is None:
            return False
        self._buffer = self._buffer.removeprefix(tag).lstrip()
        self._step = self._plain
        return bool(self._buffer)
