"""Rotary fields of ``config.json``: every spelling means what it means in transformers 5, everything else is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.executors.sizes import longest_requested
from phalanx.runtime.models import find_model
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.rope_fields import ROPE_FIELD_KEYS
from phalanx.runtime.rope import inverse_frequencies

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "original_max_position_embeddings": 16, "short_factor": [1.0] * 7 + [1.5],
    "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 9.0, 10.0, 12.0],
}  # fmt: skip


def read(**changes: Any) -> ModelConfig:
    raw = {**LLAMA, **changes}
    return find_model(raw).read_config(raw)


def yarn(**changes: Any) -> Any:
    return read(rope_scaling={**YARN, **changes}).rope


def mscale(multiplier: float) -> float:
    return 0.1 * multiplier * math.log(16.0) + 1.0


@pytest.mark.parametrize(
    ("fields", "factor"),
    [
        ({}, mscale(1.0)),
        ({"mscale": 0.707}, mscale(1.0)),
        ({"mscale": 1.0, "mscale_all_dim": 0.0}, mscale(1.0)),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 0.707, "mscale_all_dim": 1.0}, mscale(0.707) / mscale(1.0)),
        ({"mscale": 0.707, "mscale_all_dim": 1.0, "attention_factor": 1.25}, 1.25),
        ({"attention_factor": None}, mscale(1.0)),
        ({"factor": 1.0}, 1.0),
    ],
)
def test_yarn_attention_factor_follows_mscale(fields: dict[str, Any], factor: float) -> None:
    """transformers#47435, mobius#548, imp#880."""
    assert yarn(**fields).attention_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(("fast", "slow"), [(32.0, 1.0), (4.0, 0.5), (2.0, 2.0)])
def test_yarn_frequencies_are_those_of_the_paper(truncate: bool, fast: float, slow: float) -> None:
    """Peng et al. 2023, equations 17 to 22, with and without rounding the band to whole dimensions."""

    def dimension(rotations: float) -> float:
        return 16 * math.log(16 / (rotations * 2 * math.pi)) / (2 * math.log(10000.0))

    low, high = dimension(fast), dimension(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 15)
    expected = []
    for index in range(8):
        frequency = 10000.0 ** (-2 * index / 16)
        ramp = min(max((index - low) / ((high - low) or 0.001), 0.0), 1.0)
        expected.append(frequency * (1 - ramp) + frequency / 16.0 * ramp)
    rope = yarn(truncate=truncate, beta_fast=fast, beta_slow=slow)
    np.testing.assert_allclose(inverse_frequencies(rope), expected, rtol=1e-12)


def test_yarn_without_factor_takes_the_ratio_of_the_lengths() -> None:
    assert yarn(factor=None).factor == 4.0


@pytest.mark.parametrize("fields", [YARN, LLAMA3, {"type": "linear", "factor": 2.0}, {"rope_type": "default"}])
def test_the_two_spellings_mean_the_same(fields: dict[str, Any]) -> None:
    new = read(rope_parameters={**fields, "rope_theta": 5000.0})
    assert read(rope_scaling=fields, rope_theta=5000.0) == new
    assert read(rope_scaling=fields, rope_parameters={"rope_type": "default"}, rope_theta=5000.0) == new


def test_base_inside_the_rope_parameters_takes_precedence() -> None:
    config = read(rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, rope_theta=7000.0)
    assert config.rope is not None
    assert config.rope.theta == 5000.0


@pytest.mark.parametrize("parameters", [{"rope_theta": 5000.0}, {"partial_rotary_factor": 0.5}])
def test_rope_parameters_that_rope_scaling_would_drop_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"rope_scaling .* takes precedence over rope_parameters"):
        read(rope_scaling=YARN, rope_parameters=parameters)


@pytest.mark.parametrize("fields", [YARN, LLAMA3])
def test_trained_length_at_the_top_level_takes_precedence(fields: dict[str, Any]) -> None:
    rope = read(rope_scaling=fields, original_max_position_embeddings=24).rope
    assert rope is not None
    assert rope.original_max_positions == 24


def test_trained_length_that_phi_3_leaves_out_is_its_own_default_whatever_the_rope_parameters_say() -> None:
    phi3 = {**LLAMA, "architectures": ["Phi3ForCausalLM"], "max_position_embeddings": 131072}
    scaling = {key: value for key, value in LONGROPE.items() if key != "original_max_position_embeddings"}
    default = read(**phi3, rope_scaling=scaling).rope
    assert default is not None
    assert default == read(**phi3, rope_scaling=scaling, original_max_position_embeddings=4096).rope
    assert default.original_max_positions == 4096
    with pytest.raises(ConfigError, match=r"original_max_position_embeddings=16 .* move it to the top level"):
        read(**phi3, rope_scaling=LONGROPE)


def test_type_is_the_older_name_of_rope_type() -> None:
    assert yarn(rope_type=None, type="yarn") == yarn(type="linear") == yarn()


def test_dynamic_scaling_is_the_default_within_the_trained_length() -> None:
    config = read(rope_scaling={"type": "dynamic", "factor": 4.0})
    assert config == read()
    assert config.scaled_positions == 64


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": "linear"}, ["rope_scaling='linear'", "JSON object"]),
        ({"rope_scaling": [1]}, ["rope_scaling=", "JSON object"]),
        ({"rope_parameters": 7}, ["rope_parameters=", "JSON object"]),
        ({"rope_scaling": {"type": "linear"}}, ["factor=None", "finite"]),
        ({"rope_scaling": {"type": "dynamic"}}, ["factor=None", "finite"]),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, ["factor=0", "above 0"]),
        ({"rope_scaling": {"type": "linear", "factor": 1e300}}, ["factor=1e+300", "exceeds"]),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, ["factor='2'", "finite"]),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, ["short_factor=None", "list of 8 numbers"]),
        ({"rope_scaling": {**LONGROPE, "long_factor": [2.0] * 3}}, ["long_factor=[2.0, 2.0, 2.0]", "list of 8 numbers"]),
        ({"rope_scaling": {**LONGROPE, "long_factor": [2.0, 0] * 4}}, ["long_factor=0", "above 0"]),
        ({"rope_scaling": {"type": "ntk-by-parts", "factor": 2.0}}, ["rope_type='ntk-by-parts'", "supported: default"]),
        ({"rope_scaling": {"type": ["yarn"]}}, ["rope_type=", "supported: default"]),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 0}}, ["original_max_position_embeddings=0"]),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": [64]}}, ["original_max_position_embeddings=[64]"]),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, ["rope_theta=1.0", "above 1"]),
        ({"rope_theta": 0}, ["rope_theta=0"]),
        ({"rope_theta": "10000"}, ["rope_theta='10000'"]),
        ({"rope_scaling": {**YARN, "beta_fast": 0.5}}, ["beta_fast=0.5", "beta_slow=1"]),
        ({"rope_scaling": {**YARN, "truncate": 0.5}}, ["truncate=0.5"]),
        ({"rope_scaling": {**YARN, "attention_factor": -1.0}}, ["attention_factor=-1.0"]),
        ({"rope_scaling": {**YARN, "mscale": "1"}}, ["mscale='1'"]),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, ["high_freq_factor=1", "low_freq_factor=1"]),
        ({"rope_scaling": {**LLAMA3, "mscale": 2.0}}, ["mscale=2.0", "rope_type='llama3'", "known: factor"]),
        ({"rope_scaling": {**YARN, "extrapolation_factor": 0.5}}, ["extrapolation_factor=0.5"]),
        ({"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, ["mrope_section=[16, 24, 24]"]),
        ({"head_dim": 17}, ["head_dim=17", "even"]),
        ({"partial_rotary_factor": 2.0}, ["partial_rotary_factor=2"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5", "whole heads"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor=0.5", "whole heads"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
         ["rope_parameters", "full_attention, sliding_attention"]),
    ],
)  # fmt: skip
def test_refusals_name_field_and_value(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        read(**changes)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    "fields", [{**YARN, "finetuned": True}, {**YARN, "attn_factor": 1.0}, {**LLAMA3, "mscale": None}]
)
def test_rope_fields_that_change_nothing_pass(fields: dict[str, Any]) -> None:
    assert read(rope_scaling=fields) is not None


def test_equal_parameters_for_all_kinds_of_layer_are_one_set() -> None:
    same = {"rope_type": "default", "rope_theta": 5000.0}
    assert read(rope_parameters={"full_attention": same, "sliding_attention": same}) == read(rope_theta=5000.0)


def test_a_family_may_ask_for_one_kind_of_layer_and_for_a_part_of_the_head() -> None:
    reader = ConfigReader({"rope_parameters": {
        "full_attention": {"rope_theta": 1e6, "partial_rotary_factor": 0.25}, "sliding_attention": {"rope_theta": 1e4},
    }})  # fmt: skip
    wide = reader.rope(64, partial=1.0, layer_type="full_attention")
    assert (wide.theta, wide.rotary_dim) == (1e6, 16)
    assert reader.rope(64, partial=0.5, layer_type="sliding_attention").rotary_dim == 32
    older = ConfigReader({"rotary_pct": 0.25, "rotary_emb_base": 5000})
    rope = older.rope(80, partial=1.0, theta_key="rotary_emb_base", partial_key="rotary_pct")
    assert (rope.theta, rope.rotary_dim) == (5000.0, 20)


@pytest.mark.parametrize(
    ("scaling", "usual", "most"),
    [
        (None, 64, 64),
        ({"type": "linear", "factor": 4.0}, 64, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64, 64),
        ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}, 64, 128),
        ({"type": "dynamic", "factor": 4.0}, 64, 64),
        (LLAMA3, 64, 64),
    ],
)
def test_length_limit_follows_rope_scaling(scaling: Any, usual: int, most: int) -> None:
    config = read(rope_scaling=scaling)
    assert (config.default_positions, config.scaled_positions) == (usual, most)
    assert longest_requested(config, None) == usual
    assert longest_requested(config, most) == most
    with pytest.raises(ConfigError, match=f"--max-model-len={most + 1} is beyond the {most} positions"):
        longest_requested(config, most + 1)


def test_yarns_attn_factor_multiplies_the_papers_factor_as_in_vllm() -> None:
    """DeepSeek-R1-0528-Qwen3-8B takes the paper's factor back by it."""
    yarn = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "attn_factor": 0.8782488562869419,
    }
    assert read(rope_scaling=yarn).rope.attention_factor == pytest.approx(1.0)
    assert read(rope_scaling={**yarn, "attention_factor": 2.0}).rope.attention_factor == pytest.approx(
        2 * 0.8782488562869419
    )


def test_the_known_keys_of_each_rope_type_are_those_of_transformers() -> None:
    assert ROPE_FIELD_KEYS["yarn"] >= {
        "mscale",
        "mscale_all_dim",
        "truncate",
        "attention_factor",
        "beta_fast",
        "beta_slow",
    }


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "fields",
    [
        YARN, LLAMA3, {"rope_type": "linear", "factor": 3.0}, {**YARN, "truncate": False},
        {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0}, {**YARN, "beta_fast": 8, "beta_slow": 2},
        {**YARN, "attention_factor": 0.8}, LONGROPE, {**LONGROPE, "attention_factor": 1.3},
    ],
)  # fmt: skip
def test_frequencies_equal_transformers(fields: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    raw = {**LLAMA, "rope_parameters": {**fields, "rope_theta": 10000.0}}
    config = transformers.LlamaConfig(**{key: value for key, value in raw.items() if key != "architectures"})
    frequencies, factor = ROPE_INIT_FUNCTIONS[fields["rope_type"]](config, "cpu")
    rope = find_model(raw).read_config(raw).rope
    assert rope is not None
    np.testing.assert_allclose(inverse_frequencies(rope), frequencies.numpy(), rtol=1e-5)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize("spelling", ["longrope", "su", "yarn"])
def test_longrope_takes_the_short_factors_up_to_the_trained_length_and_the_long_ones_beyond(spelling: str) -> None:
    """Ding et al. 2024. llama.cpp#24823, #8995, #24875: the table chosen by another length than the sequences'."""
    config = read(
        rope_scaling={**{key: value for key, value in LONGROPE.items() if key != "rope_type"}, "type": spelling}
    )
    assert config.rope is not None
    plain = 10000.0 ** (-np.arange(8) / 8)
    for longest, factors in ((15, "short"), (16, "short"), (17, "long"), (64, "long")):
        np.testing.assert_allclose(inverse_frequencies(config.rope, longest), plain / LONGROPE[f"{factors}_factor"])
    assert config.rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(16)))
    assert (config.default_positions, config.scaled_positions) == (16, 64)
