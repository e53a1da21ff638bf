# SPDX-License-Identifier: Apache-2.0
"""BLOOM (BigScience 2022): ALiBi in place of positions, a norm of the embeddings, biases everywhere."""

from __future__ import annotations

from dataclasses import replace

from phalanx.checkpoints.spec import WeightSpec
from phalanx.runtime.alibi import alibi_slopes
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models import blocks, declarations
from phalanx.runtime.models.base import Family, Pass, feed_forward_shard, head_shard, lm_head, token_table
from phalanx.runtime.models.gpt_neox import head
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.ops import AttentionSpec, Ops, Tensor

__all__ = ["BLOOM"]

PREFIX = "transformer."
TABLE = f"{PREFIX}word_embeddings.weight"


def read_fields(reader: ConfigReader) -> ModelConfig:
    """Read ``config.json`` of a ``BloomForCausalLM``; the activation is not in it."""
    width = reader.either("hidden_size", "n_embed")
    heads = reader.either("n_head", "num_attention_heads")
    reader.refuse_unless("apply_residual_connection_post_layernorm", False)
    reader.ignore("offset_alibi", "slow_but_exact", "unk_token_id", "masked_softmax_fusion", "bias_dropout_fusion")
    return ModelConfig(
        architecture="BloomForCausalLM",
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer(width),
        num_layers=reader.integer(reader.either("n_layer", "num_hidden_layers")),
        num_heads=reader.integer(heads),
        num_kv_heads=reader.integer(heads),
        head_dim=reader.exact_quotient(width, heads),
        intermediate_size=4 * reader.integer(width),
        max_positions=reader.integer("seq_length", 2048),
        norm_eps=reader.number("layer_norm_epsilon", 1e-5),
        activation="gelu_tanh",
        rope=None,
        tie_embeddings=reader.flag("tie_word_embeddings", True),
        **reader.common(),
    )


def attention(config: ModelConfig, layer: int) -> AttentionSpec:
    """ALiBi in every layer."""
    return replace(AttentionSpec.of(config), alibi_slopes=alibi_slopes(config.num_heads))


def embed(ops: Ops[Tensor], config: ModelConfig) -> Tensor:
    """Normed token rows: ``[T, D]``."""
    return ops.layer_norm(ops.embedding("embed"), "embed_norm", config.norm_eps)


def embed_weights(config: ModelConfig) -> list[WeightSpec]:
    """The token table and its norm."""
    norm = declarations.norm("embed_norm", f"{PREFIX}word_embeddings_layernorm", config.hidden_size, bias=True)
    return declarations.also_without(PREFIX, [WeightSpec("embed.weight", (token_table(config, TABLE),)), *norm])


def block(
    ops: Ops[Tensor], config: ModelConfig, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block."""
    name = f"layers.{layer}"
    x, residual = ops.add_layer_norm(x, residual, f"{name}.attention_norm", config.norm_eps)
    x = blocks.attention(ops, name, layer, x, attention(config, layer))
    x, residual = ops.add_layer_norm(x, residual, f"{name}.mlp_norm", config.norm_eps)
    return blocks.mlp(ops, name, x, config.activation), residual


def block_weights(config: ModelConfig, layer: int) -> list[WeightSpec]:
    """Weights of one block; ``query_key_value`` holds q, k and v head by head."""
    d, f = config.hidden_size, config.intermediate_size
    name, source = f"layers.{layer}", f"{PREFIX}h.{layer}"
    columns, rows, heads = feed_forward_shard(config, 0), feed_forward_shard(config, 1), head_shard(config, 1)
    specs = [
        *declarations.norm(f"{name}.attention_norm", f"{source}.input_layernorm", d, bias=True),
        *declarations.fused_qkv(config, f"{name}.qkv", f"{source}.self_attention.query_key_value", bias=True),
        *declarations.row_linear(f"{name}.output", f"{source}.self_attention.dense", (d, d), heads, bias=True),
        *declarations.norm(f"{name}.mlp_norm", f"{source}.post_attention_layernorm", d, bias=True),
        *declarations.column_linear(f"{name}.up", f"{source}.mlp.dense_h_to_4h", (f, d), columns, bias=True),
        *declarations.row_linear(f"{name}.down", f"{source}.mlp.dense_4h_to_h", (d, f), rows, bias=True),
    ]
    return declarations.also_without(PREFIX, specs)


def head_weights(config: ModelConfig) -> list[WeightSpec]:
    """Final norm and LM head."""
    norm = declarations.norm("final_norm", f"{PREFIX}ln_f", config.hidden_size, bias=True)
    return declarations.also_without(PREFIX, [*norm, lm_head(config, TABLE)])


BLOOM = Family(
    architecture="BloomForCausalLM",
    model_type="bloom",
    other_names=("BloomModel",),
    read_fields=read_fields,
    passes={"decode": Pass[ModelConfig](embed, block, head, embed_weights, block_weights, head_weights, attention)},
    ignored_tensors=(r"lm_head\.weight",),  # a copy of the token table, where they are tied
)
