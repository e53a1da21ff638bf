# SPDX-License-Identifier: Apache-2.0
"""``precompiled_charsmap`` of a SentencePiece model: which characters a text's normalisation replaces, and by what.

The format is that of the library's ``Normalizer::DecodePrecompiledCharsMap``: a size, a double array of darts-clone as a trie over
UTF-8 (https://github.com/s-yata/darts-clone), and the replacements, each ended by a zero byte.
"""

from __future__ import annotations

import struct

import numpy as np

__all__ = ["CharacterMap"]

_LEAF, _LABEL, _VALUE = 1 << 8, 1 << 31 | 0xFF, (1 << 31) - 1
"""Bits of a unit: a value follows; the byte that it is for; the value."""


class CharacterMap:
    """Replacements of sequences of characters, the longest first.

    Raises:
        ValueError: the bytes are no such map.
    """

    def __init__(self, raw: bytes) -> None:
        if len(raw) < 4:
            raise ValueError(f"a character map of {len(raw)} bytes is too short")
        (size,) = struct.unpack_from("<I", raw)
        if size % 4 or not 4 <= size <= len(raw) - 4:
            raise ValueError(f"a character map of {len(raw)} bytes cannot hold a trie of {size}")
        self._units: list[int] = np.frombuffer(raw, "<u4", size // 4, 4).tolist()
        self._texts = raw[4 + size :]
        self._steps: dict[tuple[int, str], tuple[int, bool] | None] = {}
        self._root = self._children(0)

    def match(self, text: str, start: int) -> tuple[int, str] | None:
        """Return the end of the longest sequence at ``start`` that is replaced, and what replaces it; None if there is none."""
        node, found = self._root, None
        for end in range(start, len(text)):
            step = self._step(node, text[end])
            if step is None:
                break
            node, is_whole = step
            if is_whole:
                found = end + 1, node
        return None if found is None else (found[0], self._replacement(found[1]))

    def replaces_within(self, characters: str) -> bool:
        """Whether any text of ``characters`` alone could change."""
        steps = [step for character in characters if (step := self._step(self._root, character)) is not None]
        return any(
            is_whole or any(self._step(node, character) is not None for character in characters)
            for node, is_whole in steps
        )

    def _step(self, node: int, character: str) -> tuple[int, bool] | None:
        """The node after ``character``, and whether a sequence ends there; None if no sequence goes on with it."""
        key = node, character
        if key not in self._steps:
            self._steps[key] = self._walk(node, character.encode())
        return self._steps[key]

    def _walk(self, node: int, data: bytes) -> tuple[int, bool] | None:
        unit = 0
        for byte in data:
            index = node ^ byte
            if not byte or index >= len(self._units):
                return None
            unit = self._units[index]
            if unit & _LABEL != byte:
                return None
            node = self._children(index)
        return node, unit & _LEAF != 0

    def _children(self, index: int) -> int:
        """The number that a byte is combined with for the unit of the child under it; without any, for the value."""
        unit = self._units[index]
        return index ^ (unit >> 10) << ((unit & 1 << 9) >> 6)

    def _replacement(self, node: int) -> str:
        start = self._units[node] & _VALUE if node < len(self._units) else len(self._texts)
        return self._texts[start : self._texts.find(b"\0", start)].decode(errors="replace")
