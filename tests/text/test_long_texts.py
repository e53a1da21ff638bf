"""Long texts of a SentencePiece model are encoded in parts, and where a prompt is cut, its end alone: the ids are those of the whole."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from phalanx.parallel.errors import RequestError
from phalanx.runtime.text import Tokenizer, sentencepiece_encoding, sentencepiece_merges, windows
from phalanx.runtime.text.added_tokens import AddedTokens
from phalanx.runtime.text.sentencepiece_merges import BytePairs
from phalanx.runtime.text.sentencepiece_model import Piece

from .sentencepiece_models import RECORD
from .test_sentencepiece import field, load, model

RECORDED = json.loads(RECORD.read_text())["models"]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("recorded", RECORDED, ids=range(len(RECORDED)))
def test_parts_change_no_ids(recorded: Any, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded from the library; parts of one character to seven instead of thousands."""
    for module in (sentencepiece_encoding, sentencepiece_merges, windows):
        monkeypatch.setattr(module, "WINDOW", size)
    tokenizer = load(tmp_path, base64.b64decode(recorded["model"]))
    for text, ids in recorded["ids"].items():
        assert list(tokenizer.encode(text, add_special_tokens=False)) == ids, ascii(text)


@pytest.fixture(scope="module", params=["bytes", "unigrams", "without spaces", *range(len(RECORDED))])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    own = {"bytes": model(), "unigrams": model(f3=1), "without spaces": model() + field(3, field(4, 1))}
    raw = own.get(request.param) or base64.b64decode(RECORDED[request.param]["model"])
    path = tmp_path_factory.mktemp("model")
    extra = {
        "pad_token": {"content": "<pad>", "lstrip": True, "rstrip": True, "single_word": False, "normalized": False}
    }
    (path / "tokenizer_config.json").write_text(json.dumps({**extra, "add_eos_token": True}))
    return load(path, raw)


WORDS = ["hi", "ab", " ", "  ", "é", "日本", "the", " fox", "h", "i", "a", "b", "</s>", " <pad> ", "\u0301x", "ﬁ"]


@settings(max_examples=40, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS), max_size=60), last=st.integers(0, 40), special=st.booleans())
def test_the_last_tokens_are_those_of_the_whole(
    tokenizer: Tokenizer, words: list[str], last: int, special: bool
) -> None:
    text = "".join(words)
    whole = tokenizer.encode(text, add_special_tokens=special)
    assert tokenizer.encode(text, add_special_tokens=special, last=last) == whole[max(0, len(whole) - last) :]


def test_only_the_end_of_a_prompt_that_is_cut_is_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, seen, call = load(tmp_path, model()), [], BytePairs.__call__

    def counted(pairs: BytePairs, text: str) -> Any:
        seen.append(len(text))
        return call(pairs, text)

    monkeypatch.setattr(BytePairs, "__call__", counted)
    assert tokenizer.encode("hi ab " * 50_000 + "hi", last=3) == tokenizer.encode("ab hi")[-3:]
    assert seen[0] < 100


def test_a_text_that_cannot_be_divided_is_refused_beyond_a_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "_MOST_CHARACTERS", 40)
    unigrams, pairs = load(tmp_path, model(f3=1)), BytePairs([Piece("a"), Piece("aa"), Piece("b")])
    assert len(unigrams.encode("ab" * 19))
    assert list(pairs("a" * 40 + "b" * 60))
    with pytest.raises(RequestError, match=r"prompt has 41 characters .* at most 40 can be encoded; .*use token ids"):
        unigrams.encode("ab" * 20)
    with pytest.raises(RequestError, match="prompt has 41 characters"):
        list(pairs("b" + "a" * 41))


FLAGS = ("lstrip", "rstrip", "single_word", "special")
ALPHABET = [*"<>ab|_ \t\n\x1c\u3000é", "<a>", "<a><b>", "a|b", "\u0301", "\u200d", "Ⓐ", "²", "Ⅷ", "٣", "<s>", "ab"]


@pytest.mark.parametrize("spells_special", [False, True])
def test_added_tokens_are_found_as_the_library_finds_them(spells_special: bool) -> None:
    draw = random.Random(f"added {spells_special}")
    for _ in range(30):
        backend = tokenizers.Tokenizer(models.WordLevel({"x": 0}, unk_token="x"))
        contents = ["<a>", "<a><b>", "a|b", "ab", "<s>", "b"]
        flags = [{flag: draw.random() < 0.4 for flag in FLAGS} for _ in contents]
        backend.add_tokens(
            [tokenizers.AddedToken(text, normalized=False, **kept) for text, kept in zip(contents, flags, strict=True)]
        )
        backend.encode_special_tokens = spells_special
        added = AddedTokens(backend)
        for _ in range(30):
            text = "".join(draw.choices(ALPHABET, k=draw.randrange(20)))
            found = [(0 if token_id is None else token_id, start, end) for token_id, start, end in added.split(text)]
            encoding = backend.encode(text)
            expected = [(number, *span) for number, span in zip(encoding.ids, encoding.offsets, strict=True)]
            assert found == expected, ascii(text)
