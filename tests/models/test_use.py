"""What a model's functions use, found by running them on shapes alone, is what its family declares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.models import Model, find_model
from phalanx.runtime.models.shapes import Feature, use_of
from phalanx.runtime.ops import AttentionSpec
from tests.support.checkpoints import CASES, CASES_BY_NAME, CheckpointCase

LLAMA = CASES_BY_NAME["llama-plain"]


def with_block(case: CheckpointCase, block: Any, **changes: Any) -> tuple[Model, Any]:
    """The case's family with another block."""
    model = find_model(case.config)
    passes = {"decode": replace(model.decode, block=block, **changes)}
    return replace(model, passes=passes), model.read_config(case.config)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_used_weights_are_the_declared_ones(case: CheckpointCase) -> None:
    model = find_model(case.config)
    config = model.read_config(case.config)
    assert sorted(use_of(model, config).weights) == sorted(spec.name for spec in model.weights(config))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_layer_attends_as_declared(case: CheckpointCase) -> None:
    model = find_model(case.config)
    config = model.read_config(case.config)
    declared = {
        f"layers.{layer}.attention": model.decode.attention(config, layer) for layer in range(config.num_layers)
    }
    assert use_of(model, config).attention == declared


def test_features_are_operations_and_whatever_is_not_at_its_default() -> None:
    model = find_model(CASES_BY_NAME["gemma-one-kv-head"].config)
    config = model.read_config(CASES_BY_NAME["gemma-one-kv-head"].config)
    features = use_of(model, config).features
    assert Feature("rms_norm") in features
    assert Feature("rms_norm.weight_offset", 1.0) in features
    assert Feature("gated_activation.kind", "gelu_tanh") in features
    assert Feature("attention.head_dim", 24) in features
    assert Feature("attention.rope.rotary_dim", 24) in features
    assert not any(feature.name == "attention.window" for feature in features)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_family_passes_the_check_at_any_split_of_its_experts(case: CheckpointCase) -> None:
    model = find_model(case.config)
    config = model.read_config(case.config)
    assert use_of(model, replace(config, expert_parallel=True)).features == use_of(model, config).features


def test_attention_other_than_declared_is_noticed() -> None:
    def attention(config: Any, layer: int) -> AttentionSpec:
        return replace(AttentionSpec.of(config), window=8)

    model = find_model(LLAMA.config)
    with pytest.raises(
        ConfigError,
        match=r"block of layer 0: layers\.0\.attention is attention with window=0, which the family does not declare",
    ):
        use_of(*with_block(LLAMA, model.decode.block, attention=attention))
