# SPDX-License-Identifier: Apache-2.0
"""Tokens to text, one at a time: what has been given out never changes and never ends inside a character."""

from __future__ import annotations

import codecs
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from phalanx.runtime.text.decoding_rules import DecodingRules

__all__ = ["ByteDetokenizer", "Detokenizer", "JoinedSpecials", "WindowDetokenizer"]

REPLACEMENT_CHARACTER = "\ufffd"
LONGEST_CHARACTER_BYTES = 4


class Detokenizer(Protocol):
    """The text of one growing token sequence."""

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; empty while a character is incomplete."""
        ...

    def extend(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with these tokens."""
        ...

    def flush(self) -> str:
        """What was held back; bytes that make no character come out as U+FFFD. The last call."""
        ...

    def fork(self) -> Detokenizer:
        """Return another that goes on from here."""
        ...


class ByteDetokenizer:
    """Exact incremental decoding for tokenizers with per-token `DecodingRules`.

    Bytes that are no UTF-8 become U+FFFD, one for each maximal part of a character (Unicode 15, section 3.9,
    as in Python and Rust). A byte-fallback decoder would instead blank its whole run of bytes, with the valid
    characters in it, which a stream that has already shown them cannot do.
    """

    def __init__(
        self,
        rules: DecodingRules,
        token_bytes: Callable[[int, bool], bytes | None],
        known_texts: dict[int, str] | None = None,
    ) -> None:
        """``token_bytes(token_id, first)`` gives what a token adds, None for one that leaves no trace in a text.

        ``known_texts`` remembers the text of tokens that begin and end between characters, for all that share these arguments.
        """
        self._token_bytes = token_bytes
        self._known_texts = {} if known_texts is None else known_texts
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._first = True
        self._spaces_to_strip = rules.stripped_spaces
        self._is_between = False

    def extend(self, token_ids: Sequence[int]) -> str:
        if self._is_between and len(token_ids) == 1:  # nearly every token of a stream
            known = self._known_texts.get(token_ids[0])
            if known is not None:
                return known
        return "".join(map(self.push, token_ids))

    def push(self, token_id: int) -> str:
        if self._is_between:
            known = self._known_texts.get(token_id)
            if known is not None:
                return known
        data = self._token_bytes(token_id, self._first)
        if data is None:
            return ""
        self._first = False
        text = self._utf8.decode(self._strip(data) if self._spaces_to_strip else data)
        was_between = self._is_between
        self._is_between = not self._spaces_to_strip and not self._utf8.getstate()[0]
        if was_between and self._is_between:
            self._known_texts[token_id] = text
        return text

    def flush(self) -> str:
        self._is_between = False
        return self._utf8.decode(b"", final=True)

    def fork(self) -> ByteDetokenizer:
        other = copy.copy(self)
        other._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        other._utf8.setstate(self._utf8.getstate())
        return other

    def _strip(self, data: bytes) -> bytes:
        stripped = data[: self._spaces_to_strip].lstrip(b" ")
        rest = stripped + data[self._spaces_to_strip :]
        self._spaces_to_strip = self._spaces_to_strip - (len(data) - len(rest)) if not rest else 0
        return rest


class WindowDetokenizer:
    """Incremental decoding by comparing whole decodes of a short window, for any other decoder pipeline.

    The window keeps the last tokens that gave text, because pipelines treat the start of a text differently
    (they trim spaces there); a new piece is what the decode gains when tokens are added.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._context_text = ""
        self._pending = 0
        self._incomplete = 0
        self._last_text = ""

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        self._pending += 1
        text = self._decode(self._window)
        grows = len(text) > len(self._context_text) and text.startswith(self._context_text)
        # A character has at most four bytes, so as many tokens with one byte each. Tokens without text do not count.
        if not text.endswith(REPLACEMENT_CHARACTER):
            self._incomplete = 0
        elif text != self._last_text:
            self._incomplete += 1
        self._last_text = text
        return self._advance(text) if grows and not 0 < self._incomplete < LONGEST_CHARACTER_BYTES else ""

    def extend(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self.push, token_ids))

    def flush(self) -> str:
        text = self._decode(self._window)
        return text[len(self._context_text) :]

    def fork(self) -> WindowDetokenizer:
        other = copy.copy(self)
        other._window = list(self._window)
        return other

    def _advance(self, text: str) -> str:
        piece = text[len(self._context_text) :]
        context = self._window[-self._pending :]
        context_text = self._decode(context)
        if context_text.strip():
            self._window, self._context_text = context, context_text
        else:  # too little to start a window from: keep the older context as well
            self._context_text = text
        self._pending = self._incomplete = 0
        return piece


class JoinedSpecials:
    """Another detokenizer's text without what its decoder puts between two added tokens, as vLLM leaves it out."""

    def __init__(self, detokenizer: Detokenizer, added_texts: Mapping[int, str]) -> None:
        """``added_texts`` are those of added tokens, by id."""
        self._detokenizer, self._added_texts = detokenizer, added_texts
        self._follows_added = False

    def push(self, token_id: int) -> str:
        text, added = self._detokenizer.push(token_id), self._added_texts.get(token_id)
        if added is not None and self._follows_added:
            text = added
        self._follows_added = added is not None
        return text

    def extend(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self.push, token_ids))

    def flush(self) -> str:
        return self._detokenizer.flush()

    def fork(self) -> JoinedSpecials:
        other = copy.copy(self)
        other._detokenizer = self._detokenizer.fork()
        return other
