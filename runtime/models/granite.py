# SPDX-License-Identifier: Apache-2.0
"""Granite 3 (IBM 2024): Llama's block with factors on embeddings, scores, both halves and logits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from phalanx.runtime.models import blocks, llama
from phalanx.runtime.models.base import Family, Pass
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.llama import LlamaConfig
from phalanx.runtime.ops import AttentionSpec, Ops, Tensor

__all__ = ["GRANITE"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraniteConfig(LlamaConfig):
    """Factors on embeddings, on what each half adds, and on scores; what logits are divided by."""

    embedding_multiplier: float
    residual_multiplier: float
    attention_multiplier: float
    logits_scaling: float


def read_fields(reader: ConfigReader) -> GraniteConfig:
    """Read ``config.json`` of a ``GraniteForCausalLM``."""
    head_dim = reader.head_dim()
    return GraniteConfig(
        architecture="GraniteForCausalLM",
        **llama.decoder_fields(reader, head_dim, max_positions=2048, norm_eps=1e-6),
        embedding_multiplier=reader.number("embedding_multiplier", 1.0),
        residual_multiplier=reader.number("residual_multiplier", 1.0),
        attention_multiplier=reader.number("attention_multiplier", 1.0),
        logits_scaling=reader.number("logits_scaling", 1.0),
        activation=reader.activation("hidden_act", "silu"),
        rope=reader.rope(head_dim),
        tie_embeddings=reader.flag("tie_word_embeddings", False),
        attention_bias=reader.flag("attention_bias", False),
        mlp_bias=reader.flag("mlp_bias", False),
    )


def attention(config: GraniteConfig, layer: int) -> AttentionSpec:
    """The same in every layer; its scale does not depend on the head's size."""
    return replace(AttentionSpec.of(config), scale=config.attention_multiplier)


def embed(ops: Ops[Tensor], config: GraniteConfig) -> Tensor:
    """Scaled token rows: ``[T, D]``."""
    return ops.embedding("embed", scale=config.embedding_multiplier)


def block(
    ops: Ops[Tensor], config: GraniteConfig, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block."""
    name, eps, factor = f"layers.{layer}", config.norm_eps, config.residual_multiplier
    x, residual = ops.add_rms_norm(x, residual, f"{name}.attention_norm", eps)
    x = ops.scale(blocks.attention(ops, name, layer, x, attention(config, layer)), factor)
    x, residual = ops.add_rms_norm(x, residual, f"{name}.mlp_norm", eps)
    return ops.scale(blocks.gated_mlp(ops, name, x, config.activation), factor), residual


def head(ops: Ops[Tensor], config: GraniteConfig, x: Tensor, residual: Tensor | None) -> Tensor:
    """Scaled logits of the rows that need them: ``[B, V local]``."""
    x, _ = ops.add_rms_norm(x, residual, "final_norm", config.norm_eps)
    return ops.logits(ops.scale(x, 1 / config.logits_scaling), "lm_head")


GRANITE = Family(
    architecture="GraniteForCausalLM",
    model_type="granite",
    other_names=("GraniteModel",),
    read_fields=read_fields,
    passes={
        "decode": Pass[GraniteConfig](
            embed, block, head, llama.embed_weights, llama.block_weights, llama.head_weights, attention
        )
    },
    ignored_tensors=llama.LLAMA.ignored_tensors,
)
