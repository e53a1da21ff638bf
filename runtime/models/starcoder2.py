# SPDX-License-Identifier: Apache-2.0
"""StarCoder2 (Lozhkov et al. 2024): LayerNorm, rotary positions, grouped-query heads, a window, biases, no gate."""

from __future__ import annotations

from dataclasses import dataclass, replace

from phalanx.checkpoints.spec import WeightSpec
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models import blocks, declarations, llama
from phalanx.runtime.models.base import Family, Pass, feed_forward_shard, head_shard, lm_head
from phalanx.runtime.models.gpt_neox import head
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.ops import AttentionSpec, Ops, Tensor

__all__ = ["STARCODER2"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Starcoder2Config(ModelConfig):
    """Whether matrices have biases, and the positions that a token sees, itself included (0 = all before it)."""

    has_bias: bool
    window: int


def read_fields(reader: ConfigReader) -> Starcoder2Config:
    """Read ``config.json`` of a ``Starcoder2ForCausalLM``."""
    head_dim = reader.head_dim()
    reader.refuse_unless("norm_type", "layer_norm")
    reader.refuse_unless("mlp_type", "default")
    reader.ignore(
        "layer_norm_epsilon", "activation_function"
    )  # StarCoder's names, which published files keep and the class does not read
    return Starcoder2Config(
        architecture="Starcoder2ForCausalLM",
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("hidden_size"),
        num_layers=reader.integer("num_hidden_layers"),
        num_heads=reader.integer("num_attention_heads"),
        num_kv_heads=reader.integer("num_key_value_heads", 2),
        head_dim=head_dim,
        intermediate_size=reader.integer("intermediate_size"),
        max_positions=reader.integer("max_position_embeddings", 4096),
        norm_eps=reader.number("norm_epsilon", 1e-5),
        activation=reader.activation("hidden_act", "gelu_pytorch_tanh"),
        rope=reader.rope(head_dim),
        tie_embeddings=reader.flag("tie_word_embeddings", True),
        has_bias=reader.flag("use_bias", True),
        window=reader.integer("sliding_window", 0, minimum=0),
        **reader.common(),
    )


def attention(config: Starcoder2Config, layer: int) -> AttentionSpec:
    """The same window in every layer."""
    return replace(AttentionSpec.of(config), window=config.window)


def block(
    ops: Ops[Tensor], config: Starcoder2Config, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block."""
    name = f"layers.{layer}"
    x, residual = ops.add_layer_norm(x, residual, f"{name}.attention_norm", config.norm_eps)
    x = blocks.attention(ops, name, layer, x, attention(config, layer))
    x, residual = ops.add_layer_norm(x, residual, f"{name}.mlp_norm", config.norm_eps)
    return blocks.mlp(ops, name, x, config.activation), residual


def block_weights(config: Starcoder2Config, layer: int) -> list[WeightSpec]:
    """Weights of one block."""
    d, f, heads, bias = (
        config.hidden_size,
        config.intermediate_size,
        config.num_heads * config.head_dim,
        config.has_bias,
    )
    name, source = f"layers.{layer}", f"model.layers.{layer}"
    q, k, v, o = (f"{source}.self_attn.{letter}_proj" for letter in "qkvo")
    columns, rows = feed_forward_shard(config, 0), feed_forward_shard(config, 1)
    return [
        *declarations.norm(f"{name}.attention_norm", f"{source}.input_layernorm", d, bias=True),
        *declarations.qkv(config, f"{name}.qkv", (q, k, v), bias),
        *declarations.row_linear(f"{name}.output", o, (d, heads), head_shard(config, 1), bias),
        *declarations.norm(f"{name}.mlp_norm", f"{source}.post_attention_layernorm", d, bias=True),
        *declarations.column_linear(f"{name}.up", f"{source}.mlp.c_fc", (f, d), columns, bias),
        *declarations.row_linear(f"{name}.down", f"{source}.mlp.c_proj", (d, f), rows, bias),
    ]


def head_weights(config: ModelConfig) -> list[WeightSpec]:
    """Final norm and LM head."""
    norm = declarations.norm("final_norm", "model.norm", config.hidden_size, bias=True)
    return [*norm, lm_head(config, llama.TABLE)]


STARCODER2 = Family(
    architecture="Starcoder2ForCausalLM",
    model_type="starcoder2",
    other_names=("Starcoder2Model",),
    read_fields=read_fields,
    passes={
        "decode": Pass[Starcoder2Config](
            llama.embed, block, head, llama.embed_weights, block_weights, head_weights, attention
        )
    },
    ignored_tensors=llama.LLAMA.ignored_tensors,
)
