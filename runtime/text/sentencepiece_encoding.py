# SPDX-License-Identifier: Apache-2.0
"""Texts to pieces as the SentencePiece library makes them: normalisation, then unigrams or byte pairs, then bytes of unknown characters.

Source: ``Normalizer::Normalize``, ``unigram::Model::EncodeOptimized`` and
``SentencePieceProcessor::PopulateSentencePieceText`` of the library (0.2).
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice

from phalanx.runtime.text.sentencepiece_merges import BytePairs
from phalanx.runtime.text.sentencepiece_model import MARK, PieceKind, SentencePieceModel
from phalanx.runtime.text.windows import WINDOW, check_whole

__all__ = ["SentencePieceEncoding"]

_PRINTABLE = "".join(map(chr, range(0x20, 0x7F)))
_CHARACTERS_PER_PIECE = 4
_UNKNOWN_PENALTY = 10.0
_DEFINED_BONUS = 0.1
"""Score of each byte but the first of a piece that the user defined."""


class SentencePieceEncoding:
    """Cuts a text without special tokens into pieces.

    ``spelt``: texts that are written as pieces before all else. ``marks_first``: the space before a text goes before its first word
    alone, nor before another space, as in transformers with ``legacy`` false.
    """

    def __init__(
        self, model: SentencePieceModel, spelt: Sequence[tuple[str, str]] = (), marks_first: bool = False
    ) -> None:
        self._model = model
        self._spelt = spelt
        self._marks_first = marks_first
        self._normaliser = _Normaliser(model)
        self._segment = _Unigrams(model) if model.is_unigram else BytePairs(model.pieces)

    def pieces(self, text: str, is_first: bool) -> list[str]:
        """Return the texts of a text's tokens; ``is_first``: nothing goes before it.

        Raises:
            RequestError: it is too long where it can only be encoded as a whole.
        """
        for spaces, piece in self._spelt:
            text = text.replace(spaces, piece)
        model = self._model
        text = self._normaliser(text, model.dummy_prefix and not self._marks_first)
        if model.dummy_prefix and self._marks_first and is_first and text and not text.startswith(MARK):
            text = MARK + text
        return list(self._known(self._segment(text)))

    def last_pieces(self, text: str, is_first: bool, count: int) -> list[str]:
        """Return at least the last ``count`` of `pieces`, or all. Where the model allows it, the beginning of a long text is not encoded.

        Raises:
            RequestError: see `pieces`.
        """
        size = _CHARACTERS_PER_PIECE * count
        while size < len(text) and self._normaliser.is_local and not self._spelt:
            tail = self._normaliser(text[-size:], marks=False)
            if (cut := self._segment.first_cut(tail)) is not None:
                found = list(self._known(self._segment(tail[cut:])))
                if len(found) >= count:
                    return found
            size *= 2
        return self.pieces(text, is_first)

    def _known(self, found: Iterator[tuple[str, bool]]) -> Iterator[str]:
        """Unknown characters as their bytes, or a run of them as one unknown token."""
        was_known = True
        for text, is_known in found:
            if is_known:
                yield text
            elif self._model.byte_fallback:
                yield from (f"<0x{byte:02X}>" for byte in text.encode())
            elif was_known:
                yield self._model.pieces[self._model.unk_id].text
            was_known = is_known


class _Normaliser:
    """Replaces characters, removes and marks spaces; pieces that the user defined stay as they are.

    ``is_local``: each character is normalised alone.
    """

    def __init__(self, model: SentencePieceModel) -> None:
        self._removes_spaces = model.remove_spaces
        self._map = model.character_map
        defined = _alternatives(model.texts(PieceKind.USER_DEFINED))
        special = "[^ -~]" if self._map and not self._map.replaces_within(_PRINTABLE) else "(?s:.)"
        pattern = "|".join([f"({defined})"] * bool(defined) + [special] * bool(self._map))
        self._suspects = re.compile(pattern or "(?!)")
        self._longest = max(map(len, model.texts(PieceKind.USER_DEFINED)), default=1)
        self.is_local = not (model.remove_spaces or model.character_map)

    def __call__(self, text: str, marks: bool) -> str:
        """``marks``: a space goes before the text."""
        if not self._removes_spaces:
            kept = "".join(part for part, _ in self._parts(text))
            return (MARK if marks and text else "") + kept.replace(" ", MARK)
        out, after_space = [], True
        for part, is_whole in self._parts(text):
            kept = part if is_whole else re.sub(" +", " ", part)
            kept = kept.lstrip(" ") if after_space else kept
            if kept:
                out.append(kept)
                after_space = kept.endswith(" ")
        joined = "".join(out).replace(" ", MARK).rstrip(MARK)
        return (MARK if marks and joined else "") + joined

    def _parts(self, text: str) -> Iterator[tuple[str, bool]]:
        """The text with characters replaced, in parts; whether each part is what one match gave."""
        position = 0
        while position < len(text):
            end = position + WINDOW
            suspect = self._suspects.search(text, position, end + self._longest - 1)
            if suspect is None or suspect.start() >= end:
                end -= end < len(text)  # what begins at the last character may be replaced with the next one
                yield text[position:end], False
                position = end
                continue
            start = suspect.start()
            for begin in range(max(position, start - 1), start + 1):
                if begin == start and suspect.lastindex:
                    match: tuple[int, str] | None = (suspect.end(), suspect[0])
                else:
                    match = self._map.match(text, begin) if self._map else None
                if match is not None:
                    break
            yield text[position:begin], False
            position, replacement = match or (start + 1, text[start])
            yield replacement, match is not None


class _Unigrams:
    """Finds the pieces with the best sum of scores (Viterbi), in float32 as the library."""

    def __init__(self, model: SentencePieceModel) -> None:
        scores = [piece.score for piece in model.pieces if piece.kind == PieceKind.NORMAL] or [0.0]
        self._unknown = _float32(min(scores) - _UNKNOWN_PENALTY)
        self._scores: dict[str, float] = {}
        for piece in model.pieces:
            if piece.kind == PieceKind.NORMAL:
                self._scores[piece.text] = piece.score
            elif piece.kind == PieceKind.USER_DEFINED:  # nearly always chosen, and the longer of two
                self._scores[piece.text] = _float32(_DEFINED_BONUS * (len(piece.text.encode()) - 1))
        self._beginnings = {text[:end] for text in self._scores for end in range(1, len(text) + 1)}

    def __call__(self, text: str) -> Iterator[tuple[str, bool]]:
        check_whole(text)
        best, starts, sums = (
            array("f", bytes(4 * (len(text) + 1))),
            array("q", [-1]) * (len(text) + 1),
            array("f", [0.0]),
        )
        for start in range(len(text)):
            for end, score in self._candidates(text, start):
                sums[0] = best[start] + score
                if starts[end] < 0 or sums[0] > best[end]:
                    best[end], starts[end] = sums[0], start
        ends = _path(starts)
        for start, end in zip(reversed(ends), islice(reversed(ends), 1, None), strict=False):
            piece = text[start:end]
            yield piece, piece in self._scores

    def first_cut(self, text: str) -> int | None:
        """None: the sum of scores from the start of the text, rounded to float32, decides between pieces."""
        return None

    def _candidates(self, text: str, start: int) -> Iterator[tuple[int, float]]:
        """End and score of each piece at ``start``; an unknown character where none is one character long."""
        end = start + 1
        while end <= len(text) and text[start:end] in self._beginnings:
            if (score := self._scores.get(text[start:end])) is not None:
                yield end, score
            end += 1
        if text[start] not in self._scores:
            yield start + 1, self._unknown


def _path(starts: array[int]) -> array[int]:
    """Ends of the pieces from the last to the first, and the start of that: numbers alone, as a collection of garbage visits each tuple."""
    ends = array("q", [len(starts) - 1])
    while ends[-1]:
        ends.append(starts[ends[-1]])
    return ends


def _float32(value: float) -> float:
    return array("f", [value])[0]


def _alternatives(texts: Sequence[str]) -> str:
    """Pattern of any of ``texts``, the longest that fits."""
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))
