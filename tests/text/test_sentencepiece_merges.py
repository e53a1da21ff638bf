"""Byte pairs of a SentencePiece model are merged as its library merges them: equal scores from the left, unused pieces split again."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.runtime.text.sentencepiece_encoding import SentencePieceEncoding
from phalanx.runtime.text.sentencepiece_merges import BytePairs
from phalanx.runtime.text.sentencepiece_model import Piece, PieceKind, read_model

from .test_sentencepiece import field, varint

NORMAL, DEFINED, UNUSED = PieceKind.NORMAL, PieceKind.USER_DEFINED, PieceKind.UNUSED
RESERVED = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256))]
APPENDED = ("中国", "国人", "人民", "民大", "大学", "中国人", "人民大", "国人民")
"""Pieces of score 0 as Chinese-LLaMA's ``merge_tokenizers.py`` appends them."""
CHINESE = [Piece(text, -float(place)) for place, text in enumerate(("ab", "ca", "▁", *"abc中国人民大学"))]
CHINESE += [Piece(text) for text in APPENDED]


def to_file(pieces: list[Piece]) -> bytes:
    """A byte-pair model with byte fallback and without normalisation."""
    out = b""
    for text, score, kind in [*RESERVED, *((piece.text, piece.score, piece.kind) for piece in pieces)]:
        out += field(1, field(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + field(3, int(kind)))
    return out + field(2, field(3, 2) + field(35, 1)) + field(3, field(1, b"identity") + field(3, 1) + field(4, 0))


def cut(pieces: list[Piece], text: str) -> list[str]:
    return [piece for piece, _ in BytePairs(pieces)(text)]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("中国人民大学", ["中国人", "民大", "学"]),
        ("国人民大", ["国人民", "大"]),
        ("人民大学", ["人民大", "学"]),
        ("中国人民", ["中国人", "民"]),
    ],
)
def test_equal_scores_are_merged_from_the_left(text: str, pieces: list[str]) -> None:
    """Recorded from sentencepiece 0.2.3."""
    assert cut(CHINESE, text) == pieces


def test_every_process_cuts_a_text_alike() -> None:
    code = (
        "from phalanx.runtime.text.sentencepiece_merges import BytePairs\n"
        "from phalanx.runtime.text.sentencepiece_model import Piece\n"
        f"pairs = BytePairs([Piece(*fields) for fields in {[(piece.text, piece.score) for piece in CHINESE]!a}])\n"
        f"print(ascii(list(pairs({'中国人民大学' * 3!a}))))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout
        for seed in "01"
    }
    assert len(found) == 1


@pytest.mark.parametrize(
    ("text", "pieces"), [("abc", ["a", "bc"]), ("abcab", ["a", "bc", "a", "b"]), ("dab", ["<0x64>", "a", "b"])]
)
def test_unused_pieces_are_split_again_as_they_were_made(text: str, pieces: list[str]) -> None:
    """Recorded from sentencepiece 0.2.3; a character that is unused becomes bytes."""
    known = [Piece(text, -float(place)) for place, text in enumerate(("bc", *"abc▁"))]
    unused = [Piece(text, -9.0, UNUSED) for text in ("abc", "ab", "d")]
    encoding = SentencePieceEncoding(read_model(to_file([*known, *unused]), "x"))
    assert encoding.pieces(text, is_first=False)[1:] == pieces


def drawn(draw: random.Random, alphabet: str, kinds: tuple[PieceKind, ...]) -> list[Piece]:
    """Pieces of a few scores, many of them equal."""
    texts = dict.fromkeys("".join(draw.choices(alphabet, k=draw.randrange(1, 6))) for _ in range(draw.randrange(3, 60)))
    return [Piece(text, -float(draw.randrange(4)), draw.choice(kinds)) for text in texts]


@pytest.mark.parametrize("kinds", [(NORMAL,), (NORMAL, UNUSED), (NORMAL, NORMAL, DEFINED, UNUSED)])
@pytest.mark.parametrize("alphabet", ["abc▁", "abcd▁é中"])
def test_pieces_of_any_model_equal_the_library(alphabet: str, kinds: tuple[PieceKind, ...]) -> None:
    library: Any = pytest.importorskip("sentencepiece")
    draw = random.Random(f"{alphabet} {kinds}")
    for _ in range(20):
        raw = to_file(drawn(draw, alphabet, kinds))
        reference, encoding = (
            library.SentencePieceProcessor(model_proto=raw),
            SentencePieceEncoding(read_model(raw, "x")),
        )
        for _ in range(20):
            text = "".join(draw.choices(alphabet.replace("▁", " "), k=draw.randrange(60)))
            assert encoding.pieces(text, is_first=True) == reference.encode(text, out_type=str), text


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False), st.text("abc▁x", max_size=120), st.integers(0, 120))
def test_what_follows_a_cut_has_the_same_pieces_alone(draw: random.Random, text: str, size: int) -> None:
    pairs = BytePairs(drawn(draw, "abc▁", (NORMAL, NORMAL, DEFINED, UNUSED)))
    start = len(text) - min(size, len(text))
    cut = pairs.first_cut(text[start:])
    if cut is not None:
        assert [*pairs(text[: start + cut]), *pairs(text[start + cut :])] == list(pairs(text))


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False), st.text("abc▁x", max_size=120))
def test_sections_change_no_piece(draw: random.Random, text: str) -> None:
    """Against the same pieces with one more that makes the whole text one section: of characters that no text holds but for its pairs."""
    pieces = drawn(draw, "abc▁", (NORMAL, NORMAL, DEFINED))
    joined = "".join(left + right for left in "abc▁x" for right in "abc▁x")
    whole = BytePairs([*pieces, Piece(f"y{joined}", -99.0)])
    assert list(whole(text)) == list(BytePairs(pieces)(text))
