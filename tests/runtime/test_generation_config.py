"""``generation_config.json`` is one typed value, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.generation_config import GENERATION_KEYS, GenerationConfig

PUBLISHED = {
    "Llama 3.1": ({"bos_token_id": 128000, "do_sample": True, "eos_token_id": [128001, 128008, 128009], "temperature": 0.6,
                   "top_p": 0.9, "transformers_version": "4.42.3"}, {"temperature": 0.6, "top_p": 0.9}),
    "Qwen 2.5": ({"bos_token_id": 151643, "pad_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643],
                  "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "transformers_version": "4.37.0"},
                 {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}),
    "GPT-2": ({"_from_model_config": True, "bos_token_id": 50256, "eos_token_id": 50256, "transformers_version": "4.26.0"}, {}),
    "Gemma 2": ({"_from_model_config": True, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 107],
                 "pad_token_id": 0, "transformers_version": "4.42.0"}, {}),
    "Llama 2": ({"_from_model_config": True, "bos_token_id": 1, "do_sample": True, "eos_token_id": 2, "pad_token_id": 0,
                 "temperature": 0.6, "max_length": 4096, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_read(name: str) -> None:
    raw, defaults = PUBLISHED[name]
    assert GenerationConfig.read(raw).sampling_defaults() == defaults


def test_an_empty_file_sets_nothing() -> None:
    assert GenerationConfig.read({}) == GenerationConfig()
    assert GenerationConfig().sampling_defaults() == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -0.1), ("temperature", 2.5), ("temperature", "hot"), ("temperature", True), ("temperature", float("nan")),
        ("top_k", 1.5), ("top_k", -2), ("top_k", True), ("top_k", 2**31), ("top_p", 1.5), ("top_p", [0.9]), ("min_p", -1),
        ("repetition_penalty", "1"), ("repetition_penalty", -1.0), ("max_new_tokens", 0), ("max_new_tokens", 2.0),
        ("bos_token_id", "1"), ("bos_token_id", [1, 2]),
    ],
)  # fmt: skip
def test_a_malformed_value_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{key}=.* in generation_config\.json"):
        GenerationConfig.read({key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_beams", 4), ("no_repeat_ngram_size", 3), ("typical_p", 0.9), ("penalty_alpha", 0.6), ("min_new_tokens", 5),
        ("suppress_tokens", [1]), ("bad_words_ids", [[1]]), ("forced_eos_token_id", 2), ("guidance_scale", 1.5),
        ("stop_strings", ["x"]), ("watermarking_config", {"ngram": 1}), ("presence_penalty", 0.5), ("a_key_of_tomorrow", 3),
    ],
)  # fmt: skip
def test_a_key_that_would_change_answers_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{key}=.* in generation_config\.json .* remove the key"):
        GenerationConfig.read({key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_beams", 1), ("no_repeat_ngram_size", 0), ("typical_p", 1.0), ("guidance_scale", None), ("bad_words_ids", []),
     ("num_beam_groups", 1), ("diversity_penalty", 0.0), ("min_length", 0), ("a_key_of_tomorrow", False)],
)  # fmt: skip
def test_a_value_that_asks_for_nothing_passes(key: str, value: Any) -> None:
    assert GenerationConfig.read({key: value}) == GenerationConfig()


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_every_key_that_transformers_saves_is_known() -> None:
    transformers = pytest.importorskip("transformers")
    assert vars(transformers.GenerationConfig()).keys() <= GENERATION_KEYS.keys()
