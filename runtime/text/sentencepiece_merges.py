# SPDX-License-Identifier: Apache-2.0
"""Byte-pair encoding as the SentencePiece library does it: the pair with the best score is merged first, of equal scores the leftmost.

Source: ``bpe::Model::SampleEncode`` of the library (0.2). Ranks of pairs, as the `tokenizers` library has them, cannot say "leftmost".
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from heapq import heappop, heappush
from itertools import chain
from operator import add

from phalanx.runtime.text.sentencepiece_model import Piece, PieceKind
from phalanx.runtime.text.windows import WINDOW, check_whole, search

__all__ = ["OF_TEXT", "BytePairs"]

OF_TEXT = (PieceKind.NORMAL, PieceKind.USER_DEFINED, PieceKind.UNUSED)
"""Kinds of pieces that texts are cut into."""
_CACHED_CHARACTERS, _CACHED_SECTIONS = 32, 1 << 14


class BytePairs:
    """Cuts a normalised text into pieces.

    A text is merged in sections: two neighbouring characters that no piece holds next to each other are never merged, and what is on
    either side of them has no influence on the other.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        scores = {piece.text: piece.score for piece in pieces if piece.kind in OF_TEXT}
        places = {score: place for place, score in enumerate(sorted(set(scores.values()), reverse=True))}
        self._places = {text: places[score] for text, score in scores.items()}
        self._unused = frozenset(piece.text for piece in pieces if piece.kind == PieceKind.UNUSED)
        self._used = self._places.keys() - self._unused
        defined = sorted(
            (piece.text for piece in pieces if piece.kind == PieceKind.USER_DEFINED), key=len, reverse=True
        )
        self._defined = re.compile("|".join(map(re.escape, defined)) or "(?!)")
        self._longest_defined = len(defined[0]) if defined else 0
        self._pairs = frozenset(text[at : at + 2] for text in scores for at in range(len(text) - 1))
        self._has_sections = not any(map(self._is_ambiguous, self._unused))
        self._cached = lru_cache(_CACHED_SECTIONS)(lambda section: tuple(self._merged(section)))

    def __call__(self, text: str) -> Iterator[tuple[str, bool]]:
        """Each piece, and whether it is one: else it is a character that the model does not have.

        Raises:
            RequestError: a section is too long.
        """
        for section in self._sections(text):
            yield from (self._cached if len(section) <= _CACHED_CHARACTERS else self._merged)(section)

    def first_cut(self, text: str) -> int | None:
        """Return the first place after the start where a section begins: what follows it has the same pieces alone. None without one."""
        return next(self._cuts(text), None)

    def _sections(self, text: str) -> Iterator[str]:
        start = 0
        for end in chain(self._cuts(text), (len(text),)):
            yield text[start:end]
            start = end

    def _cuts(self, text: str) -> Iterator[int]:
        if not self._has_sections:
            return
        for begin in range(0, len(text), WINDOW):
            window, pairs = text[begin : begin + WINDOW + 1], self._pairs
            yield from [at for at, pair in enumerate(map(add, window, window[1:]), begin + 1) if pair not in pairs]

    def _merged(self, text: str) -> Iterator[tuple[str, bool]]:
        check_whole(text)
        merges = _Merges(text, self._places, self._unused)
        position = 0
        while self._longest_defined and (match := search(self._defined, text, position, self._longest_defined)):
            position = match.end()
            merges.seal(*match.span())
        merges.run()
        for piece in merges.pieces():
            yield piece, piece in self._used

    def _is_ambiguous(self, unused: str) -> bool:
        """Whether several pairs make a piece: then the one that comes last in the whole text says how it is split."""
        ways = ((unused[:cut], unused[cut:]) for cut in range(1, len(unused)))
        return sum(all(len(half) == 1 or half in self._places for half in way) for way in ways) > 1


class _Merges:
    """The merges of one text. A symbol is known by the place where it begins.

    ``_ends``: where each symbol ends; 0 where none begins. ``_starts``: where the symbol begins that ends at a place.
    ``_queue``: pairs by the place of their score among all scores, then by their own: place * length of the text + start, a heap.
    """

    def __init__(self, text: str, places: Mapping[str, int], unused: frozenset[str]) -> None:
        self._text = text
        self._places = places
        self._unused = unused
        self._ends, self._starts = array("q"), array("q", [-1])
        for begin in range(0, len(text), WINDOW):
            end = min(begin + WINDOW, len(text))
            self._ends.extend(range(begin + 1, end + 1))
            self._starts.extend(range(begin, end))
        self._sealed: set[int] = set()
        self._queue: list[int] = []
        self._halves: dict[str, tuple[str, str]] = {}

    def seal(self, start: int, end: int) -> None:
        """Make a symbol of some characters that is not merged."""
        self._ends[start:end] = array("q", [end, *bytes(end - start - 1)])
        self._starts[end] = start
        self._sealed.add(start)

    def run(self) -> None:
        """Merge all that can be."""
        left, size = 0, len(self._text)
        while left < size:
            self._offer(left)
            left = self._ends[left]
        while self._queue:
            place, left = divmod(heappop(self._queue), size)
            right = self._ends[left]
            # An older offer may be void by now, or be of a longer pair of the same score, which is due all the same.
            if right and self._place(left, right) == place:
                self._merge(left, right)

    def pieces(self) -> Iterator[str]:
        """The symbols that are left; pieces marked as unused are split again as they were made."""
        left, size = 0, len(self._text)
        while left < size:
            waiting = [self._text[left : self._ends[left]]]
            while waiting:
                piece = waiting.pop()
                if piece in self._unused and (halves := self._halves.get(piece)):
                    waiting += reversed(halves)
                else:
                    yield piece
            left = self._ends[left]

    def _place(self, left: int, right: int) -> int | None:
        """Place of the score of two neighbours as one piece; None if they are none."""
        if right == len(self._text) or left in self._sealed or right in self._sealed:
            return None
        return self._places.get(self._text[left : self._ends[right]])

    def _offer(self, left: int) -> None:
        right = self._ends[left]
        if (place := self._place(left, right)) is None:
            return
        heappush(self._queue, place * len(self._text) + left)
        if self._unused:
            end = self._ends[right]
            self._halves[self._text[left:end]] = (self._text[left:right], self._text[right:end])

    def _merge(self, left: int, right: int) -> None:
        end = self._ends[right]
        self._ends[left], self._ends[right], self._starts[end] = end, 0, left
        if left:
            self._offer(self._starts[left])
        self._offer(left)
