"""Models of several passes fit the same loop: an encoder, and an encoder-decoder whose layers are one chain."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from phalanx.checkpoints.spec import WeightSpec
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.executors.numpy.ops import CAPABILITIES as NUMPY
from phalanx.runtime.models import blocks, declarations, find_model
from phalanx.runtime.models.base import Family, Pass, feed_forward_shard, head_shard, lm_head, token_table
from phalanx.runtime.models.shapes import Shape, ShapeOps, use_of
from phalanx.runtime.ops import AttentionSpec, Ops, Tensor

CONFIG = ModelConfig("Tiny", 50, 32, 5, 4, 4, 8, 48, 64, 1e-6, "relu", None, True)
NUM_ENCODER_LAYERS = 2
"""Of the encoder-decoder's five layers."""


def encoder_attention(config: ModelConfig, layer: int) -> AttentionSpec:
    return replace(AttentionSpec.of(config), causal=False, cached=False)


def decoder_attention(config: ModelConfig, layer: int) -> AttentionSpec:
    return AttentionSpec.of(config)


def cross_attention(config: ModelConfig, layer: int) -> AttentionSpec:
    return replace(AttentionSpec.of(config), causal=False, keys="encoder")


def embed(ops: Ops[Tensor], config: ModelConfig) -> Tensor:
    return ops.embedding("embed")


def embed_weights(config: ModelConfig) -> list[WeightSpec]:
    return [WeightSpec("embed.weight", (token_table(config, "shared.weight"),))]


def encoder_block(
    ops: Ops[Tensor], config: ModelConfig, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    name = f"layers.{layer}"
    x, residual = ops.add_rms_norm(x, residual, f"{name}.attention_norm", config.norm_eps)
    x = blocks.attention(ops, name, layer, x, encoder_attention(config, layer))
    x, residual = ops.add_rms_norm(x, residual, f"{name}.mlp_norm", config.norm_eps)
    return blocks.mlp(ops, name, x, config.activation), residual


def decoder_block(
    ops: Ops[Tensor], config: ModelConfig, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    name = f"layers.{layer}"
    x, residual = ops.add_rms_norm(x, residual, f"{name}.attention_norm", config.norm_eps)
    x = blocks.attention(ops, name, layer, x, decoder_attention(config, layer))
    x, residual = ops.add_rms_norm(x, residual, f"{name}.cross_norm", config.norm_eps)
    queries = ops.column_linear(x, f"{name}.cross_query")
    x = ops.attention(queries, f"{name}.cross_attention", layer, cross_attention(config, layer))
    x = ops.row_linear(x, f"{name}.cross_output")
    x, residual = ops.add_rms_norm(x, residual, f"{name}.mlp_norm", config.norm_eps)
    return blocks.mlp(ops, name, x, config.activation), residual


def encoder_weights(config: ModelConfig, layer: int) -> list[WeightSpec]:
    d, f, name = config.hidden_size, config.intermediate_size, f"layers.{layer}"
    return [
        *declarations.norm(f"{name}.attention_norm", f"{name}.n1", d),
        *declarations.qkv(config, f"{name}.qkv", (f"{name}.q", f"{name}.k", f"{name}.v")),
        *declarations.row_linear(f"{name}.output", f"{name}.o", (d, d), head_shard(config, 1)),
        *declarations.norm(f"{name}.mlp_norm", f"{name}.n2", d),
        *declarations.column_linear(f"{name}.up", f"{name}.wi", (f, d), feed_forward_shard(config, 0)),
        *declarations.row_linear(f"{name}.down", f"{name}.wo", (d, f), feed_forward_shard(config, 1)),
    ]


def decoder_weights(config: ModelConfig, layer: int) -> list[WeightSpec]:
    d, name = config.hidden_size, f"layers.{layer}"
    return [
        *encoder_weights(config, layer),
        *declarations.norm(f"{name}.cross_norm", f"{name}.n3", d),
        *declarations.column_linear(f"{name}.cross_query", f"{name}.cq", (d, d), head_shard(config, 0)),
        *declarations.row_linear(f"{name}.cross_output", f"{name}.co", (d, d), head_shard(config, 1)),
    ]


def encoder_head(ops: Ops[Tensor], config: ModelConfig, x: Tensor, residual: Tensor | None) -> Tensor:
    return ops.add_rms_norm(x, residual, "encoder_norm", config.norm_eps)[0]


def encoder_head_weights(config: ModelConfig) -> list[WeightSpec]:
    return declarations.norm("encoder_norm", "encoder.norm", config.hidden_size)


def decoder_head(ops: Ops[Tensor], config: ModelConfig, x: Tensor, residual: Tensor | None) -> Tensor:
    return ops.logits(ops.add_rms_norm(x, residual, "final_norm", config.norm_eps)[0], "lm_head")


def decoder_head_weights(config: ModelConfig) -> list[WeightSpec]:
    norm = declarations.norm("final_norm", "decoder.norm", config.hidden_size)
    return [*norm, lm_head(config, "shared.weight")]


ENCODE = Pass[ModelConfig](
    embed, encoder_block, encoder_head, embed_weights, encoder_weights, encoder_head_weights, encoder_attention,
    output="hidden",
)  # fmt: skip
ENCODER_DECODER: Family[Any] = Family(
    architecture="Tiny",
    read_fields=lambda reader: CONFIG,
    passes={
        "encode": replace(ENCODE, layers=lambda config: range(NUM_ENCODER_LAYERS)),
        "decode": Pass[ModelConfig](
            embed, decoder_block, decoder_head, embed_weights, decoder_weights, decoder_head_weights, decoder_attention,
            cross_attention, layers=lambda config: range(NUM_ENCODER_LAYERS, config.num_layers),
        ),
    },
)  # fmt: skip
ENCODER: Family[Any] = Family("Tiny", lambda reader: CONFIG, {"encode": ENCODE})


@pytest.mark.parametrize("family", [ENCODER, ENCODER_DECODER], ids=["encoder", "encoder-decoder"])
def test_all_passes_use_exactly_the_declared_weights(family: Family[Any]) -> None:
    use = use_of(family, CONFIG)
    assert sorted(use.weights) == sorted(spec.name for spec in family.weights(CONFIG))


def test_the_output_of_a_pass_is_hidden_states_or_logits() -> None:
    ops = ShapeOps({spec.name: spec for spec in ENCODER_DECODER.weights(CONFIG)})
    widths = {}
    for name, each in ENCODER_DECODER.passes.items():
        x, residual = each.run(ops, CONFIG, each.layers(CONFIG))
        widths[name] = each.head(ops, CONFIG, x, residual)
    assert widths == {"encode": Shape(32), "decode": Shape(64, "split")}, "the vocabulary of 50 is padded to 64"


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
def test_stages_of_one_chain_hold_every_weight_and_tables_where_a_pass_begins_and_ends(num_stages: int) -> None:
    stages = ENCODER_DECODER.stages(CONFIG, num_stages)
    held = [
        {spec.name for spec in ENCODER_DECODER.weights(CONFIG, layers, stage == 0, stage == num_stages - 1)}
        for stage, layers in enumerate(stages)
    ]
    assert set().union(*held) == {spec.name for spec in ENCODER_DECODER.weights(CONFIG)}
    for names, layers in zip(held, stages, strict=True):
        assert ("embed.weight" in names) == (0 in layers or NUM_ENCODER_LAYERS in layers)
        assert ("encoder_norm.weight" in names) == (NUM_ENCODER_LAYERS - 1 in layers)
        assert ("lm_head.weight" in names) == (CONFIG.num_layers - 1 in layers)


def test_executors_say_which_part_of_such_models_they_lack() -> None:
    with pytest.raises(ConfigError, match=r"it has no decoding pass \(only encode\)"):
        NUMPY.check(ENCODER, CONFIG, "float32")
    with pytest.raises(ConfigError, match=r"attention\.keys=encoder is not supported"):
        NUMPY.check(ENCODER_DECODER, CONFIG, "float32")


def test_stages_are_divided_by_what_their_matrices_weigh_and_the_head_counts() -> None:
    raw = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    }  # fmt: skip
    model = find_model(raw)
    config = model.read_config(raw)
    assert [[len(stage) for stage in model.stages(config, pp)] for pp in (1, 2, 4)] == [[32], [17, 15], [9, 9, 9, 5]]
