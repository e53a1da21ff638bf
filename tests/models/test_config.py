"""Reading ``config.json``: published spellings are understood, everything else is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from phalanx import LLM, SamplingParams
from phalanx.parallel.errors import CheckpointError, ConfigError
from phalanx.runtime.config import ModelConfig, RopeConfig
from phalanx.runtime.models import find_model
from tests.support.checkpoints import CASES_BY_NAME, write_checkpoint

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "torch_dtype": "bfloat16", "rope_theta": 500000.0,
    "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}  # fmt: skip


def read(**changes: Any) -> ModelConfig:
    raw = {key: value for key, value in {**LLAMA, **changes}.items() if value is not ...}
    return find_model(raw).read_config(raw)


def test_llama_3_1() -> None:
    config = read()
    assert (config.head_dim, config.num_kv_heads, config.dtype) == (128, 8, "bfloat16")
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert config.rope == RopeConfig(500000.0, 128, "llama3", 8.0, 1.0, 4.0, 8192)


def test_rope_parameters_of_transformers_5_mean_the_same() -> None:
    fields = {**LLAMA["rope_scaling"], "rope_theta": 500000.0}
    assert read(rope_scaling=..., rope_theta=..., rope_parameters=fields) == read()


def test_llama_1_defaults() -> None:
    config = read(num_key_value_heads=..., rope_scaling=None, rope_theta=..., torch_dtype="float16", eos_token_id=2)
    assert config.num_kv_heads == 32
    assert config.rope == RopeConfig(10000.0, 128)
    assert config.eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, ["MambaForCausalLM", "supported: LlamaForCausalLM"]),
        ({"architectures": ...}, ["architectures=[]"]),
        ({"hidden_size": ...}, ["hidden_size", "missing"]),
        ({"hidden_size": "4096"}, ["hidden_size='4096'", "whole number"]),
        ({"hidden_size": True}, ["hidden_size=True", "whole number"]),
        ({"vocab_size": 0}, ["vocab_size=0", "below 1"]),
        ({"num_key_value_heads": 5}, ["num_heads=32", "num_kv_heads=5"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps=nan", "finite"]),
        ({"hidden_act": "mish"}, ["hidden_act='mish'", "supported: silu"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_type='dynamic'", "supported: default"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope factor=None", "finite"]),
        ({"torch_dtype": "int8"}, ["dtype='int8'", "bfloat16"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings='yes'"]),
    ],
)
def test_refusals_name_field_value_and_what_is_supported(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        read(**changes)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(("field", "value"), [("scale_attn_by_inverse_layer_idx", True), ("scale_attn_weights", False),
                                              ("add_cross_attention", True)])  # fmt: skip
def test_gpt2_variants_that_change_the_computation_are_refused(field: str, value: bool) -> None:
    raw = {"architectures": ["GPT2LMHeadModel"], "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 9, field: value}
    with pytest.raises(ConfigError, match=field):
        find_model(raw).read_config(raw)


@pytest.mark.parametrize("name", ["llama-one-kv-head-tied", "gpt2-plain", "gemma-one-kv-head"])
def test_a_tied_checkpoint_may_hold_a_copy_of_its_table(name: str, tmp_path: Path) -> None:
    directory = write_checkpoint(CASES_BY_NAME[name], tmp_path)
    tensors = load_file(directory / "model.safetensors")
    table = next(value for key, value in tensors.items() if "embed" in key or "wte" in key)
    save_file({**tensors, "lm_head.weight": table}, directory / "model.safetensors")
    with LLM(directory, engine="numpy") as llm:
        assert len(llm.generate([3, 4], SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids) == 2


def test_an_untied_checkpoint_needs_its_own_head(tmp_path: Path) -> None:
    directory = write_checkpoint(CASES_BY_NAME["llama-plain"], tmp_path)
    tensors = load_file(directory / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        LLM(directory, engine="numpy")
