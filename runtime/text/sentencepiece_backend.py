# SPDX-License-Identifier: Apache-2.0
"""A SentencePiece model for the `tokenizers` library: its tokens and how they become a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import tokenizers
from tokenizers import decoders, models, normalizers

from phalanx.parallel.errors import CheckpointError
from phalanx.runtime.text.sentencepiece_merges import OF_TEXT
from phalanx.runtime.text.sentencepiece_model import MARK, Piece, PieceKind, SentencePieceModel

__all__ = ["spellings", "to_backend"]

_MOST_SPACES = 1 << 16
"""How many spaces are taken away from the start of a text where the model removes all."""


def to_backend(model: SentencePieceModel, spelt: Sequence[tuple[str, str]] = ()) -> tokenizers.Tokenizer:
    """Return the tokens of ``model``, with control pieces as special tokens, and the decoder. It can be written as a ``tokenizer.json``.

    ``spelt``: texts that are written as pieces. What it encodes itself is an approximation: see `SentencePieceEncoder`.
    """
    backend = tokenizers.Tokenizer(_algorithm(model))
    prefix = [normalizers.Prepend(MARK)] if model.dummy_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", MARK)])
    replaced = [decoders.Replace(MARK, " "), *(decoders.Replace(piece, text) for text, piece in spelt)]
    most = _MOST_SPACES if model.remove_spaces else 1
    strip = [decoders.Strip(" ", most, 0)] if model.dummy_prefix or model.remove_spaces else []
    fallback = [decoders.ByteFallback()] if model.byte_fallback else []
    backend.decoder = decoders.Sequence([*replaced, *fallback, decoders.Fuse(), *strip])
    backend.add_special_tokens(model.texts(PieceKind.CONTROL))
    return backend


def spellings(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Return what ChatGLM-6B's code writes as pieces that the user defined: line ends, tabs and two spaces or more; in the order of replacement.

    Raises:
        CheckpointError: it is not a model of unigrams.
    """
    if not model.is_unigram:
        raise CheckpointError("ice_text.model is not a SentencePiece model of unigrams; restore it, or use token ids")
    defined = set(model.texts(PieceKind.USER_DEFINED))
    return [(text, piece) for text, piece in _known_spellings() if piece in defined]


def _known_spellings() -> Iterator[tuple[str, str]]:
    yield "\n", "<n>"
    yield "\t", "<|tab|>"
    for count in range(80, 1, -1):
        yield " " * count, f"<|blank_{count}|>"


def _algorithm(model: SentencePieceModel) -> models.Model:
    if model.is_unigram:
        scored = [(piece.text, piece.score) for piece in model.pieces]
        return models.Unigram(scored, unk_id=model.unk_id, byte_fallback=model.byte_fallback)
    vocabulary = {piece.text: index for index, piece in enumerate(model.pieces)}
    return models.BPE(
        vocabulary, _merges(model.pieces, vocabulary), unk_token=model.text(model.unk_id), fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )  # fmt: skip


def _merges(pieces: Sequence[Piece], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of texts that makes a piece, best score of the result first."""
    found = []
    for piece in pieces:
        if piece.kind not in OF_TEXT:
            continue
        for cut in range(1, len(piece.text)):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-piece.score, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]
