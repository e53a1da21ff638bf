# SPDX-License-Identifier: Apache-2.0
"""Tokens that are matched in a text before anything else, as the `tokenizers` library matches them.

Source: ``AddedVocabulary::find_matches`` of the library (0.23), for tokens that are not normalised.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

import tokenizers

from phalanx.runtime.text.windows import search

__all__ = ["AddedTokens", "Span"]

Span = tuple[int | None, int, int]
"""Token id, or None for a text between tokens; where it begins and ends."""
_BLANKS = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | set(map(chr, range(0x2000, 0x200B)))
"""``White_Space`` of Unicode, which is ``\\s`` of the library."""
_WORD_KINDS = ("L", "M", "Nd", "Nl", "Pc")
_CIRCLED = ((0x24B6, 0x24E9), (0x1F130, 0x1F149), (0x1F150, 0x1F169), (0x1F170, 0x1F189))
"""Letters that Unicode classes as symbols."""


class AddedTokens:
    """Splits a text at the added tokens of a tokenizer, the longest first."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._tokens = {
            token.content: (token_id, token)
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.content and not token.normalized
        }
        self._spells_special = backend.encode_special_tokens
        texts = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        self._longest = len(texts[0]) if texts else 0

    def split(self, text: str) -> Iterator[Span]:
        """Each token and each text between tokens, in order."""
        done = position = 0
        while self._longest and (match := search(self._pattern, text, position, self._longest)):
            position = match.end()
            if not self._counts(text, match):
                continue
            token_id, token = self._tokens[match[0]]
            start, end = match.span()
            while token.lstrip and start > done and text[start - 1] in _BLANKS:
                start -= 1
            while token.rstrip and end < len(text) and text[end] in _BLANKS:
                end += 1
            if done < start:
                yield None, done, start
            yield token_id, start, end
            done = end
        if done < len(text):
            yield None, done, len(text)

    def _counts(self, text: str, match: re.Match[str]) -> bool:
        token = self._tokens[match[0]][1]
        if token.special and self._spells_special:
            return False
        start, end = match.span()
        return not (token.single_word and any(map(_is_of_word, text[max(0, start - 1) : start] + text[end : end + 1])))


def _is_of_word(character: str) -> bool:
    """``\\w`` of the library: Unicode's letters, marks, digits, connectors and joiners."""
    if unicodedata.category(character).startswith(_WORD_KINDS) or character in "\u200c\u200d":
        return True
    return any(first <= ord(character) <= last for first, last in _CIRCLED)
