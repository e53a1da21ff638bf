# SPDX-License-Identifier: Apache-2.0
"""``tokenizer.model`` of SentencePiece as a tokenizer, for checkpoints without ``tokenizer.json``.

The file is a protocol buffer (https://github.com/google/sentencepiece, ``sentencepiece_model.proto``), of which a few fields matter.
Encoding follows the model's own algorithm: unigram by scores, byte-pair encoding by merges in the order of the merged pieces' scores.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from phalanx.parallel.errors import CheckpointError

__all__ = ["SentencePieceModel", "read_model", "to_backend", "to_spelt_backend"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_UNIGRAM, _BPE = 1, 2
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6
_MARK = "▁"
_BYTE_FORM = ("<", "0", "x", "[0-9A-F]", "[0-9A-F]", ">")
"""The characters of a byte's piece."""
_MOST_SPACES = 1 << 16
"""How many spaces are taken away from the start of a text where the model removes all."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A token: its text, its score and its kind (``SentencePiece.Type``)."""

    text: str
    score: float = 0.0
    kind: int = 1


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """The fields that matter, with the defaults of the format.

    Attributes:
        pieces: by token id.
        algorithm: 1 unigram, 2 byte-pair encoding.
        byte_fallback: unknown characters become bytes.
        charsmap: compiled normalisation, empty for none.
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
    charsmap: bytes = b""
    dummy_prefix: bool = True
    remove_spaces: bool = True
    marks_ends: bool = False

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


def to_backend(model: SentencePieceModel, marks_first: bool = False) -> tokenizers.Tokenizer:
    """Return the tokenizer that encodes as ``model`` does; control pieces are special tokens.

    ``marks_first``: the space before a text goes before its first word alone and not after special tokens, nor before another space, as
    in transformers with ``legacy`` false.

    Where a character that normalisation replaces is followed by combining marks, `tokenizers` drops these, the library does not.
    """
    return _backend(model, marks_first=marks_first)


def to_spelt_backend(model: SentencePieceModel) -> tokenizers.Tokenizer:
    """Return ChatGLM-6B's tokenizer: line ends, tabs and two spaces or more are pieces that the user defined, ``<n>`` for one.

    Raises:
        CheckpointError: it is not a model of unigrams.
    """
    if model.algorithm != _UNIGRAM:
        raise CheckpointError("ice_text.model is not a SentencePiece model of unigrams; restore it, or use token ids")
    defined = _texts(model, _USER_DEFINED)
    return _backend(model, [(text, piece) for text, piece in _spellings() if piece in defined])


def _backend(
    model: SentencePieceModel, spelt: Sequence[tuple[str, str]] = (), marks_first: bool = False
) -> tokenizers.Tokenizer:
    """The tokenizer; ``spelt``: texts that are written as pieces before all else.

    Pieces that the user defined are cut out of the normalised text, the longest first, so that no further space is put after them.
    """
    backend = tokenizers.Tokenizer(_algorithm(model))
    steps: list[normalizers.Normalizer] = [normalizers.Replace(text, piece) for text, piece in spelt]
    steps += [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_spaces:
        steps += [
            normalizers.Replace(tokenizers.Regex(rf"\A +|[ {_MARK}]+\z"), ""),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    words: list[pre_tokenizers.PreTokenizer] = []
    if model.dummy_prefix and marks_first:
        words = [pre_tokenizers.Metaspace(_MARK, "first", split=False)]
    elif model.dummy_prefix:
        steps.append(normalizers.Prepend(_MARK))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _MARK)])
    replaced = [decoders.Replace(_MARK, " "), *(decoders.Replace(piece, text) for text, piece in spelt)]
    most = _MOST_SPACES if model.remove_spaces else 1
    strip = [decoders.Strip(" ", most, 0)] if model.dummy_prefix or model.remove_spaces else []
    fallback = [decoders.ByteFallback()] if model.byte_fallback else []
    backend.decoder = decoders.Sequence([*replaced, *fallback, decoders.Fuse(), *strip])
    if cuts := _cuts(model):
        words.append(pre_tokenizers.Split(tokenizers.Regex("|".join(cuts)), "isolated"))
    if words:
        backend.pre_tokenizer = pre_tokenizers.Sequence(words)
    backend.add_special_tokens(_texts(model, _CONTROL))
    return backend


def _cuts(model: SentencePieceModel) -> list[str]:
    """Patterns of what is cut out of a text. Merges never make a byte's piece, so most byte-pair models need none for bytes."""
    defined = [re.escape(text) for text in sorted(_texts(model, _USER_DEFINED), key=len, reverse=True)]
    takes_bytes = model.byte_fallback and (defined or model.algorithm == _UNIGRAM)
    return [*defined, _byte_cut(model)] if takes_bytes else defined


def _byte_cut(model: SentencePieceModel) -> str:
    """Pattern of the place in a text such as ``<0x41>`` where it is cut, as `tokenizers` would take the whole for that byte.

    It is the first between two characters that no piece of text joins, so that the cut changes no other token; after ``<`` if each is
    joined by some piece.
    """
    texts = "\n".join(piece.text for piece in model.pieces if piece.kind != _BYTE)
    places = range(1, len(_BYTE_FORM))
    free = (place for place in places if not re.search("".join(_BYTE_FORM[place - 1 : place + 1]), texts))
    place = next(free, 1)
    return f"(?<={''.join(_BYTE_FORM[:place])})(?={''.join(_BYTE_FORM[place:])})"


def _texts(model: SentencePieceModel, kind: int) -> list[str]:
    return [piece.text for piece in model.pieces if piece.kind == kind]


def _spellings() -> Iterator[tuple[str, str]]:
    """What a text holds and the piece for it, in the order of replacement."""
    yield "\n", "<n>"
    yield "\t", "<|tab|>"
    for count in range(80, 1, -1):
        yield " " * count, f"<|blank_{count}|>"


def _algorithm(model: SentencePieceModel) -> models.Model:
    if model.algorithm == _UNIGRAM:
        scored = [(piece.text, piece.score) for piece in model.pieces]
        return models.Unigram(scored, unk_id=model.unk_id, byte_fallback=model.byte_fallback)
    vocabulary = {piece.text: index for index, piece in enumerate(model.pieces)}
    return models.BPE(
        vocabulary, _merges(model.pieces, vocabulary), unk_token=model.text(model.unk_id), fuse_unk=True,
        byte_fallback=model.byte_fallback, ignore_merges=bool(_texts(model, _USER_DEFINED)),
    )  # fmt: skip


def _merges(pieces: Sequence[Piece], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece of text, best score of the result first."""
    found = []
    for piece in pieces:
        if piece.kind == _BYTE:
            continue
        for cut in range(1, len(piece.text)):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-piece.score, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _parse(raw: bytes) -> SentencePieceModel:
    """``ModelProto``: pieces (1), trainer_spec (2), normalizer_spec (3)."""
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(raw):
        if number == 1 and isinstance(value, bytes):
            fields = dict(_fields(value))
            (score,) = struct.unpack("<f", _bytes(fields.get(2, bytes(4))))
            pieces.append(Piece(_bytes(fields.get(1, b"")).decode(), score, _whole(fields.get(3, 1))))
        elif number == 2 and isinstance(value, bytes):
            trainer = dict(_fields(value))
        elif number == 3 and isinstance(value, bytes):
            normalizer = dict(_fields(value))
    return SentencePieceModel(
        tuple(pieces),
        algorithm=_whole(trainer.get(3, _UNIGRAM)),
        byte_fallback=bool(trainer.get(35, 0)),
        unk_id=_whole(trainer.get(40, 0)),
        bos_id=_signed(_whole(trainer.get(41, 1))),
        eos_id=_signed(_whole(trainer.get(42, 2))),
        charsmap=_bytes(normalizer.get(2, b"")),
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
