# SPDX-License-Identifier: Apache-2.0
"""Gemma 3, text (Gemma team 2025): Gemma 2's block without caps, norms of heads, another rotary embedding under each window."""

from __future__ import annotations

from dataclasses import dataclass, replace

from phalanx.checkpoints.spec import WeightSpec
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.attention import HeadNorm
from phalanx.runtime.config import RopeConfig
from phalanx.runtime.models import blocks, declarations, gemma, gemma2, llama
from phalanx.runtime.models.base import Family, Pass
from phalanx.runtime.models.gemma2 import Gemma2Config
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.ops import AttentionSpec, Ops, Tensor
from phalanx.runtime.token_fields import shown

__all__ = ["GEMMA3", "Gemma3Config", "block_weights", "read_fields"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma3Config(Gemma2Config):
    """``local_rope``: of the layers with a window; `rope` is that of the others."""

    local_rope: RopeConfig


def read_fields(reader: ConfigReader) -> Gemma3Config:
    """Read ``config.json`` of a ``Gemma3ForCausalLM``."""
    head_dim, num_layers = reader.integer("head_dim", 256), reader.integer("num_hidden_layers")
    pattern = reader.integer(reader.either("sliding_window_pattern", "_sliding_window_pattern"), 6)
    window = reader.nullable("sliding_window", 4096)
    reader.refuse_unless("attn_logit_softcapping", None)  # documented, but transformers does not apply it
    reader.ignore("cache_implementation", "hidden_act")
    return Gemma3Config(
        architecture="Gemma3ForCausalLM",
        **llama.decoder_fields(reader, head_dim, max_positions=131072, norm_eps=1e-6, num_kv_heads=4),
        activation=reader.activation("hidden_activation", "gelu_pytorch_tanh"),
        rope=reader.rope(head_dim, theta=1e6, layer_type="full_attention"),
        local_rope=_local_rope(reader, head_dim),
        tie_embeddings=reader.flag("tie_word_embeddings", True),
        attention_bias=reader.flag("attention_bias", False),
        windows=reader.windows(num_layers, window, lambda layer: (layer + 1) % pattern != 0),
        query_scalar=reader.number("query_pre_attn_scalar", 256.0),
        score_cap=0.0,
        logit_cap=reader.number("final_logit_softcapping", 0.0),
    )


def _local_rope(reader: ConfigReader, head_dim: int) -> RopeConfig:
    """Never scaled: ``rope_scaling`` is for the layers that see everything."""
    parameters = reader.value("rope_parameters", {})
    if parameters and "sliding_attention" not in parameters:
        raise ConfigError(
            f"rope_parameters={shown(parameters)} in config.json has no entry for sliding_attention; give one for each kind of layer"
        )
    return reader.rope(
        head_dim, theta=1e4, theta_key="rope_local_base_freq", layer_type="sliding_attention", is_scaled=False
    )


def attention(config: Gemma3Config, layer: int) -> AttentionSpec:
    """Normalised heads; layers with a window have their own rotary embedding."""
    window = config.windows[layer]
    return replace(
        gemma2.attention(config, layer),
        rope=config.local_rope if window else config.rope,
        head_norm=HeadNorm(config.norm_eps, weight_offset=1.0),
    )


def block(
    ops: Ops[Tensor], config: Gemma3Config, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block."""
    return blocks.sandwich(ops, config, layer, x, residual, attention(config, layer), weight_offset=1.0)


def block_weights(config: Gemma3Config, layer: int) -> list[WeightSpec]:
    """Gemma 2's, and the norms of heads."""
    name, source = f"layers.{layer}.attention", f"model.layers.{layer}.self_attn"
    return [
        *gemma2.block_weights(config, layer),
        *declarations.norm(f"{name}.query_norm", f"{source}.q_norm", config.head_dim),
        *declarations.norm(f"{name}.key_norm", f"{source}.k_norm", config.head_dim),
    ]


GEMMA3 = Family(
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    other_names=("Gemma3TextModel",),
    read_fields=read_fields,
    passes={
        "decode": Pass[Gemma3Config](
            gemma.embed, block, gemma2.head, llama.embed_weights, block_weights, llama.head_weights, attention
        )
    },
    ignored_tensors=llama.LLAMA.ignored_tensors,
)
