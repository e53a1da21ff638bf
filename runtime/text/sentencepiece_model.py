# SPDX-License-Identifier: Apache-2.0
"""``tokenizer.model`` of SentencePiece as a tokenizer, for checkpoints without ``tokenizer.json``.

The file is a protocol buffer (https://github.com/google/sentencepiece, ``sentencepiece_model.proto``), of which a few fields matter.
`sentencepiece_encoding` says how texts become its pieces.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from phalanx.parallel.errors import CheckpointError
from phalanx.runtime.text.character_map import CharacterMap

__all__ = ["MARK", "Piece", "PieceKind", "SentencePieceModel", "read_model"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_UNIGRAM, _BPE = 1, 2
MARK = "▁"
"""What a space becomes."""


class PieceKind(IntEnum):
    """``SentencePiece.Type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """A token: its text, its score and its kind."""

    text: str
    score: float = 0.0
    kind: PieceKind = PieceKind.NORMAL


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """The fields that matter, with the defaults of the format.

    Attributes:
        pieces: by token id.
        algorithm: 1 unigram, 2 byte-pair encoding.
        byte_fallback: unknown characters become bytes.
        character_map: what normalisation replaces; None for nothing.
        dummy_prefix: a space goes before the text.
        remove_spaces: spaces at both ends go, and several become one.
        marks_ends: a word's mark comes after it, not before; or spaces are not marked at all.
    """

    pieces: tuple[Piece, ...]
    algorithm: int = _UNIGRAM
    byte_fallback: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    character_map: CharacterMap | None = None
    dummy_prefix: bool = True
    remove_spaces: bool = True
    marks_ends: bool = False

    @property
    def is_unigram(self) -> bool:
        """Whether the sum of scores decides, and not merges in their order."""
        return self.algorithm == _UNIGRAM

    def texts(self, kind: PieceKind) -> list[str]:
        """Return the texts of the pieces of a kind."""
        return [piece.text for piece in self.pieces if piece.kind == kind]

    def text(self, token_id: int) -> str | None:
        """Return a token's text; None for an id that the model does not have."""
        return self.pieces[token_id].text if 0 <= token_id < len(self.pieces) else None


def read_model(raw: bytes, name: str) -> SentencePieceModel:
    """Parse a model file.

    Raises:
        CheckpointError: it is not one, or uses an algorithm other than unigram and byte-pair encoding.
    """
    try:
        model = _parse(raw)
    except (IndexError, ValueError, struct.error):
        model = SentencePieceModel(())
    if not model.pieces or model.algorithm not in (_UNIGRAM, _BPE) or model.text(model.unk_id) is None:
        raise CheckpointError(
            f"{name} is not a SentencePiece model of unigrams or byte pairs; save the tokenizer with transformers "
            "(AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)), which writes tokenizer.json"
        )
    if model.marks_ends:
        raise CheckpointError(
            f"{name} marks the end of words (treat_whitespace_as_suffix) or no spaces (escape_whitespaces), which is not supported; "
            "add a tokenizer.json, or use token ids"
        )
    return model


def _parse(raw: bytes) -> SentencePieceModel:
    """``ModelProto``: pieces (1), trainer_spec (2), normalizer_spec (3)."""
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(raw):
        if number == 1 and isinstance(value, bytes):
            fields = dict(_fields(value))
            (score,) = struct.unpack("<f", _bytes(fields.get(2, bytes(4))))
            pieces.append(Piece(_bytes(fields.get(1, b"")).decode(), score, PieceKind(_whole(fields.get(3, 1)))))
        elif number == 2 and isinstance(value, bytes):
            trainer = dict(_fields(value))
        elif number == 3 and isinstance(value, bytes):
            normalizer = dict(_fields(value))
    charsmap = _bytes(normalizer.get(2, b""))
    return SentencePieceModel(
        tuple(pieces),
        algorithm=_whole(trainer.get(3, _UNIGRAM)),
        byte_fallback=bool(trainer.get(35, 0)),
        unk_id=_whole(trainer.get(40, 0)),
        bos_id=_signed(_whole(trainer.get(41, 1))),
        eos_id=_signed(_whole(trainer.get(42, 2))),
        character_map=CharacterMap(charsmap) if charsmap else None,
        dummy_prefix=bool(normalizer.get(3, 1)),
        remove_spaces=bool(normalizer.get(4, 1)),
        marks_ends=bool(trainer.get(24, 0)) or not normalizer.get(5, 1),
    )


def _fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a message: whole numbers, or the bytes of anything else."""
    position = 0
    while position < len(raw):
        key, position = _varint(raw, position)
        kind = key & 7
        if kind == _VARINT:
            value, position = _varint(raw, position)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            size, position = _varint(raw, position)
        else:
            size = {_FIXED64: 8, _FIXED32: 4}.get(kind, -1)
        if size < 0 or position + size > len(raw):
            raise ValueError(f"field {key >> 3} of kind {kind} does not fit")
        yield key >> 3, raw[position : position + size]
        position += size


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position
        if shift > 63:
            raise ValueError("a number is too long")


def _whole(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("bytes for a number")
    return value


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number for bytes")
    return value


def _signed(value: int) -> int:
    """An int32 that the format stores as 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value
