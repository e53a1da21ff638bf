# SPDX-License-Identifier: Apache-2.0
"""How one token becomes bytes, read from the ``decoder`` section of a ``tokenizer.json``.

Working on bytes makes streaming exact: a character may be spread over several tokens, a byte never is.
Byte-level BPE and the byte-fallback pipelines of SentencePiece models are covered; for any other pipeline
`read_rules` returns None.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["DecodingRules", "characters_of_bytes", "read_rules"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class DecodingRules:
    """What a decoder pipeline does to each token, and to the start of a text.

    Attributes:
        byte_level: characters stand for bytes by GPT-2's table.
        byte_fallback: tokens spelt ``<0xNN>`` are single bytes.
        replacements: (from, to) texts, applied to each token in order.
        dropped_in_first_token: what vanishes from the first token of a text (Metaspace's added prefix).
        stripped_spaces: most spaces taken away from the start of a text.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    dropped_in_first_token: str | None = None
    stripped_spaces: int = 0

    def token_bytes(self, token: str, *, first: bool = False) -> bytes:
        """The bytes that ``token`` adds to a text; ``first`` when it opens the text."""
        if self.byte_level:
            try:
                return bytes(_BYTE_OF_CHARACTER[character] for character in token)
            except KeyError:  # an added token that is no byte-level text stands for itself
                return token.encode()
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        if first and self.dropped_in_first_token is not None:
            token = token.replace(self.dropped_in_first_token, "")
        for old, new in self.replacements:
            token = token.replace(old, new)
        return token.encode()


def read_rules(decoder: Any) -> DecodingRules | None:
    """The rules of a ``decoder`` section, or None where its effect is not token by token."""
    if not isinstance(decoder, dict):
        return None
    match decoder:
        case {"type": "ByteLevel"}:
            return DecodingRules(byte_level=True)
        case {"type": "Metaspace", "replacement": str(mark)}:
            added = decoder.get("prepend_scheme", "always") != "never" and decoder.get("add_prefix_space", True)
            return DecodingRules(replacements=((mark, " "),), dropped_in_first_token=mark if added else None)
        case {"type": "Sequence", "decoders": list(steps)}:
            return _read_sequence(steps)
    return _read_sequence([decoder])


def _read_sequence(steps: list[Any]) -> DecodingRules | None:
    """The SentencePiece pipeline: Replace..., ByteFallback, Fuse, Strip; in this order; Fuse is required."""
    if len(steps) == 1 and isinstance(steps[0], dict) and steps[0].get("type") in ("ByteLevel", "Metaspace"):
        return read_rules(steps[0])
    replacements: list[tuple[str, str]] = []
    byte_fallback, fused, stripped = False, False, 0
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if not (
                byte_fallback or fused
            ):
                replacements.append((old, new))
            case {"type": "ByteFallback"} if not fused:
                byte_fallback = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": " ", "start": int(count), "stop": 0} if fused and not stripped:
                stripped = count
            case _:
                return None
    if not fused:
        return None
    return DecodingRules(byte_fallback=byte_fallback, replacements=tuple(replacements), stripped_spaces=stripped)


def _byte_level_alphabet() -> Iterator[tuple[str, int]]:
    """GPT-2's table: printable Latin-1 characters are themselves, the other bytes U+0100 onwards."""
    unused = 0x100
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or 0xAE <= byte <= 0xFF:
            yield chr(byte), byte
        else:
            yield chr(unused), byte
            unused += 1


_BYTE_OF_CHARACTER = dict(_byte_level_alphabet())
_CHARACTER_OF_BYTE = {byte: character for character, byte in _BYTE_OF_CHARACTER.items()}


def characters_of_bytes(token: bytes) -> str:
    """How byte-level vocabularies spell ``token``: a character for each byte."""
    return "".join(_CHARACTER_OF_BYTE[byte] for byte in token)
