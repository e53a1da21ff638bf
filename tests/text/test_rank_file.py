"""Rank files of tiktoken, and what only the code of a tokenizer's class says: the ids that these tokenizers give."""

from __future__ import annotations

import base64
import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from phalanx.parallel.errors import CheckpointError
from phalanx.runtime.text import Tokenizer, tokenizer_end_token
from phalanx.runtime.text.special_tokens import tokenizer_class

from .test_sentencepiece import PIECES, model

ALPHABET = [
    *"abcdefghij klmno   'slt\n\t\r.,!?0123456789ABÉéñ日本語🦙\u0301\u200d\ufeff\x00\x07\x1f\x7f\x85\xa0\u2003\u2028\u3000ﬁ²½①▁Ａ한글ǅʰ",
    " the", " fox", "  ", "\n\n", "'ll", "'S", "\r\n",
]  # fmt: skip
WORDS = "the quick brown fox jumps over 'll 12 345 émigré 日本 語 \n\n  two"
TEXTS = (
    "the lazy fox",
    "  two  spaces ",
    "I'll go'S\tx\r\n\r\n y",
    "12345 678",
    "émigré e\u0301",
    "日本語 🦙",
    "",
    "a",
    "!!?\n ok",
)


def learnt_ranks() -> dict[bytes, int]:
    """Single bytes, then the commonest pair of neighbours again and again, as tiktoken's training does."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = [[bytes([byte]) for byte in f" {word}".encode()] for word in WORDS.split(" ")] * 2
    while len(ranks) < 330:
        counts: dict[bytes, int] = {}
        for word in words:
            for left, right in zip(word, word[1:], strict=False):
                counts[left + right] = counts.get(left + right, 0) + 1
        best = max(counts, key=lambda pair: (counts[pair], pair), default=b"")
        if not best:
            break
        ranks[best] = len(ranks)
        words = [merged(word, best) for word in words]
    return ranks


def merged(parts: list[bytes], token: bytes) -> list[bytes]:
    out: list[bytes] = []
    for part in parts:
        if out and out[-1] + part == token:
            out[-1] = token
        else:
            out.append(part)
    return out


RANKS = learnt_ranks()


def by_definition(word: bytes) -> list[int]:
    """Of the neighbours that make a token, the ones of lowest rank are merged, the first of several, until none do."""
    parts = [bytes([byte]) for byte in word]
    while True:
        pairs = [(RANKS[parts[i] + parts[i + 1]], i) for i in range(len(parts) - 1) if parts[i] + parts[i + 1] in RANKS]
        if not pairs:
            return [RANKS[part] for part in parts]
        place = min(pairs)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def load(path: Path, name: str, config: dict[str, Any], raw: bytes | None = None) -> Tokenizer:
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in RANKS.items())
    (path / name).write_bytes(b"".join(lines) if raw is None else raw)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_directory(path)
    assert tokenizer is not None
    return tokenizer


GLM4_TOKENS = ("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>")
GLM4 = {
    "tokenizer_class": "ChatGLM4Tokenizer", "eos_token": "<|endoftext|>",
    "added_tokens_decoder": {
        str(len(RANKS) + index): {"content": text, "special": True} for index, text in enumerate(GLM4_TOKENS)
    },
}  # fmt: skip
QWEN = {"tokenizer_class": "QWenTokenizer"}


def test_words_are_merged_by_rank(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, "qwen.tiktoken", QWEN)
    for word in ("brown", " brown", "!?!", "日本語", "xjumpsx"):
        assert list(tokenizer.encode(word)) == by_definition(word.encode()), word


@pytest.mark.parametrize(("name", "config"), [("qwen.tiktoken", QWEN), ("tokenizer.model", GLM4)])
def test_ids_and_texts_equal_the_library(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    tiktoken: Any = pytest.importorskip("tiktoken")
    split = tokenizer_class(config["tokenizer_class"]).split
    assert split is not None
    names = GLM4_TOKENS if config is GLM4 else ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    special = {text: number for number, text in enumerate(names, len(RANKS))}
    library = tiktoken.Encoding("x", pat_str=split.pattern, mergeable_ranks=RANKS, special_tokens=special)
    tokenizer, draw = load(tmp_path, name, config), random.Random(name)
    for text in (*TEXTS, *("".join(draw.choices([*ALPHABET, *names], k=draw.randrange(25))) for _ in range(500))):
        composed = unicodedata.normalize("NFC", text) if split.normalizes else text
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert list(ids) == library.encode(composed, allowed_special="all"), text
        assert tokenizer.decode(ids, skip_special_tokens=False) == composed
        spoken = [token_id for token_id in ids if token_id < len(RANKS)]
        stream = tokenizer.detokenizer()
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids) == library.decode(spoken)


def test_qwens_texts_are_composed_first_and_its_special_tokens_follow_the_ranks(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, "qwen.tiktoken", QWEN)
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")
    assert tokenizer.encode("<|im_start|>") == (len(RANKS) + 1,)
    assert tokenizer.encode("<|extra_204|>") == (len(RANKS) + 207,)
    assert tokenizer.vocab_size == len(RANKS) + 208
    assert tokenizer.decode(tokenizer.encode("<|endoftext|>a")) == "a"


def test_glm4_splits_digits_by_three_and_begins_every_text(tmp_path: Path) -> None:
    tokenizer, first = load(tmp_path, "tokenizer.model", GLM4), len(RANKS)
    assert tokenizer.encode("1") == (first + 2, first + 4, RANKS[b"1"])
    assert tokenizer.encode("<|user|>", add_special_tokens=False) == (first + 7,)
    assert tokenizer_end_token(tmp_path) == first


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"IQ== 0\nIg==\n", "line 2 of .* is no token in base64 with its rank"),
        (b"IQ== 0\n!!== 1\n", "line 2 of"),
        (b"IQ== 0\nIg== 2\n", "has 2 tokens whose ranks are not 0 to 1"),
    ],
)
def test_damaged_rank_files_are_refused(raw: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, "qwen.tiktoken", QWEN, raw)


def test_ranks_of_a_class_whose_pattern_nobody_knows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"known for QWenTokenizer and ChatGLM4Tokenizer alone; add a tokenizer\.json"
    ):
        load(tmp_path, "tokenizer.model", {"tokenizer_class": "Phi3SmallTokenizer"})


def test_chatglm_begins_every_text_and_leaves_words_whole_that_contain_its_tokens(tmp_path: Path) -> None:
    tokenizer, first = load(tmp_path, "tokenizer.model", {"tokenizer_class": "ChatGLMTokenizer"}, model()), len(PIECES)
    assert tokenizer.encode("hi")[:2] == (first + 1, first + 3)
    assert tokenizer.encode("[gMASK]sop", add_special_tokens=False) == (first + 1, first + 3)
    assert first + 3 not in tokenizer.encode("a sophist", add_special_tokens=False)
    assert tokenizer.encode("<|user|>", add_special_tokens=False) != (first + 6,), "a piece of the model comes first"
