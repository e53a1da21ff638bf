# SPDX-License-Identifier: Apache-2.0
"""Searches of long texts in parts, so that other threads of the interpreter have their turns."""

from __future__ import annotations

import re

from phalanx.parallel.errors import RequestError

__all__ = ["WINDOW", "check_whole", "search"]

WINDOW = 1 << 14
"""Characters that are looked at without a pause."""
_MOST_CHARACTERS = 1 << 22
"""At about 5 us and 100 bytes for each."""


def search(pattern: re.Pattern[str], text: str, position: int, longest: int) -> re.Match[str] | None:
    """Return the first match from ``position`` on, as ``pattern.search`` does; matches have at most ``longest`` characters."""
    while position < len(text):
        end = position + WINDOW
        match = pattern.search(text, position, end + longest - 1)
        if match and match.start() < end:
            return match
        position = end
    return None


def check_whole(text: str) -> None:
    """Raise `RequestError` where a text is too long to be encoded without a place to divide it."""
    if len(text) > _MOST_CHARACTERS:
        raise RequestError(
            f"prompt has {len(text)} characters between which the tokenizer's model leaves no place to divide it; at most "
            f"{_MOST_CHARACTERS} can be encoded; shorten it, or use token ids", "prompt",
        )  # fmt: skip
