"""Reading ``config.json``: published spellings are understood, everything else is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from phalanx import LLM, SamplingParams
from phalanx.parallel.errors import CheckpointError, ConfigError
from phalanx.runtime.config import ModelConfig, RopeConfig
from phalanx.runtime.generation_config import GenerationConfig
from phalanx.runtime.models import MODELS, Model, find_model
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
        ({"architectures": ["MambaForCausalLM"]}, ["MambaForCausalLM", "supported: Llama"]),
        ({"architectures": ..., "model_type": "mamba"}, ["model_type='mamba'", "supported: Llama"]),
        ({"architectures": ...}, ["model_type=None", "architectures"]),
        ({"architectures": 3}, ["architectures=3", "list of names"]),
        ({"architectures": [["LlamaForCausalLM"]]}, ["architectures=", "list of names"]),
        ({"hidden_size": ...}, ["hidden_size", "missing"]),
        ({"hidden_size": "4096"}, ["hidden_size='4096'", "whole number"]),
        ({"hidden_size": True}, ["hidden_size=True", "whole number"]),
        ({"vocab_size": 0}, ["vocab_size=0", "below 1"]),
        ({"num_key_value_heads": 5}, ["num_heads=32", "num_kv_heads=5"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps=nan", "finite"]),
        ({"rms_norm_eps": -1e-5}, ["norm_eps=-1e-05", "outside"]),
        ({"hidden_act": "mish"}, ["hidden_act='mish'", "supported: silu"]),
        ({"num_attention_heads": 0}, ["num_attention_heads=0", "below 1"]),
        ({"num_attention_heads": 10**20}, ["num_attention_heads=1000", "above"]),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, ["hidden_size=4096", "multiple"]),
        ({"head_dim": 0}, ["head_dim=0", "below 1"]),
        ({"hidden_act": ["silu"]}, ["hidden_act=", "supported: silu"]),
        ({"torch_dtype": ["float16"]}, ["torch_dtype=", "bfloat16"]),
        ({"bos_token_id": "1"}, ["bos_token_id='1'", "token id"]),
        ({"torch_dtype": "int8"}, ["torch_dtype='int8'", "bfloat16"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings='yes'"]),
    ],
)
def test_refusals_name_field_value_and_what_is_supported(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        read(**changes)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("eos", [[2, None], [[2]], ["x"], {}, 10**20, 2.5, True, -1, [2, -1], list(range(65))])
def test_end_tokens_that_are_no_token_ids_are_refused(eos: Any) -> None:
    with pytest.raises(ConfigError, match=r"eos_token_id.* in config\.json"):
        read(eos_token_id=eos)
    with pytest.raises(ConfigError, match=r"eos_token_id.* in generation_config\.json"):
        GenerationConfig.read({"eos_token_id": eos})


@pytest.mark.parametrize(("eos", "ids"), [(None, ()), ([], ()), (0, (0,)), ([2, 2, 3], (2, 3)), ([7], (7,))])
def test_end_tokens_may_be_one_several_or_none(eos: Any, ids: tuple[int, ...]) -> None:
    assert read(eos_token_id=eos).eos_token_ids == ids


@pytest.mark.parametrize("spelling", ["bfloat16", "torch.bfloat16"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_may_be_spelt_as_torch_prints_it(key: str, spelling: str) -> None:
    assert read(**{"torch_dtype": ..., key: spelling}).dtype == "bfloat16"


@pytest.mark.parametrize(("spelling", "dtype"), [("half", "float16"), ("torch.float", "float32"), (None, "float32")])
def test_other_names_of_torch_for_a_dtype(spelling: str | None, dtype: str, tmp_path: Path) -> None:
    assert read(torch_dtype=spelling).dtype == dtype
    raw = {**CASES_BY_NAME["llama-plain"].config, "torch_dtype": spelling}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with LLM(tmp_path, engine="numpy", load_format="dummy") as llm:
        assert len(llm.generate([3, 4], SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids) == 2


def test_dtype_takes_precedence_over_torch_dtype() -> None:
    assert read(dtype="float16", torch_dtype="bfloat16").dtype == "float16"


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_family_is_found_by_every_published_name(model: Model) -> None:
    assert model.model_type
    for told in [{key: 1} for key in model.told_by] or [{}]:
        assert find_model({"model_type": model.model_type} | told) is model
        assert find_model({"model_type": model.model_type, "architectures": None} | told) is model
        assert find_model({"model_type": model.model_type, "architectures": []} | told) is model
        for name in (model.architecture, *model.other_names):
            assert find_model({"architectures": [name]} | told) is model


def test_gpt2_with_cross_attention_is_refused() -> None:
    raw = {"architectures": ["GPT2LMHeadModel"], "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 9}
    with pytest.raises(ConfigError, match="add_cross_attention"):
        find_model(raw).read_config({**raw, "add_cross_attention": True})


@pytest.mark.parametrize("name", ["chatglm-groups", "chatglm1-prefix"])
def test_weights_that_a_checkpoints_own_code_quantised_are_refused_with_the_way_out(name: str) -> None:
    raw = CASES_BY_NAME[name].config | {"quantization_bit": 4, "quantization_embeddings": False}
    with pytest.raises(ConfigError, match=r"quantization_bit=4 .* use the checkpoint in float16"):
        find_model(raw).read_config(raw)
    assert find_model(raw).read_config(raw | {"quantization_bit": 0})


def test_stablelm_3b_as_first_published_has_other_names_for_its_fields() -> None:
    usual = CASES_BY_NAME["stablelm-parallel"].config
    new = {"layer_norm_eps": 1e-6, "partial_rotary_factor": 0.5}
    old = {
        "norm_eps": 1e-6,
        "rope_pct": 0.5,
        "num_heads": 4,
        "rotary_scaling_factor": 1.0,
        "model_type": "stablelm_epoch",
    }
    raw = (
        {key: value for key, value in usual.items() if key not in new}
        | old
        | {"architectures": ["StableLMEpochForCausalLM"]}
    )
    assert find_model(raw).read_config(raw) == find_model(usual).read_config(usual | new)


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
