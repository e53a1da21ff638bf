"""One stub server for all tests that only ask it things; the others start their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from .servers import Server, stub_server

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' and loop.first %}"
    "{{ raise_exception('the first turn must not be the assistant\\'s') }}{% endif %}"
    "[{{ message.role }}]{{ message.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with one token per byte (id = byte's place in the alphabet) and an end token, and a chat template."""
    directory = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: 20 + i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<|begin|>", special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"chat_template": TEMPLATE, "eos_token": "<|end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def begin_directory(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer, but encoding puts a special token in front."""
    directory = tmp_path_factory.mktemp("begin")
    tokenizer = Tokenizer.from_file(str(model_directory / "tokenizer.json"))
    begin = tokenizer.token_to_id("<|begin|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="session")
def server(model_directory: Path) -> Iterator[Server]:
    """A server with names, limits small enough to reach, and no key."""
    settings = {"model_names": ["stub", "org/stub"], "max_body_bytes": 100_000, "max_body_chunks": 50}
    with stub_server(model_directory, settings) as running:
        yield running


@pytest.fixture(scope="session")
def token_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose checkpoint has no tokenizer."""
    with stub_server(tmp_path_factory.mktemp("no_tokenizer"), {"model_names": ["stub"]}) as running:
        yield running
