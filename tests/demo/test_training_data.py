# SPDX-License-Identifier: Apache-2.0
"""What the training program feeds and measures: held-out text stays out, baselines are right."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from demo_baselines import ByteNgram, unigram_loss
from demo_chat import CHAT_TEMPLATE, chat_documents
from demo_corpus import Document, is_test, read_corpus
from demo_data import NO_TARGET, encode_documents, evaluation_rows, training_steps
from demo_tokenizer import frequent_characters
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

MODULE = '''"""Shapes of things."""


def area(width, height=1):
    """Return the area of a rectangle.

    >>> area(2, 3)
    6
    """
    return width * height


def _private():
    """Nobody asks for this."""


class Square:
    """A square of one size."""

    def side(self):
        """Return the side."""
        return 1
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small library: some modules, and everything that must not be read."""
    for number in range(200):
        (tmp_path / f"module{number}.py").write_text(f"# {number}\n{MODULE}")
    (tmp_path / "twin.py").write_text(f"# 0\n{MODULE}")
    (tmp_path / "tiny.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9" + b" " * 100)
    (tmp_path / "_sysconfigdata_x.py").write_text(MODULE + "# machine")
    for folder in ("site-packages", "encodings", "__pycache__"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "other.py").write_text(MODULE + folder)
    return tmp_path


def test_corpus_takes_each_text_once_and_leaves_out_what_is_excluded(library: Path) -> None:
    corpus = read_corpus(library)
    paths = [document.path for document in (*corpus.train, *corpus.held_out)]
    assert sorted(paths) == sorted(f"module{number}.py" for number in range(200))


def test_held_out_documents_are_chosen_by_the_hash_of_their_path_alone(library: Path) -> None:
    corpus = read_corpus(library)
    assert corpus.held_out, "one in forty of 200"
    for document in (*corpus.train, *corpus.held_out):
        number = int(hashlib.sha256(document.path.encode()).hexdigest()[:16], 16)
        assert (document in corpus.held_out) == (number % 40 == 0)


def test_corpus_checksum_changes_with_any_text(library: Path) -> None:
    before = read_corpus(library).checksum
    assert read_corpus(library).checksum == before
    (library / "module7.py").write_text("# changed\n" + MODULE)
    assert read_corpus(library).checksum != before


def test_missing_library_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no Python source; give .* --corpus"):
        read_corpus(tmp_path)


def test_test_packages_are_told_from_the_library_by_their_folder() -> None:
    assert is_test("test/test_os.py")
    assert is_test("tkinter/test/support.py")
    assert not is_test("unittest/case.py")


def test_conversations_ask_about_public_names_and_answer_from_their_docstrings() -> None:
    texts = [document.text for document in chat_documents([Document("shapes.py", MODULE)])]
    assert any("shapes.area" in text and "Return the area of a rectangle." in text for text in texts)
    assert any("shapes.Square.side" in text and "Return the side." in text for text in texts)
    assert any("Shapes of things." in text for text in texts)
    assert not any("_private" in text or ">>>" in text for text in texts)


def test_conversations_are_what_the_chat_template_renders() -> None:
    template = ImmutableSandboxedEnvironment().from_string(CHAT_TEMPLATE)
    seen_roles = set()
    for document in chat_documents([Document("shapes.py", MODULE)]):
        turns = document.text.removeprefix("<s>").removesuffix("</s>").split("</s>")
        messages = []
        for turn in turns:
            role, _, content = turn.removeprefix("<|").partition("|>")
            messages.append({"role": role, "content": content})
            seen_roles.add(role)
        rendered = template.render(messages=messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=False)
        assert rendered == document.text
    assert seen_roles == {"system", "user", "assistant"}


def test_alphabet_is_what_occurs_often_and_never_a_choice_among_equals() -> None:
    alphabet = frequent_characters(["é" * 16 + "à" * 15, "ü" * 10, "ü" * 6])
    assert {"é", "ü", "a", " ", "\n", "\t"} < set(alphabet)
    assert "à" not in alphabet
    assert alphabet == sorted(alphabet)


def test_documents_stand_between_begin_and_end_tokens(tokenizer: Tokenizer) -> None:
    (token_ids,) = encode_documents(tokenizer, [Document("a.py", "import os\n")])
    assert (token_ids[0], token_ids[-1]) == (0, 1)
    assert tokenizer.decode(token_ids.tolist()) == "import os\n"


def test_training_windows_reach_every_token_and_some_begin_at_a_document() -> None:
    documents = [np.array([0, *range(10 * number + 2, 10 * number + 9), 1]) for number in range(40)]
    steps = training_steps(documents, rows=8, length=16, rng=np.random.default_rng(0))
    rows = np.concatenate([next(steps) for _ in range(20)])
    assert rows.shape == (160, 17)
    assert set(rows.ravel().tolist()) == set(np.concatenate(documents).tolist())
    assert (rows[:, 0] == 0).sum() >= 40, "two of eight rows begin with <s>"


def test_every_held_out_token_but_the_first_is_a_target_once() -> None:
    documents = [np.arange(100, 100 + size) for size in (2, 8, 9, 10, 25)]
    inputs, targets = evaluation_rows(documents, length=8)
    counted = Counter(targets[targets != NO_TARGET].tolist())
    assert counted == Counter(token for document in documents for token in document[1:].tolist())
    assert ((targets == inputs + 1) | (targets == NO_TARGET)).all()


def test_unigram_loss_is_the_smoothed_entropy() -> None:
    train, held_out = np.array([0, 0, 1]), np.array([0, 2])
    assert unigram_loss(train, held_out, vocab_size=3) == pytest.approx(-(math.log(3 / 6) + math.log(1 / 6)) / 2)


class PlainKneserNey:
    """Interpolated Kneser-Ney over bytes with dictionaries, written from the formula."""

    def __init__(self, documents: list[bytes], order: int) -> None:
        self.order = order
        self.counts: dict[int, Counter[bytes]] = {order: Counter()}
        for document in documents:
            padded = bytes(order - 1) + document
            self.counts[order].update(padded[i : i + order] for i in range(len(document)))
        for length in range(order - 1, 0, -1):
            self.counts[length] = Counter(gram[1:] for gram in self.counts[length + 1])

    def probability(self, history: bytes, byte: int) -> float:
        """P(byte | history), the longest order first."""
        return self._probability(self.order, (bytes(self.order) + history)[-(self.order - 1) :], byte)

    def _probability(self, length: int, history: bytes, byte: int) -> float:
        if length == 0:
            return 1 / 256
        shorter = self._probability(length - 1, history[1:], byte)
        counts = self.counts[length]
        followers = {gram: count for gram, count in counts.items() if gram[:-1] == history}
        if not followers:
            return shorter
        once = sum(count == 1 for count in counts.values())
        twice = sum(count == 2 for count in counts.values())
        discount = once / (once + 2 * twice) if once and twice else 0.5
        seen = max(followers.get(history + bytes([byte]), 0) - discount, 0)
        return (seen + discount * len(followers) * shorter) / sum(followers.values())


TRAINING = [b"abracadabra alakazam", b"hello abra", b"bracket"]


def test_byte_ngram_agrees_with_kneser_ney_written_from_the_formula() -> None:
    model, plain = ByteNgram(TRAINING, order=3), PlainKneserNey(TRAINING, order=3)
    document = b"abra cab zzz hello"
    expected = [plain.probability(document[:place], byte) for place, byte in enumerate(document)]
    np.testing.assert_allclose(model.probabilities(document), expected, rtol=1e-12)
    assert model.bits_per_byte([document]) == pytest.approx(-np.log2(expected).mean())


@pytest.mark.parametrize("history", [b"", b"abra", b"zz", b"hello a"])
def test_byte_ngram_probabilities_sum_to_one(history: bytes) -> None:
    model = ByteNgram(TRAINING, order=5)
    total = sum(float(model.probabilities(history + bytes([byte]))[-1]) for byte in range(256))
    assert total == pytest.approx(1.0, abs=1e-12)


@pytest.mark.torch
def test_trained_network_computes_what_transformers_computes_from_its_files(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from demo_model import Decoder, Shape, round_to_bfloat16, write_checkpoint

    torch.manual_seed(0)
    shape = Shape(num_hidden_layers=2)
    decoder = Decoder(shape, dropout=0.1).eval()
    for parameter in decoder.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    round_to_bfloat16(decoder)
    write_checkpoint(decoder, shape, 0, 1, tmp_path)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    token_ids = torch.randint(shape.vocab_size, (1, 70))
    with torch.no_grad():
        ours = float(decoder(token_ids[:, :-1], token_ids[:, 1:])) / 69
        theirs = float(model(token_ids, labels=token_ids).loss)
    assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.slow
@pytest.mark.torch
def test_training_program_writes_the_files_that_ship(
    library: Path, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    import train_demo

    output = tmp_path / "trained"
    arguments = [
        "--corpus",
        str(library),
        "--tokenizer",
        str(demo / "tokenizer.json"),
        "--output",
        str(output),
    ]
    monkeypatch.setattr("sys.argv", ["train_demo.py", *arguments, "--steps", "2", "--rows", "1", "--eager"])
    train_demo.main()
    assert {file.name for file in output.iterdir()} == {file.name for file in demo.iterdir()}
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((output / name).read_text()) == json.loads((demo / name).read_text())
