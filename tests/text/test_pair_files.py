"""``vocab.json`` and ``merges.txt`` without ``tokenizer.json``: the ids and texts that transformers' classes give."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, trainers

from phalanx.parallel.errors import CheckpointError
from phalanx.runtime.text import Tokenizer, tokenizer_end_token

CORPUS = [
    "the quick brown fox jumps over the lazy dog 12345 émigré 日本 語 \n\n  two",
    "I'll go y'all we've 99 x\ty",
] * 3
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
NAMED = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
OPT = {
    "tokenizer_class": "GPT2Tokenizer",
    **NAMED,
    "pad_token": "<pad>",
    "add_prefix_space": False,
    "add_bos_token": True,
}
SIZE = 331
"""Tokens of the vocabulary."""
TURNS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN2 = {
    "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None,
    "added_tokens_decoder": {
        str(number): {"content": text, "special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
        for number, text in enumerate(TURNS, SIZE)
    },
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "OPT": ("opt", OPT),
    "GPT-2": ("gpt2", {"tokenizer_class": "GPT2Tokenizer", **NAMED}),
    "GPT-2 without a config": ("gpt2", {}),
    "Phi with a space before each text": ("phi", {"tokenizer_class": "CodeGenTokenizer", **NAMED, "add_prefix_space": True}),
    "Qwen 2": ("qwen2", QWEN2),
    "Qwen 3 without a config": ("qwen3", {}),
}  # fmt: skip
ALPHABET = [
    *"abcdefghij klmno  'slt\n\t\r.,!?0123456789ABÉéñ日本語🦙\u0301\u200d\ufeff\x00\x07\x1f\x7f\xa0\u2028\u3000ﬁ²", "'ll", " the",
    " fox", *SPECIAL, *TURNS,
]  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary() -> Library:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False),
    )
    assert library.get_vocab_size() == SIZE
    return library


def write(path: Path, vocabulary: Library, kind: str) -> Path:
    model_type, config = KINDS[kind]
    vocabulary.model.save(str(path))
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    if config:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def load(path: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_directory(path)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_equal_transformers(kind: str, vocabulary: Library, tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(write(tmp_path, vocabulary, kind))
    tokenizer, draw = load(tmp_path), random.Random(kind)
    for _ in range(300):
        text = "".join(draw.choices(ALPHABET, k=draw.randrange(30)))
        ids = tokenizer.encode(text)
        assert list(ids) == reference.encode(text), text
        for skips in (True, False):
            decoded = tokenizer.decode(ids, skip_special_tokens=skips)
            assert decoded == reference.decode(ids, skip_special_tokens=skips, clean_up_tokenization_spaces=False)
            stream = tokenizer.detokenizer(skip_special_tokens=skips)
            assert "".join(map(stream.push, ids)) + stream.flush() == decoded


def test_the_class_says_how_texts_are_split_and_begin(vocabulary: Library, tmp_path: Path) -> None:
    numbers = {text: vocabulary.token_to_id(text) for text in ("the", "Ġfox", "1", "Ġ12345", "Ġ", "</s>")}
    for name in ("opt", "qwen", "phi"):
        (tmp_path / name).mkdir()
    opt = load(write(tmp_path / "opt", vocabulary, "OPT"))
    assert opt.encode("the fox 12345") == tuple(numbers[text] for text in ("</s>", "the", "Ġfox", "Ġ12345"))
    assert tokenizer_end_token(tmp_path / "opt") == numbers["</s>"]
    qwen = load(write(tmp_path / "qwen", vocabulary, "Qwen 2"))
    assert qwen.encode("the 1<|im_end|>") == (numbers["the"], numbers["Ġ"], numbers["1"], SIZE + 2)
    assert qwen.encode("e\u0301") == qwen.encode("é")
    assert tokenizer_end_token(tmp_path / "qwen") == SIZE + 2
    phi = load(write(tmp_path / "phi", vocabulary, "Phi with a space before each text"))
    assert phi.decode(phi.encode("fox")) == " fox"


def test_the_end_token_of_a_class_follows_a_vocabulary_that_lacks_it(vocabulary: Library, tmp_path: Path) -> None:
    assert tokenizer_end_token(write(tmp_path, vocabulary, "GPT-2 without a config")) == SIZE


@pytest.mark.parametrize(
    ("name", "config", "end", "added"),
    [
        ("GPT2Tokenizer", {"extra_special_tokens": ["<tool>"]}, SIZE, "<|endoftext|> <tool>"),
        ("GPT2Tokenizer", {"eos_token": "<|im_end|>"}, SIZE + 1, "<|endoftext|> <|im_end|>"),
        ("Qwen2Tokenizer", {"additional_special_tokens": ["<tool>"]}, SIZE, "<|endoftext|> <tool>"),
        ("Qwen2Tokenizer", {"eos_token": "<|im_end|>"}, SIZE, "<|im_end|> <|endoftext|>"),
        ("CodeGenTokenizer", {"mask_token": "<M>", "image_token": "<I>", "sep_token": "<S>"}, SIZE, "<|endoftext|> <S> <M> <I>"),
        (
            "GPT2Tokenizer",
            {"added_tokens_decoder": {str(SIZE): {"content": "<|im_start|>", "special": True}}, "eos_token": "<|im_end|>"},
            SIZE + 2,
            "<|im_start|> <|endoftext|> <|im_end|>",
        ),
    ],
)  # fmt: skip
def test_tokens_that_the_vocabulary_lacks_get_ids_in_the_order_of_their_names(
    name: str, config: dict[str, Any], end: int, added: str, vocabulary: Library, tmp_path: Path
) -> None:
    """Expected: ``get_added_vocab`` and ``eos_token_id`` of ``AutoTokenizer`` in transformers 5.24.0 on these files."""
    write(tmp_path, vocabulary, "GPT-2 without a config")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, **config}))
    texts = added.split()
    assert load(tmp_path).encode("".join(texts)) == tuple(range(SIZE, SIZE + len(texts)))
    assert tokenizer_end_token(tmp_path) == end


@pytest.mark.parametrize(("name", "kept"), [("GPT2Tokenizer", "ab"), ("Qwen2Tokenizer", "a  b")])
def test_the_class_says_whether_special_tokens_take_blanks(
    name: str, kept: str, vocabulary: Library, tmp_path: Path
) -> None:
    """Qwen2Tokenizer of transformers 5.24.0 adds its special tokens once more, by their texts alone."""
    write(tmp_path, vocabulary, "GPT-2 without a config")
    tool = {"content": "<tool>", "lstrip": True, "rstrip": True, "normalized": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, "eos_token": tool}))
    tokenizer = load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a <tool> b")) == kept


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("vocab.json", '{"a": "x"}', "'a' has the id 'x' in vocab.json; ids are whole numbers"),
        ("vocab.json", '{"a": -1}', "'a' has the id -1"),
        ("vocab.json", '{"a": 1, "b": 1}', "vocab.json gives two tokens the same id"),
        ("vocab.json", "[]", "holds no JSON object"),
        ("merges.txt", "#version: 0.2\nq q\n", "line 2 of merges.txt is no pair of tokens of vocab.json"),
        ("merges.txt", "th\n", "line 1 of merges.txt"),
        ("merges.txt", "t h e\n", "line 1 of merges.txt"),
    ],
)
def test_damaged_files_are_refused(name: str, text: str, message: str, vocabulary: Library, tmp_path: Path) -> None:
    (write(tmp_path, vocabulary, "GPT-2") / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_merges_of_a_class_that_splits_in_a_way_nobody_knows_are_refused(vocabulary: Library, tmp_path: Path) -> None:
    write(tmp_path, vocabulary, "GPT-2")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    with pytest.raises(CheckpointError, match="known for GPT2Tokenizer, CodeGenTokenizer and Qwen2Tokenizer alone"):
        load(tmp_path)


def test_half_of_the_pair_is_no_tokenizer(vocabulary: Library, tmp_path: Path) -> None:
    (write(tmp_path, vocabulary, "GPT-2") / "merges.txt").unlink()
    assert Tokenizer.from_directory(tmp_path) is None
