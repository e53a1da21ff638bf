# SPDX-License-Identifier: Apache-2.0
"""Where calls stand in an answer: after a marker, wherever it comes, or as the whole answer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

from phalanx.runtime.text.tool_calls.reader import ToolCallReader

__all__ = ["ListReader", "MarkedReader", "TaggedCallReader", "WholeReader"]


class MarkedReader(ToolCallReader):
    """Calls after `_marker`; what follows them is text again, or the next marker."""

    _marker: ClassVar[str]

    def _first_step(self) -> Callable[[], bool]:
        return self._text

    def _text(self) -> bool:
        """Pass on text up to the marker, which goes to ``_raw``."""
        self._is_named = False
        before, found, after = self._buffer.partition(self._marker)
        if found:
            self._add_text(before.rstrip())
            self._raw, self._buffer, self._step = self._marker, after, self._marked
            return True
        certain = len(self._buffer) - _held_back(self._buffer, self._marker)
        certain = len(self._buffer[:certain].rstrip())
        self._add_text(self._buffer[:certain])
        self._buffer = self._buffer[certain:]
        return False

    def _marked(self) -> bool:
        """Read what stands after the marker."""
        return self._read_call()

    def _between(self) -> bool:
        """Drop spaces after a call."""
        if not self._skip_spaces():
            return False
        self._step = self._text
        return True


class TaggedCallReader(MarkedReader):
    """Calls between ``<tool_call>`` and ``</tool_call>``, which a model may forget before the next call."""

    _marker = "<tool_call>"

    def _after_call(self) -> bool:
        """Drop the end tag and the spaces around it."""
        if not self._skip_spaces():
            return False
        tag = self._tag("</tool_call>")
        if tag is None:
            return False
        self._buffer = self._buffer.removeprefix(tag)
        self._step = self._between
        return True


class WholeReader(ToolCallReader):
    """Calls as the whole answer, which begins with `_opening`, or with `_lead` before it; other answers are text."""

    _lead: ClassVar[str] = ""
    _opening: ClassVar[str]
    _has_lead = False

    @property
    def _is_marked(self) -> bool:
        """Whether the answer has shown that it is calls: by the lead, or a call of one of the functions."""
        return self._has_lead or self._num_calls > 0

    def _first_step(self) -> Callable[[], bool]:
        return self._start

    def _start(self) -> bool:
        begun = self._buffer.lstrip()
        if not begun or (self._lead.startswith(begun) and begun != self._lead):
            return False
        rest = begun.removeprefix(self._lead).lstrip()
        if not rest:
            return False
        if rest.startswith(self._opening):
            self._has_lead = bool(self._lead) and begun.startswith(self._lead)
            self._raw, self._buffer = self._buffer[: len(self._buffer) - len(rest)], rest
            self._step = self._opened
        else:
            self._step = self._plain
        return True

    @abstractmethod
    def _opened(self) -> bool:
        """Read calls, beginning with the opening."""

    def _plain(self) -> bool:
        """Pass on everything as text."""
        self._is_named = False
        self._add_text(self._buffer)
        self._buffer = ""
        return False

    def _not_a_call(self) -> None:
        super()._not_a_call()
        self._step = self._plain


class ListReader(WholeReader):
    """Calls in brackets, with commas between them."""

    _opening = "["

    def _opened(self) -> bool:
        self._raw, self._buffer, self._step = self._raw + "[", self._buffer[1:], self._item
        return True

    def _item(self) -> bool:
        """Read one call."""
        return self._read_call()

    def _after_call(self) -> bool:
        if not self._skip_spaces():
            return False
        mark, self._buffer = self._buffer[0], self._buffer[1:]
        if mark == ",":
            self._is_named, self._raw, self._step = False, mark, self._item
        elif mark == "]":
            self._step = self._end
        else:
            self._buffer, self._step = mark + self._buffer, self._plain
        return True

    def _end(self) -> bool:
        """Drop spaces; nothing else should follow."""
        if not self._skip_spaces():
            return False
        self._step = self._plain
        return True


def _held_back(text: str, marker: str) -> int:
    """Length of the longest end of ``text`` that may be the beginning of ``marker``."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if marker.startswith(text[-n:])), 0)
