# SPDX-License-Identifier: Apache-2.0
"""Phi 1, 1.5 and 2 (Gunasekar et al. 2023): one norm for parallel halves, part of each head rotated, biases everywhere."""

from __future__ import annotations

from dataclasses import dataclass, replace

from phalanx.checkpoints.spec import Part, WeightSpec
from phalanx.runtime.attention import HeadNorm
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models import declarations, llama
from phalanx.runtime.models.base import Family, Pass, feed_forward_shard, head_shard, lm_head, vocabulary_shard
from phalanx.runtime.models.gpt_neox import head
from phalanx.runtime.models.gptj import parallel_halves
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.ops import AttentionSpec, Ops, Tensor

__all__ = ["PHI"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhiConfig(ModelConfig):
    """``has_head_norms``: query and key heads are normed (``qk_layernorm``), which no published file asks for."""

    has_head_norms: bool


def read_fields(reader: ConfigReader) -> PhiConfig:
    """Read ``config.json`` of a ``PhiForCausalLM``."""
    head_dim, num_heads = reader.head_dim(), reader.integer("num_attention_heads")
    return PhiConfig(
        architecture="PhiForCausalLM",
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("hidden_size"),
        num_layers=reader.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=reader.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        intermediate_size=reader.integer("intermediate_size"),
        max_positions=reader.integer("max_position_embeddings", 2048),
        norm_eps=reader.number("layer_norm_eps", 1e-5),
        activation=reader.activation("hidden_act", "gelu_new"),
        rope=reader.rope(head_dim, partial=0.5),
        tie_embeddings=reader.flag("tie_word_embeddings", False),
        has_head_norms=reader.flag("qk_layernorm", False),
        **reader.common(),
    )


def attention(config: PhiConfig, layer: int) -> AttentionSpec:
    """The same in every layer."""
    norm = HeadNorm(config.norm_eps, kind="layer", has_bias=True) if config.has_head_norms else None
    return replace(AttentionSpec.of(config), head_norm=norm)


def block(ops: Ops[Tensor], config: PhiConfig, layer: int, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """One decoder block."""
    return parallel_halves(ops, config, layer, x, residual, attention(config, layer))


def block_weights(config: PhiConfig, layer: int) -> list[WeightSpec]:
    """Weights of one block."""
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    name, source = f"layers.{layer}", f"model.layers.{layer}"
    q, k, v = (f"{source}.self_attn.{letter}_proj" for letter in "qkv")
    columns, rows, inputs = feed_forward_shard(config, 0), feed_forward_shard(config, 1), head_shard(config, 1)
    return [
        *declarations.norm(f"{name}.norm", f"{source}.input_layernorm", d, bias=True),
        *declarations.qkv(config, f"{name}.qkv", (q, k, v), bias=True),
        *(_head_norms(config, layer) if config.has_head_norms else ()),
        *declarations.row_linear(f"{name}.output", f"{source}.self_attn.dense", (d, heads), inputs, bias=True),
        *declarations.column_linear(f"{name}.up", f"{source}.mlp.fc1", (f, d), columns, bias=True),
        *declarations.row_linear(f"{name}.down", f"{source}.mlp.fc2", (d, f), rows, bias=True),
    ]


def _head_norms(config: PhiConfig, layer: int) -> list[WeightSpec]:
    name, source = f"layers.{layer}.attention", f"model.layers.{layer}.self_attn"
    return [
        spec
        for ours, theirs in (("query_norm", "q_layernorm"), ("key_norm", "k_layernorm"))
        for spec in declarations.norm(f"{name}.{ours}", f"{source}.{theirs}", config.head_dim, bias=True)
    ]


def head_weights(config: ModelConfig) -> list[WeightSpec]:
    """Final norm, LM head and its bias."""
    bias = WeightSpec("lm_head.bias", (Part("lm_head.bias", (config.vocab_size,), vocabulary_shard()),))
    norm = declarations.norm("final_norm", "model.final_layernorm", config.hidden_size, bias=True)
    return [*norm, lm_head(config, llama.TABLE), bias]


PHI = Family(
    architecture="PhiForCausalLM",
    model_type="phi",
    other_names=("PhiModel",),
    read_fields=read_fields,
    passes={
        "decode": Pass[PhiConfig](llama.embed, block, head, llama.embed_weights, block_weights, head_weights, attention)
    },
    ignored_tensors=llama.LLAMA.ignored_tensors,
)
