# SPDX-License-Identifier: Apache-2.0
"""Finds stop texts in a stream, however they are cut into pieces, and holds back what may become one."""

from __future__ import annotations

import copy

__all__ = ["StopMatcher"]


class StopMatcher:
    """Watches one stream for several texts (Knuth, Morris and Pratt's automaton for each).

    The text that completes first wins; of those that complete together, the longest. So the result does not
    depend on where tokens begin and end.
    """

    def __init__(self, stop: tuple[str, ...], *, include_stop: bool = False) -> None:
        self._stop = stop
        self._include_stop = include_stop
        self._failures = [_failure_table(text) for text in stop]
        self._matched = [0] * len(stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that is certain to be outside every stop text, and the stop text that was found, if one was.

        Nothing may be pushed after a stop.
        """
        if not self._stop:
            return text, None
        for position, character in enumerate(text):
            found = self._step(character)
            if found is not None:
                seen = self._held + text[: position + 1]
                return (seen if self._include_stop else seen[: len(seen) - len(found)]), found
        seen = self._held + text
        certain = len(seen) - max(self._matched)
        self._held = seen[certain:]
        return seen[:certain], None

    def flush(self) -> str:
        """What was held back and did not become a stop text; the next text starts afresh."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stop)
        return held

    def fork(self) -> StopMatcher:
        """Return another that goes on from here."""
        other = copy.copy(self)
        other._matched = list(self._matched)
        return other

    def _step(self, character: str) -> str | None:
        found: str | None = None
        for index, (stop, failure) in enumerate(zip(self._stop, self._failures, strict=True)):
            matched = self._matched[index]
            while matched and stop[matched] != character:
                matched = failure[matched - 1]
            matched += stop[matched] == character
            if matched == len(stop):
                found = stop if found is None or len(stop) > len(found) else found
                matched = failure[matched - 1]
            self._matched[index] = matched
        return found


def _failure_table(text: str) -> list[int]:
    """For each prefix of ``text``, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(text)
    matched = 0
    for index in range(1, len(text)):
        while matched and text[index] != text[matched]:
            matched = table[matched - 1]
        matched += text[index] == text[matched]
        table[index] = matched
    return table
