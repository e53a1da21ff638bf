# SPDX-License-Identifier: Apache-2.0
"""Texts with special tokens to the token ids of a SentencePiece model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import tokenizers
from tokenizers import models

from phalanx.runtime.text.added_tokens import AddedTokens, Span
from phalanx.runtime.text.sentencepiece_encoding import SentencePieceEncoding

__all__ = ["SentencePieceEncoder"]


class SentencePieceEncoder:
    """Has the tokens and ids of a tokenizer, and cuts what lies between its added tokens by a `SentencePieceEncoding`.

    All of it is Python, so a long text does not keep the interpreter from other threads.
    """

    def __init__(self, backend: tokenizers.Tokenizer, encoding: SentencePieceEncoding) -> None:
        self._vocabulary = backend.get_vocab(with_added_tokens=False)
        self._added = AddedTokens(backend)
        self._encoding = encoding
        self._before, self._after = _surroundings(backend)

    def encode(self, text: str, add_special_tokens: bool, last: int | None = None) -> tuple[int, ...]:
        """Return token ids; of them the ``last`` ones, for which no more of the text is encoded than they need.

        Raises:
            RequestError: a part of the text that can only be encoded as a whole is too long.
        """
        before, after = (self._before, self._after) if add_special_tokens else ((), ())
        if last is None:
            return (*before, *(token for span in self._added.split(text) for token in self._ids(text, span)), *after)
        found = (*self._last(text, max(0, last - len(after))), *after)
        return (*before, *found)[-last:] if len(found) < last else found[len(found) - last :]

    def _last(self, text: str, count: int) -> tuple[int, ...]:
        """At least the last ``count`` tokens of a text, or all."""
        # Two texts never follow each other, so half of the spans are tokens.
        spans, groups, missing = deque(self._added.split(text), 2 * count + 1), deque[list[int]](), count
        while spans and missing > 0:
            group = list(self._ids(text, spans.pop(), missing))
            groups.appendleft(group)
            missing -= len(group)
        return tuple(token for group in groups for token in group)

    def _ids(self, text: str, span: Span, last: int | None = None) -> Iterator[int]:
        token_id, start, end = span
        if token_id is not None:
            return iter((token_id,))
        part, is_first = text[start:end], start == 0
        pieces = (
            self._encoding.pieces(part, is_first) if last is None else self._encoding.last_pieces(part, is_first, last)
        )
        return map(self._vocabulary.__getitem__, pieces)


def _surroundings(backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens that go before and after every text."""
    frame = tokenizers.Tokenizer(models.WordLevel({"": 0}, unk_token=""))
    frame.post_processor = backend.post_processor
    encoding = frame.encode("x")
    place = encoding.special_tokens_mask.index(0)
    return tuple(encoding.ids[:place]), tuple(encoding.ids[place + 1 :])
