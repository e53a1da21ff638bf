# SPDX-License-Identifier: Apache-2.0
"""What the forms share: text before calls, calls, what is held back until it is certain to be one or the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from phalanx.runtime.text.tool_calls.arguments import json_text
from phalanx.runtime.text.tool_calls.json_call import JsonCall, JsonValue

__all__ = ["CallPiece", "ToolCallReader"]


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A piece of an answer.

    Attributes:
        text: of the answer if ``call`` is None, else the next part of that call's arguments, which are JSON.
        call: number of the call, from 0.
        name: of the function; in a call's first piece only.
    """

    text: str
    call: int | None = None
    name: str | None = None


class ToolCallReader(ABC):
    """Splits one growing answer into text and calls. The result does not depend on where tokens begin and end.

    What looks like a call but has no name is text, unchanged. After a mark any name makes a call: who asked answers an unknown one with
    an error, as with other servers. Where nothing marks calls, the name of one of the functions does. Spaces around calls are dropped.

    Args:
        names: of the functions that may be called.
        parallel: report more than the first call.
        schemas: of the functions' parameters, by name; forms whose arguments are not JSON take types from them.
    """

    def __init__(
        self, names: Collection[str], *, parallel: bool = True, schemas: Mapping[str, Any] | None = None
    ) -> None:
        self._names = frozenset(names)
        self._schemas = schemas or {}
        self._schema: Any = None
        self._num_arguments = 0
        self._value = JsonValue()
        self._parallel = parallel
        self._buffer = ""
        self._raw = ""
        self._num_calls = 0
        self._call = JsonCall()
        self._pieces: list[CallPiece] = []
        self._step: Callable[[], bool] = self._first_step()

    def push(self, text: str) -> list[CallPiece]:
        """Return what became certain with ``text``."""
        self._buffer += text
        while self._step():
            continue
        pieces, self._pieces = self._pieces, []
        return pieces

    def finish(self) -> list[CallPiece]:
        """Return what was held back when the answer ends. A call without its end stays as it is."""
        text = "" if self._is_named else self._raw + self._buffer
        self._raw = self._buffer = ""
        self._add_text(text)
        pieces, self._pieces = self._pieces, []
        return pieces

    @property
    def num_calls(self) -> int:
        """Calls reported so far."""
        return self._num_calls if self._parallel else min(self._num_calls, 1)

    @abstractmethod
    def _first_step(self) -> Callable[[], bool]:
        """Where reading begins. A step uses up some of ``_buffer`` and returns whether another may follow before more text comes."""

    @abstractmethod
    def _after_call(self) -> bool:
        """The step after a call's JSON."""

    _is_named = False
    """Whether reading stands inside or directly after a call that was reported."""

    def _read_call(self) -> bool:
        """Read a call's JSON object."""
        used = self._call.push(self._buffer)
        self._raw += self._buffer[:used]
        self._buffer = self._buffer[used:]
        if not self._is_named and self._call.name is not None:
            if self._is_callable(self._call.name):
                self._begin_call(self._call.name)
            else:
                self._call.is_broken = True
        if self._is_named:
            self._add_arguments(self._call.take_arguments())
        if not (self._call.is_broken or self._call.is_done):
            return False
        broken, self._call = self._call.is_broken, JsonCall()
        if broken and not self._is_named:
            self._not_a_call()
        else:
            self._raw, self._step = "", self._after_call
        return True

    def _not_a_call(self) -> None:
        """What was read as a call is text."""
        raw, self._raw, self._step = self._raw, "", self._first_step()
        self._add_text(raw)

    def _is_callable(self, name: str) -> bool:
        """Whether ``name`` makes this a call: a marker did already."""
        return True

    def _begin_call(self, name: str) -> None:
        self._is_named = True
        self._num_calls += 1
        self._schema, self._num_arguments = self._schemas.get(name), 0
        if self._parallel or self._num_calls == 1:
            self._pieces.append(CallPiece("", self._num_calls - 1, name))

    def _begin_named_call(self, name: str, rest: str, then: Callable[[], bool]) -> None:
        """Begin a call and have ``then`` read its arguments, with which ``rest`` begins; no name, or one with spaces, makes it text."""
        if not name or any(character.isspace() for character in name):
            self._not_a_call()
            return
        self._begin_call(name)
        self._raw, self._buffer, self._value, self._step = "", rest, JsonValue(), then

    def _add_arguments(self, text: str) -> None:
        if text and (self._parallel or self._num_calls == 1):
            self._pieces.append(CallPiece(text, self._num_calls - 1))

    def _add_argument(self, key: str, value: Any) -> None:
        """Add one argument of a form that does not write them as JSON."""
        self._add_arguments(f"{', ' if self._num_arguments else '{'}{json_text(key)}: {json_text(value)}")
        self._num_arguments += 1

    def _end_arguments(self) -> None:
        """End the object that `_add_argument` began."""
        self._add_arguments("}" if self._num_arguments else "{}")

    def _read_arguments(self) -> bool:
        """Read the JSON object that is a call's arguments; ``_value`` finds its end."""
        used, ended = self._value.push(self._buffer)
        self._add_arguments(self._buffer[:used])
        self._buffer = self._buffer[used:]
        if ended:
            self._step = self._after_call
        return ended

    def _tag(self, *tags: str) -> str | None:
        """The tag with which the buffer begins, "" for none of them; None if that is not certain before more text comes."""
        found = next((tag for tag in tags if self._buffer.startswith(tag)), "")
        return None if not found and any(tag.startswith(self._buffer) for tag in tags) else found

    def _add_text(self, text: str) -> None:
        if text:
            self._pieces.append(CallPiece(text))

    def _skip_spaces(self) -> bool:
        """Drop spaces; return whether anything follows them."""
        self._buffer = self._buffer.lstrip()
        return bool(self._buffer)
