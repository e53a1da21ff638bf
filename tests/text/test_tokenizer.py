"""What a checkpoint directory gives for a tokenizer, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phalanx.parallel.errors import CheckpointError, RequestError
from phalanx.runtime.text import Tokenizer

from . import tokenizers_for_tests as made


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made.byte_level().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def load(directory: Path, **config: object) -> Tokenizer:
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer is not None
    return tokenizer


def test_a_directory_without_tokenizer_has_none(tmp_path: Path) -> None:
    assert Tokenizer.from_directory(tmp_path) is None


def test_text_survives_a_round_trip(directory: Path) -> None:
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer is not None
    assert tokenizer.chat_template is None
    text = "def f():\n\treturn '🙂'  # ok\x00"
    token_ids = tokenizer.encode(text)
    assert tokenizer.decode(token_ids) == text
    assert max(token_ids) < tokenizer.vocab_size == made.byte_level().get_vocab_size()


def test_special_tokens_are_shown_only_when_asked_for(directory: Path) -> None:
    tokenizer = load(directory)
    token_ids = tokenizer.encode("a<|end|>b")
    assert tokenizer.decode(token_ids) == "ab"
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == "a<|end|>b"


def test_special_tokens_are_named_plainly_or_as_objects(directory: Path) -> None:
    tokenizer = load(directory, bos_token={"content": "<s>", "lstrip": False}, eos_token="</s>", pad_token=None)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_chat_template_from_the_configuration(directory: Path) -> None:
    template = load(directory, chat_template="{{ bos_token }}!", bos_token="<s>").chat_template
    assert template is not None
    assert template.render([]) == "<s>!"


def test_the_default_of_several_named_templates_is_used(directory: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    template = load(directory, chat_template=named).chat_template
    assert template is not None
    assert template.render([]) == "plain"


def test_template_file_comes_before_the_configuration(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("from the file")
    template = load(directory, chat_template="from the configuration").chat_template
    assert template is not None
    assert template.render([]) == "from the file"


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"model": {}}'])
def test_a_broken_tokenizer_file_is_named(directory: Path, broken: str) -> None:
    (directory / "tokenizer.json").write_text(broken)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(directory)


@pytest.mark.parametrize(
    "config", ["{", "[]", '{"eos_token": 3}', '{"added_tokens_decoder": {"x": 1}}', '{"a_key_of_tomorrow": 3}']
)
def test_a_broken_configuration_is_named(directory: Path, config: str) -> None:
    (directory / "tokenizer_config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        Tokenizer.from_directory(directory)


def test_too_many_characters_are_refused_before_encoding(directory: Path) -> None:
    tokenizer = load(directory)
    with pytest.raises(RequestError, match="has 6 characters; at most 5"):
        tokenizer.encode("abcdef", max_characters=5)
    assert len(tokenizer.encode("abcde", max_characters=5)) > 0


def test_a_lone_surrogate_is_a_request_error(directory: Path) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        load(directory).encode("a\ud800")


def test_truncation_and_padding_of_the_file_do_not_apply(directory: Path) -> None:
    backend = made.byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=64)
    backend.save(str(directory / "tokenizer.json"))
    tokenizer = load(directory)
    assert tokenizer.decode(tokenizer.encode("The quick brown fox")) == "The quick brown fox"
