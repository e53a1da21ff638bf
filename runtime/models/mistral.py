# SPDX-License-Identifier: Apache-2.0
"""Mistral (Jiang et al. 2023): Llama's block; in version 0.1 each token sees a window of the tokens before it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from phalanx.runtime.models import blocks, llama
from phalanx.runtime.models.base import Family, Pass
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.llama import LlamaConfig
from phalanx.runtime.ops import AttentionSpec, Ops, Tensor

__all__ = ["MISTRAL", "MistralConfig", "attention", "block"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MistralConfig(LlamaConfig):
    """``windows``: of each layer, the positions that a token sees, itself included; 0 = all before it."""

    windows: tuple[int, ...]


def read_fields(reader: ConfigReader) -> MistralConfig:
    """Read ``config.json`` of a ``MistralForCausalLM``."""
    head_dim = reader.head_dim()
    return MistralConfig(
        architecture="MistralForCausalLM",
        **llama.decoder_fields(reader, head_dim, max_positions=131072, norm_eps=1e-6, num_kv_heads=8),
        activation=reader.activation("hidden_act", "silu"),
        rope=reader.rope(head_dim),
        tie_embeddings=reader.flag("tie_word_embeddings", False),
        windows=reader.windows(
            reader.integer("num_hidden_layers"), reader.nullable("sliding_window", 4096), lambda layer: True
        ),
    )


def attention(config: MistralConfig, layer: int) -> AttentionSpec:
    """A window in all layers, or in those that ``layer_types`` names.

    So do vLLM and transformers' ``Ministral`` classes, which its Auto classes choose for ``model_type`` mistral with ``layer_types``;
    its ``MistralForCausalLM`` ignores them.
    """
    return replace(AttentionSpec.of(config), window=config.windows[layer])


def block(
    ops: Ops[Tensor], config: MistralConfig, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block."""
    return blocks.pre_norm(ops, config, layer, x, residual, attention(config, layer))


MISTRAL = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    other_names=("MistralModel", "MinistralForCausalLM", "MinistralModel"),
    read_fields=read_fields,
    passes={
        "decode": Pass[MistralConfig](
            llama.embed, block, llama.head, llama.embed_weights, llama.block_weights, llama.head_weights, attention
        )
    },
    ignored_tensors=llama.LLAMA.ignored_tensors,
)
