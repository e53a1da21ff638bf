"""No value of any key of the JSON files ends in a traceback: it is read, or refused by a line that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phalanx.parallel.errors import CheckpointError, ConfigError
from phalanx.runtime.generation_config import GENERATION_KEYS, GenerationConfig
from phalanx.runtime.models import MODELS, find_model
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.rope_fields import ROPE_FIELD_KEYS
from phalanx.runtime.text import Tokenizer, tokenizer_end_token
from phalanx.runtime.text.tokenizer_keys import HONOURED_KEYS
from tests.support.checkpoints import CASES
from tests.text import tokenizers_for_tests as made

VALUES: list[Any] = [10**400, "\ud800",
    None, True, False, 0, -1, 1, 2.5, 1e300, 10**20, float("nan"), float("inf"), "x", "16", "", [], [1], {}, {"a": 1}, [None],
    ["<x>"], {"content": "<y>"}, {"content": 3}, [{"content": "<z>"}], {"5": {"content": "<q>"}},
]  # fmt: skip
SAMPLES = {case.config["architectures"][0]: case.config for case in reversed(CASES)}
SCALED = {
    "linear": {"factor": 2.0}, "dynamic": {"factor": 2.0}, "default": {}, "yarn": {"factor": 2.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6},
}  # fmt: skip


def refusal(action: Callable[[], object]) -> str:
    """The message of a refusal, which is one line; empty where the value was read. Any other exception fails the test."""
    try:
        action()
    except (ConfigError, CheckpointError) as error:
        return str(error)
    return ""


def check(message: str, key: str) -> None:
    assert "\n" not in message, key
    assert len(message) < 600, key


def read(raw: dict[str, Any], key: str) -> None:
    check(refusal(lambda: find_model(raw).read_config(raw)), key)


@pytest.mark.parametrize("architecture", MODELS)
def test_config(architecture: str) -> None:
    sample = SAMPLES[architecture]
    reader = ConfigReader(sample)
    MODELS[architecture].read_fields(reader)
    for key in sorted({*sample, *reader.read_keys, "quantization_config", "a_key_of_tomorrow"}):
        for value in VALUES:
            read({**sample, key: value}, key)


@pytest.mark.parametrize("kind", ROPE_FIELD_KEYS)
def test_rope_fields(kind: str) -> None:
    sample = SAMPLES["LlamaForCausalLM"]
    for key in sorted({*(key for keys in ROPE_FIELD_KEYS.values() for key in keys), "short_factor"}):
        for value in VALUES:
            read({**sample, "rope_scaling": {"rope_type": kind, **SCALED[kind], key: value}}, key)


def test_generation_config() -> None:
    for key in (*GENERATION_KEYS, "a_key_of_tomorrow"):
        for value in VALUES:
            message = refusal(lambda raw={key: value}: GenerationConfig.read(raw).sampling_defaults())
            assert not message or key in message


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("name", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_tokenizer_files(file: str, name: str, tmp_path: Path) -> None:
    made.byte_fallback().save(str(tmp_path / "tokenizer.json"))
    for key in (*HONOURED_KEYS, "image_token", "a_key_of_tomorrow"):
        for value in VALUES:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
            (tmp_path / file).write_text(json.dumps({"tokenizer_class": name, key: value}))
            check(refusal(lambda: use_tokenizer(tmp_path)), key)


def use_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer.from_directory(path)
    assert tokenizer is not None
    tokenizer.decode(tokenizer.encode("the <s> fox"))
    tokenizer_end_token(path)
