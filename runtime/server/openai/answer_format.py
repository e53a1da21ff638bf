# SPDX-License-Identifier: Apache-2.0
"""What a protocol has to say about the form of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from phalanx.runtime.answer import Answer, TokenEvent
from phalanx.runtime.text import Tokenizer

__all__ = ["AnswerFormat", "Served"]


@dataclass(frozen=True, slots=True)
class Served:
    """What the form of an answer depends on besides the request.

    Attributes:
        model_name: the name that answers carry.
        tool_call_form: how the model writes tool calls, a key of `TOOL_CALL_FORMS`; None if it is not known.
    """

    model_name: str
    tokenizer: Tokenizer | None
    tool_call_form: str | None = None


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
