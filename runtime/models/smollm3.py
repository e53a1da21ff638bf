# SPDX-License-Identifier: Apache-2.0
"""SmolLM3 (Hugging Face 2025): Llama's block; every fourth layer has no rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass, replace

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.models import blocks, llama
from phalanx.runtime.models.base import Family, Pass
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.llama import LlamaConfig
from phalanx.runtime.ops import AttentionSpec, Ops, Tensor
from phalanx.runtime.token_fields import shown

__all__ = ["SMOLLM3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SmolLm3Config(LlamaConfig):
    """Of each layer, whether it has a rotary embedding, and its window (0 = none)."""

    rotates: tuple[bool, ...]
    windows: tuple[int, ...]


def read_fields(reader: ConfigReader) -> SmolLm3Config:
    """Read ``config.json`` of a ``SmolLM3ForCausalLM``."""
    head_dim, num_layers = reader.head_dim(), reader.integer("num_hidden_layers")
    rotates = _rotates(reader, num_layers)
    window = reader.integer("sliding_window", 0, minimum=0) if reader.flag("use_sliding_window", False) else 0
    reader.ignore("sliding_window", "max_window_layers")
    return SmolLm3Config(
        architecture="SmolLM3ForCausalLM",
        **llama.decoder_fields(reader, head_dim, max_positions=32768, norm_eps=1e-6, num_kv_heads=4),
        activation=reader.activation("hidden_act", "silu"),
        rope=reader.rope(head_dim, theta=2e6),
        tie_embeddings=reader.flag("tie_word_embeddings", True),
        attention_bias=reader.flag("attention_bias", False),
        mlp_bias=reader.flag("mlp_bias", False),
        rotates=rotates,
        windows=reader.windows(num_layers, window, lambda layer: not rotates[layer]),
    )


def _rotates(reader: ConfigReader, num_layers: int) -> tuple[bool, ...]:
    """``no_rope_layers``, whose name says the contrary: 1 where a layer has a rotary embedding."""
    interval = reader.integer("no_rope_layer_interval", 4)
    given = reader.value("no_rope_layers") or [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    if not isinstance(given, list) or len(given) != num_layers or any(each not in (0, 1) for each in given):
        raise ConfigError(f"no_rope_layers={shown(given)} in config.json is not 0 or 1 for each of {num_layers} layers")
    return tuple(map(bool, given))


def attention(config: SmolLm3Config, layer: int) -> AttentionSpec:
    """With or without a rotary embedding, and a window where there is one."""
    rope = config.rope if config.rotates[layer] else None
    return replace(AttentionSpec.of(config), rope=rope, window=config.windows[layer])


def block(
    ops: Ops[Tensor], config: SmolLm3Config, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block."""
    return blocks.pre_norm(ops, config, layer, x, residual, attention(config, layer))


SMOLLM3 = Family(
    architecture="SmolLM3ForCausalLM",
    model_type="smollm3",
    other_names=("SmolLM3Model",),
    read_fields=read_fields,
    passes={
        "decode": Pass[SmolLm3Config](
            llama.embed, block, llama.head, llama.embed_weights, llama.block_weights, llama.head_weights, attention
        )
    },
    ignored_tensors=llama.LLAMA.ignored_tensors,
)
