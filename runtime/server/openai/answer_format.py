# SPDX-License-Identifier: Apache-2.0
"""What a protocol has to say about the form of its answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from phalanx.runtime.answer import Answer, TokenEvent
from phalanx.runtime.server.errors import ApiError
from phalanx.runtime.text import Tokenizer

__all__ = ["AnswerFormat", "Reply", "Served", "StreamChunks"]


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
        """Chunks of a stream for the tokens, one at least, that are there."""
        ...

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last chunk of a stream that was asked to include the usage."""
        ...

    def whole(self, choices: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer in one piece; ``choice.events`` holds all events."""
        ...


class StreamChunks(Protocol):
    """How a protocol writes a stream's events.

    Attributes:
        done: what follows the last event.
    """

    @property
    def done(self) -> bytes: ...

    def opening(self, choices: Sequence[Answer]) -> bytes:
        """What comes before the first token."""
        ...

    def tokens(self, choice: Answer, events: Sequence[TokenEvent]) -> bytes:
        """The tokens of one answer, one at least, that are there."""
        ...

    def text_writer(self, choice: Answer) -> Callable[[str], bytes] | None:
        """Return what writes the plain next tokens of ``choice``, its end apart, by their text alone; None if `tokens` has to be told of each.

        It may be asked for after the first tokens.
        """
        ...

    def usage(self) -> bytes:
        """What comes after the last token."""
        ...

    def error(self, error: ApiError) -> bytes:
        """Why the stream ends early."""
        ...


class Reply(Protocol):
    """Writes the answer to one request, in one piece or as a stream."""

    def whole(self, choices: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the answer in one piece; ``choice.events`` holds all events."""
        ...

    def stream(self, usage: Callable[[], dict[str, Any]]) -> StreamChunks:
        """Return the writer of the stream's events; ``usage`` counts the tokens so far (see `GenerationJob.usage`)."""
        ...
