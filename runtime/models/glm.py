# SPDX-License-Identifier: Apache-2.0
"""GLM-4 (GLM team 2024) as transformers stores it: Llama's block, neighbouring channels of half of each head rotated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from phalanx.checkpoints.spec import WeightSpec
from phalanx.runtime.models import declarations, llama
from phalanx.runtime.models.base import Family, Pass, feed_forward_shard, head_shard
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.llama import LlamaConfig

__all__ = ["GLM", "block_weights", "fields"]


def read_fields(reader: ConfigReader) -> LlamaConfig:
    """Read ``config.json`` of a ``GlmForCausalLM``."""
    return LlamaConfig(architecture="GlmForCausalLM", **fields(reader))


def fields(reader: ConfigReader) -> dict[str, Any]:
    """Return what the first and the second GLM-4 read alike."""
    head_dim = reader.integer("head_dim", 128)
    return {
        **llama.decoder_fields(reader, head_dim, max_positions=131072, norm_eps=1.5625e-07, num_kv_heads=2),
        "activation": reader.activation("hidden_act", "silu"),
        "rope": replace(reader.rope(head_dim, partial=0.5), interleaved=True),
        "tie_embeddings": reader.flag("tie_word_embeddings", False),
        "attention_bias": reader.flag("attention_bias", True),
    }


def block_weights(config: LlamaConfig, layer: int) -> list[WeightSpec]:
    """Llama's, with gate and up in one matrix."""
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    name, source = f"layers.{layer}", f"model.layers.{layer}"
    q, k, v, o = (f"{source}.self_attn.{letter}_proj" for letter in "qkvo")
    return [
        *declarations.norm(f"{name}.attention_norm", f"{source}.input_layernorm", d),
        *declarations.qkv(config, f"{name}.qkv", (q, k, v), config.attention_bias),
        *declarations.row_linear(f"{name}.output", o, (d, heads), head_shard(config, 1)),
        *declarations.norm(f"{name}.mlp_norm", f"{source}.post_attention_layernorm", d),
        *declarations.stacked_gate_up(config, f"{name}.gate_up", f"{source}.mlp.gate_up_proj"),
        *declarations.row_linear(f"{name}.down", f"{source}.mlp.down_proj", (d, f), feed_forward_shard(config, 1)),
    ]


GLM = Family(
    architecture="GlmForCausalLM",
    model_type="glm",
    other_names=("GlmModel",),
    read_fields=read_fields,
    passes={
        "decode": Pass[LlamaConfig](
            llama.embed, llama.block, llama.head, llama.embed_weights, block_weights, llama.head_weights,
            llama.attention,
        )
    },
    ignored_tensors=llama.LLAMA.ignored_tensors,
)  # fmt: skip
