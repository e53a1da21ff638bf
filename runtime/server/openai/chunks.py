# SPDX-License-Identifier: Apache-2.0
"""Chunks of a stream as bytes. Of a plain token only the text is encoded: the rest was prepared with the first one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from phalanx.runtime.answer import Answer, TokenEvent
from phalanx.runtime.server.errors import ApiError
from phalanx.runtime.server.openai.answer_format import AnswerFormat
from phalanx.runtime.server.openai.protocol import StreamOptions

__all__ = ["ChunkReply", "ChunkWriter"]

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class PlainChunk:
    """Chunks that differ in their text only.

    Attributes:
        before: what comes before the text.
        after: what comes after it.
    """

    before: bytes
    after: bytes

    def write(self, text: str) -> bytes:
        """The chunk with ``text``."""
        return self.before + _encode(text) + self.after


class ChunkWriter:
    """Writes the chunks of one stream.

    Args:
        usage: tokens so far.
    """

    done: bytes = b"data: [DONE]\n\n"

    def __init__(self, format: AnswerFormat, options: StreamOptions, usage: Callable[[], dict[str, Any]]) -> None:
        self._format, self._options, self._usage = format, options, usage
        self._is_plain = format.has_plain_chunks and not options.continuous_usage_stats
        self._prepared: dict[int, PlainChunk] = {}

    def opening(self, choices: Sequence[Answer]) -> bytes:
        """What comes before the first token."""
        return self._encoded([chunk for choice in choices for chunk in self._format.opening(choice)])

    def tokens(self, choice: Answer, events: Sequence[TokenEvent]) -> bytes:
        """One chunk with all of ``events``, and what else the format writes at the start and end of an answer."""
        prepared = self._prepared.get(choice.index)
        if prepared is None:
            data = self._encoded(self._format.chunks(choice, events))
            if self._is_plain and choice.finish_reason is None:
                self._prepared[choice.index] = self._prepare(choice)
            return data
        if choice.finish_reason is not None:
            return self._encoded(self._format.chunks(choice, events))
        return prepared.write("".join([event.text for event in events]))

    def text_writer(self, choice: Answer) -> Callable[[str], bytes] | None:
        prepared = self._prepared.get(choice.index)
        return None if prepared is None else prepared.write

    def usage(self) -> bytes:
        """The chunk with the counts, if the stream was asked to include it."""
        return self.event(self._format.usage_chunk(self._usage())) if self._options.include_usage else b""

    def error(self, error: ApiError) -> bytes:
        """The event that says why a stream ends early."""
        return self.event(error.body())

    def event(self, value: dict[str, Any]) -> bytes:
        """One server-sent event."""
        return b"data: " + _encode(value) + b"\n\n"

    def _encoded(self, chunks: list[dict[str, Any]]) -> bytes:
        if self._options.continuous_usage_stats:
            usage = self._usage()
            chunks = [{**chunk, "usage": usage} for chunk in chunks]
        elif self._options.include_usage:
            chunks = [{**chunk, "usage": None} for chunk in chunks]
        return b"".join(map(self.event, chunks))

    def _prepare(self, choice: Answer) -> PlainChunk:
        """What comes before and after the text of a plain token."""
        mark = f"the text of choice {choice.index} comes here {id(self)}"
        data = self._encoded(self._format.chunks(choice, [TokenEvent(0, mark)]))
        return PlainChunk(*data.split(_encode(mark)))


@dataclass(frozen=True, slots=True)
class ChunkReply:
    """A reply whose stream is a row of chunks; see `Reply`."""

    format: AnswerFormat
    options: StreamOptions

    def whole(self, choices: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        return self.format.whole(choices, usage)

    def stream(self, usage: Callable[[], dict[str, Any]]) -> ChunkWriter:
        return ChunkWriter(self.format, self.options, usage)
