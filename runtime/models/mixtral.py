# SPDX-License-Identifier: Apache-2.0
"""Mixtral (Jiang et al. 2024): Mistral with a mixture of experts as feed-forward part."""

from __future__ import annotations

from dataclasses import dataclass

from phalanx.checkpoints.spec import WeightSpec
from phalanx.runtime.models import blocks, declarations, llama
from phalanx.runtime.models.base import Family, Pass
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.mistral import MistralConfig, attention
from phalanx.runtime.ops import ExpertsSpec, Ops, Tensor

__all__ = ["MIXTRAL"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtralConfig(MistralConfig):
    """Experts of each layer, and how many of them a token takes."""

    num_experts: int
    top_k: int


def read_fields(reader: ConfigReader) -> MixtralConfig:
    """Read ``config.json`` of a ``MixtralForCausalLM``."""
    head_dim, window = reader.head_dim(), reader.integer("sliding_window", 0, minimum=0)
    return MixtralConfig(
        architecture="MixtralForCausalLM",
        **llama.decoder_fields(reader, head_dim, max_positions=131072, norm_eps=1e-5, num_kv_heads=8),
        activation=reader.activation("hidden_act", "silu"),
        rope=reader.rope(head_dim, theta=1e6),
        tie_embeddings=reader.flag("tie_word_embeddings", False),
        windows=(window,) * reader.integer("num_hidden_layers"),
        num_experts=reader.integer("num_local_experts", 8),
        top_k=reader.integer("num_experts_per_tok", 2),
    )


def block(
    ops: Ops[Tensor], config: MixtralConfig, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block."""
    experts = ExpertsSpec(config.num_experts, config.top_k, config.activation)
    x, residual = blocks.attended(ops, config, layer, x, residual, attention(config, layer))
    return ops.all_reduce(ops.experts(x, f"layers.{layer}.experts", experts)), residual


def block_weights(config: MixtralConfig, layer: int) -> list[WeightSpec]:
    """Llama's attention, and the experts: ``w1`` is the gate, ``w3`` up, ``w2`` down.

    llm-compressor 0.14 calls them as Qwen does, and transformers 5 the mixture ``mlp``, which rules of quantisers may name.
    """
    first, *others = (
        declarations.ExpertNames(f"{mixture}.gate", f"{mixture}.experts", matrices)
        for mixture in (f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp")
        for matrices in (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"))
    )
    return [
        *llama.attention_weights(config, layer),
        *declarations.experts(config, f"layers.{layer}.experts", *first, config.num_experts, tuple(others)),
    ]


MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    other_names=("MixtralModel",),
    read_fields=read_fields,
    passes={
        "decode": Pass[MixtralConfig](
            llama.embed, block, llama.head, llama.embed_weights, block_weights, llama.head_weights, attention
        )
    },
    ignored_tensors=llama.LLAMA.ignored_tensors,
)
