# SPDX-License-Identifier: Apache-2.0
"""What a protocol has to say about the form of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from phalanx.runtime.answer import Answer, TokenEvent

__all__ = ["AnswerFormat"]


class AnswerFormat(Protocol):
    """How one of the protocols writes an answer down.

    Attributes:
        has_plain_chunks: whether a token without log-probabilities becomes a chunk that differs from others in its text only.
    """

    @property
    def has_plain_chunks(self) -> bool: ...

    def opening(self, choice: Answer) -> list[dict[str, Any]]:
        """Chunks of a stream before the first token of ``choice``."""
        ...

    def chunks(self, choice: Answer, events: Sequence[TokenEvent]) -> list[dict[str, Any]]:
        """Chunks of a stream for some tokens."""
        ...

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last chunk of a stream that was asked to include the usage."""
        ...

    def whole(self, choices: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer in one piece; ``choice.events`` holds all events."""
        ...
