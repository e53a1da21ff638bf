# SPDX-License-Identifier: Apache-2.0
"""Nemotron 3 and 4, Minitron (Parmar et al. 2024): LayerNorm with weights stored as w - 1, a squared ReLU without a gate."""

from __future__ import annotations

from phalanx.checkpoints.spec import WeightSpec
from phalanx.runtime.models import blocks, declarations, llama
from phalanx.runtime.models.base import Family, Pass, feed_forward_shard, head_shard, lm_head
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.llama import LlamaConfig
from phalanx.runtime.ops import Ops, Tensor

__all__ = ["NEMOTRON"]


def read_fields(reader: ConfigReader) -> LlamaConfig:
    """Read ``config.json`` of a ``NemotronForCausalLM``."""
    head_dim, partial = reader.head_dim(), reader.either("partial_rotary_factor", "rope_percent")
    return LlamaConfig(
        architecture="NemotronForCausalLM",
        **llama.decoder_fields(reader, head_dim, max_positions=4096, norm_eps=1e-5, eps_key="norm_eps"),
        activation=reader.activation("hidden_act", "relu2"),
        rope=reader.rope(head_dim, partial=0.5, partial_key=partial),
        tie_embeddings=reader.flag("tie_word_embeddings", False),
        attention_bias=reader.flag("attention_bias", False),
        mlp_bias=reader.flag("mlp_bias", False),
    )


def block(
    ops: Ops[Tensor], config: LlamaConfig, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block."""
    name, eps = f"layers.{layer}", config.norm_eps
    x, residual = ops.add_layer_norm(x, residual, f"{name}.attention_norm", eps, weight_offset=1.0)
    x = blocks.attention(ops, name, layer, x, llama.attention(config, layer))
    x, residual = ops.add_layer_norm(x, residual, f"{name}.mlp_norm", eps, weight_offset=1.0)
    return blocks.mlp(ops, name, x, config.activation), residual


def block_weights(config: LlamaConfig, layer: int) -> list[WeightSpec]:
    """Weights of one block."""
    d, f, heads, bias = config.hidden_size, config.intermediate_size, config.num_heads, config.attention_bias
    name, source = f"layers.{layer}", f"model.layers.{layer}"
    q, k, v, o = (f"{source}.self_attn.{letter}_proj" for letter in "qkvo")
    columns, rows = feed_forward_shard(config, 0), feed_forward_shard(config, 1)
    return [
        *declarations.norm(f"{name}.attention_norm", f"{source}.input_layernorm", d, bias=True),
        *declarations.qkv(config, f"{name}.qkv", (q, k, v), bias),
        *declarations.row_linear(f"{name}.output", o, (d, heads * config.head_dim), head_shard(config, 1), bias),
        *declarations.norm(f"{name}.mlp_norm", f"{source}.post_attention_layernorm", d, bias=True),
        *declarations.column_linear(f"{name}.up", f"{source}.mlp.up_proj", (f, d), columns, config.mlp_bias),
        *declarations.row_linear(f"{name}.down", f"{source}.mlp.down_proj", (d, f), rows, config.mlp_bias),
    ]


def head(ops: Ops[Tensor], config: LlamaConfig, x: Tensor, residual: Tensor | None) -> Tensor:
    """Logits of the rows that need them: ``[B, V local]``."""
    x, _ = ops.add_layer_norm(x, residual, "final_norm", config.norm_eps, weight_offset=1.0)
    return ops.logits(x, "lm_head")


def head_weights(config: LlamaConfig) -> list[WeightSpec]:
    """Final norm and LM head."""
    norm = declarations.norm("final_norm", "model.norm", config.hidden_size, bias=True)
    return [*norm, lm_head(config, llama.TABLE)]


NEMOTRON = Family(
    architecture="NemotronForCausalLM",
    model_type="nemotron",
    other_names=("NemotronModel",),
    read_fields=read_fields,
    passes={
        "decode": Pass[LlamaConfig](
            llama.embed, block, head, llama.embed_weights, block_weights, head_weights, llama.attention
        )
    },
    ignored_tensors=llama.LLAMA.ignored_tensors,
)
