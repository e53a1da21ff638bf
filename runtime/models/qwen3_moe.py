# SPDX-License-Identifier: Apache-2.0
"""Qwen 3 MoE (Qwen team 2025): Qwen 3 with experts, none of them shared."""

from __future__ import annotations

from dataclasses import dataclass

from phalanx.checkpoints.spec import WeightSpec
from phalanx.runtime.models import blocks, llama, qwen3
from phalanx.runtime.models.base import Family, Pass
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.qwen2_moe import SparseLayers, expert_weights, sparse_layers
from phalanx.runtime.models.qwen3 import Qwen3Config
from phalanx.runtime.ops import Ops, Tensor

__all__ = ["QWEN3_MOE"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3MoeConfig(Qwen3Config):
    """Qwen 3's dimensions, and the layers that have experts."""

    sparse: SparseLayers


def read_fields(reader: ConfigReader) -> Qwen3MoeConfig:
    """Read ``config.json`` of a ``Qwen3MoeForCausalLM``."""
    head_dim = reader.head_dim()
    reader.ignore("max_window_layers")
    reader.refuse_unless("use_qk_norm", True)  # of Qwen 3 Coder, whose block has norms of heads as all do
    window = reader.nullable("sliding_window", 4096)
    if not reader.flag("use_sliding_window", False):
        window = 0
    fields = llama.decoder_fields(reader, head_dim, max_positions=32768, norm_eps=1e-6)
    return Qwen3MoeConfig(
        architecture="Qwen3MoeForCausalLM",
        **{**fields, "num_kv_heads": reader.integer("num_key_value_heads", 4)},
        sparse=sparse_layers(reader, num_experts=128, top_k=8, expert_size=768),
        activation=reader.activation("hidden_act", "silu"),
        rope=reader.rope(head_dim),
        tie_embeddings=reader.flag("tie_word_embeddings", False),
        attention_bias=reader.flag("attention_bias", False),
        windows=(window,) * reader.integer("num_hidden_layers"),
    )


def block(
    ops: Ops[Tensor], config: Qwen3MoeConfig, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block."""
    if layer not in config.sparse.layers:
        return qwen3.block(ops, config, layer, x, residual)
    x, residual = blocks.attended(ops, config, layer, x, residual, qwen3.attention(config, layer))
    return ops.all_reduce(ops.experts(x, f"layers.{layer}.experts", config.sparse.spec)), residual


def block_weights(config: Qwen3MoeConfig, layer: int) -> list[WeightSpec]:
    """Weights of one block."""
    if layer not in config.sparse.layers:
        return qwen3.block_weights(config, layer)
    return [
        *llama.attention_weights(config, layer),
        *qwen3.head_norms(config, layer),
        *expert_weights(config, config.sparse, layer),
    ]


QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    other_names=("Qwen3MoeModel",),
    read_fields=read_fields,
    passes={
        "decode": Pass[Qwen3MoeConfig](
            llama.embed, block, llama.head, llama.embed_weights, block_weights, llama.head_weights, qwen3.attention
        )
    },
    ignored_tensors=llama.LLAMA.ignored_tensors,
)
