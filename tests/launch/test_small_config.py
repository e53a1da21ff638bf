"""Configurations made small for ``launch.check --against-transformers`` are of the same model: every published one is read, with the same features."""

from __future__ import annotations

from typing import Any

import pytest

from phalanx.launch.against_transformers import compare
from phalanx.launch.small_config import smaller
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.models import find_model
from phalanx.runtime.models.shapes import use_of
from tests.models.test_config_keys import PUBLISHED


def read(raw: dict[str, Any]) -> Any:
    return find_model(raw).read_config(raw)


def kinds(raw: dict[str, Any]) -> set[str]:
    """Names of what a model uses."""
    model = find_model(raw)
    return {feature.name for feature in use_of(model, model.read_config(raw)).features}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_stay_the_same_model_at_a_small_size(name: str) -> None:
    raw = PUBLISHED[name]
    try:
        whole = read(raw)
    except ConfigError:
        pytest.skip("this one is refused")
    sizes = {
        "num_attention_heads": whole.num_heads,
        "num_key_value_heads": whole.num_kv_heads,
        "hidden_size": whole.hidden_size,
    }
    full = {**raw, **({"text_config": {**sizes, **raw["text_config"]}} if "text_config" in raw else {})}
    small = read(smaller(full))
    assert kinds(smaller(full)) == kinds(raw)
    assert (small.num_layers, small.head_dim) == (min(whole.num_layers, 6), whole.head_dim)
    assert small.num_heads <= 8
    assert small.num_kv_heads == min(whole.num_kv_heads, 4 if whole.num_kv_heads == whole.num_heads else 2)
    assert small.num_heads // small.num_kv_heads == min(whole.num_heads // whole.num_kv_heads, 4)
    assert small.hidden_size == whole.hidden_size * small.num_heads // whole.num_heads


def test_sizes_under_unknown_names_and_heads_that_do_not_divide_stay() -> None:
    assert smaller({"rows": 4096, "hidden_size": 4096}) == {"rows": 4096, "hidden_size": 4096}
    odd = {"num_attention_heads": 5, "num_key_value_heads": 2, "hidden_size": 40}
    assert smaller(odd) == odd


def test_token_ids_are_within_the_small_vocabulary_however_many_layers_there_are() -> None:
    raw = {"num_hidden_layers": 2, "vocab_size": 128256, "eos_token_id": [128001, 128008], "pad_token_id": 128004}
    small = smaller(raw)
    assert small["vocab_size"] > max(*small["eos_token_id"], small["pad_token_id"])
    assert len(smaller({**raw, "num_hidden_layers": 8, "eos_token_id": [*range(128000, 128008)]})["eos_token_id"]) == 8
    assert smaller({"num_hidden_layers": 8, "layer_types": [*"abcdefgh"]})["layer_types"] == [*"abcdef"]


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_what_transformers_refuses_is_one_sentence_and_its_question_about_code_is_not_asked() -> None:
    pytest.importorskip("transformers")
    mpt = {**PUBLISHED["MPT 7B"], "auto_map": {"AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM"}}
    attention = {**mpt["attn_config"], "clip_qkv": 6}  # a whole number, which its class does not take
    with pytest.raises(ConfigError, match=r"transformers cannot load such a model \(.*clip_qkv"):
        compare({**mpt, "attn_config": attention}, None)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_a_published_configuration_is_compared_at_a_small_size() -> None:
    pytest.importorskip("transformers")
    assert compare(PUBLISHED["Command R7B"], None).is_equal


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ["Phi3ForCausalLM", "SmolLM3ForCausalLM"])
def test_a_padding_token_that_only_the_class_names_does_not_count(architecture: str) -> None:
    pytest.importorskip("transformers")
    llama = {
        "vocab_size": 128256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": [128001, 128008],
    }  # fmt: skip
    model_type = architecture.removesuffix("ForCausalLM").lower()
    assert compare({**llama, "architectures": [architecture], "model_type": model_type}, None).is_equal
