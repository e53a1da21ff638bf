# SPDX-License-Identifier: Apache-2.0
"""What TensorRT logs, kept so that an error can give its cause."""

from __future__ import annotations

from collections import deque
from typing import Any

__all__ = ["BuildLog"]

_KEPT = 4
_LONGEST = 400


class BuildLog:
    """Call it with severity and message; it keeps the last errors."""

    def __init__(self) -> None:
        self._errors: deque[str] = deque(maxlen=_KEPT)
        self._alive: list[Any] = []

    def __call__(self, severity: str, message: str) -> None:
        """Take one message."""
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self._errors.append(" ".join(message.split())[:_LONGEST])

    def cause(self) -> str:
        """The last errors, the newest first; empty without any."""
        return "; before that: ".join(reversed(self._errors))

    def keep_alive(self, library_object: Any) -> None:
        """Tie an object that the library refers to without owning it to this log."""
        self._alive.append(library_object)
