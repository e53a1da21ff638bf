# SPDX-License-Identifier: Apache-2.0
"""Qwen 3 (Qwen team 2025): Llama's block with a norm of every query and key head."""

from __future__ import annotations

from dataclasses import dataclass, replace

from phalanx.checkpoints.spec import WeightSpec
from phalanx.runtime.attention import HeadNorm
from phalanx.runtime.models import blocks, declarations, llama
from phalanx.runtime.models.base import Family, Pass
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.llama import LlamaConfig
from phalanx.runtime.models.qwen2 import layer_windows
from phalanx.runtime.ops import AttentionSpec, Ops, Tensor

__all__ = ["QWEN3", "Qwen3Config", "attention", "block", "block_weights", "head_norms"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3Config(LlamaConfig):
    """``windows``: of each layer, 0 = none."""

    windows: tuple[int, ...]


def read_fields(reader: ConfigReader) -> Qwen3Config:
    """Read ``config.json`` of a ``Qwen3ForCausalLM``."""
    head_dim = reader.integer("head_dim", 128)
    return Qwen3Config(
        architecture="Qwen3ForCausalLM",
        **llama.decoder_fields(reader, head_dim, max_positions=32768, norm_eps=1e-6),
        activation=reader.activation("hidden_act", "silu"),
        rope=reader.rope(head_dim),
        tie_embeddings=reader.flag("tie_word_embeddings", False),
        attention_bias=reader.flag("attention_bias", False),
        windows=layer_windows(reader),
    )


def attention(config: Qwen3Config, layer: int) -> AttentionSpec:
    """Normalised heads; a window in the layers that have one."""
    return replace(AttentionSpec.of(config), window=config.windows[layer], head_norm=HeadNorm(config.norm_eps))


def block(
    ops: Ops[Tensor], config: Qwen3Config, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block."""
    return blocks.pre_norm(ops, config, layer, x, residual, attention(config, layer))


def block_weights(config: Qwen3Config, layer: int) -> list[WeightSpec]:
    """Llama's, and the norms of heads."""
    return [*llama.block_weights(config, layer), *head_norms(config, layer)]


def head_norms(config: Qwen3Config, layer: int) -> list[WeightSpec]:
    """Norms of query and key heads, the same for all heads."""
    name, source = f"layers.{layer}.attention", f"model.layers.{layer}.self_attn"
    return [
        *declarations.norm(f"{name}.query_norm", f"{source}.q_norm", config.head_dim),
        *declarations.norm(f"{name}.key_norm", f"{source}.k_norm", config.head_dim),
    ]


QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    other_names=("Qwen3Model",),
    read_fields=read_fields,
    passes={
        "decode": Pass[Qwen3Config](
            llama.embed, block, llama.head, llama.embed_weights, block_weights, llama.head_weights, attention
        )
    },
    ignored_tensors=llama.LLAMA.ignored_tensors,
)
