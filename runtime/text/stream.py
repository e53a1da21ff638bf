# SPDX-License-Identifier: Apache-2.0
"""The text of one request while it grows: detokeniser and stop texts together."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import msgspec

from phalanx.runtime.text.detokenizer import Detokenizer
from phalanx.runtime.text.stop import StopMatcher

__all__ = ["TextPiece", "TextStream"]


class TextPiece(msgspec.Struct, frozen=True):
    """What some tokens added.

    Attributes:
        text: new text, final; may be empty while a character or a possible stop text is incomplete.
        stop: the stop text that ended the request, or None.
        num_tokens: how many of the pushed tokens count: all, or those up to the end of the stop text.
    """

    text: str
    stop: str | None
    num_tokens: int

    @property
    def stopped(self) -> bool:
        """Whether a stop text was found: the request is over."""
        return self.stop is not None


class TextStream:
    """Feeds tokens of one request to its detokeniser and watches for its stop texts.

    With ``min_tokens``, stop texts do not count before that many tokens.

    Attributes:
        has_stops: whether there are any.
        extend: returns the text that tokens added, where there are none.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop: tuple[str, ...] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = detokenizer
        self.has_stops = bool(stop)
        self.extend = detokenizer.extend
        self._matcher = StopMatcher(stop, include_stop=include_stop)
        self._tokens_before_stop = min_tokens

    def push(self, token_ids: Sequence[int]) -> TextPiece:
        """The text that ``token_ids`` added. Nothing may be pushed after a stop."""
        pieces: list[str] = []
        for index, token_id in enumerate(token_ids):
            piece, stop = self.step(token_id)
            pieces.append(piece)
            if stop is not None:
                return TextPiece("".join(pieces), stop, index + 1)
        return TextPiece("".join(pieces), None, len(token_ids))

    def step(self, token_id: int) -> tuple[str, str | None]:
        """The text that one token added, and the stop text that it completed; for one token a quarter of the cost of `push`."""
        text = self._detokenizer.push(token_id)
        if not self.has_stops:
            return text, None
        if self._tokens_before_stop > 1:
            self._tokens_before_stop -= 1
            return text, None
        return self._matcher.push(text)

    def fork(self) -> TextStream:
        """Return another stream that goes on from here."""
        other = copy.copy(self)
        other._detokenizer, other._matcher = self._detokenizer.fork(), self._matcher.fork()
        other.extend = other._detokenizer.extend
        return other

    def finish(self) -> TextPiece:
        """Give out the text still held back when a request ends; the end of the text may complete a stop text."""
        text, stop = self._matcher.push(self._detokenizer.flush())
        return TextPiece(text if stop is not None else text + self._matcher.flush(), stop, 0)
