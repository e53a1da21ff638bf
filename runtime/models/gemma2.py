# SPDX-License-Identifier: Apache-2.0
"""Gemma 2 (Gemma team 2024): norms before and after both halves, soft caps, a window in every other layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from phalanx.checkpoints.spec import WeightSpec
from phalanx.runtime.models import blocks, declarations, gemma, llama
from phalanx.runtime.models.base import Family, Pass
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.llama import LlamaConfig
from phalanx.runtime.ops import AttentionSpec, Ops, Tensor

__all__ = ["GEMMA2", "Gemma2Config", "attention", "block_weights", "head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma2Config(LlamaConfig):
    """What Gemma 2 adds.

    Attributes:
        windows: of each layer, 0 = none.
        query_scalar: scores are divided by its root.
        score_cap, logit_cap: soft caps, 0 = none.
    """

    windows: tuple[int, ...]
    query_scalar: float
    score_cap: float
    logit_cap: float


def read_fields(reader: ConfigReader) -> Gemma2Config:
    """Read ``config.json`` of a ``Gemma2ForCausalLM``."""
    head_dim, num_layers = reader.integer("head_dim", 256), reader.integer("num_hidden_layers")
    reader.ignore("cache_implementation", "hidden_act")
    window = reader.nullable(reader.either("sliding_window", "sliding_window_size"), 4096)
    return Gemma2Config(
        architecture="Gemma2ForCausalLM",
        **llama.decoder_fields(reader, head_dim, max_positions=8192, norm_eps=1e-6, num_kv_heads=4),
        activation=reader.activation("hidden_activation", "gelu_pytorch_tanh"),
        rope=reader.rope(head_dim),
        tie_embeddings=reader.flag("tie_word_embeddings", True),
        attention_bias=reader.flag("attention_bias", False),
        windows=reader.windows(num_layers, window, lambda layer: layer % 2 == 0),
        query_scalar=reader.number("query_pre_attn_scalar", 256.0),
        score_cap=reader.nullable_number("attn_logit_softcapping", 50.0),
        logit_cap=reader.nullable_number("final_logit_softcapping", 30.0),
    )


def attention(config: Gemma2Config, layer: int) -> AttentionSpec:
    """Capped scores; a window in the layers that have one."""
    return replace(
        AttentionSpec.of(config),
        scale=config.query_scalar**-0.5,
        window=config.windows[layer],
        soft_cap=config.score_cap,
    )


def block(
    ops: Ops[Tensor], config: Gemma2Config, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block."""
    return blocks.sandwich(ops, config, layer, x, residual, attention(config, layer), weight_offset=1.0)


def block_weights(config: Gemma2Config, layer: int) -> list[WeightSpec]:
    """Llama's, with two more norms; what Llama calls ``post_attention_layernorm`` is here what it says."""
    name, source, d = f"layers.{layer}", f"model.layers.{layer}", config.hidden_size
    shared = [spec for spec in llama.block_weights(config, layer) if spec.name != f"{name}.mlp_norm.weight"]
    return [
        *shared,
        *declarations.norm(f"{name}.attention_post_norm", f"{source}.post_attention_layernorm", d),
        *declarations.norm(f"{name}.mlp_norm", f"{source}.pre_feedforward_layernorm", d),
        *declarations.norm(f"{name}.mlp_post_norm", f"{source}.post_feedforward_layernorm", d),
    ]


def head(ops: Ops[Tensor], config: Gemma2Config, x: Tensor, residual: Tensor | None) -> Tensor:
    """Capped logits of the rows that need them: ``[B, V local]``."""
    x, _ = ops.add_rms_norm(x, residual, "final_norm", config.norm_eps, weight_offset=1.0)
    return ops.logits(x, "lm_head", soft_cap=config.logit_cap)


GEMMA2 = Family(
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    other_names=("Gemma2Model",),
    read_fields=read_fields,
    passes={
        "decode": Pass[Gemma2Config](
            gemma.embed, block, head, llama.embed_weights, block_weights, llama.head_weights, attention
        )
    },
    ignored_tensors=llama.LLAMA.ignored_tensors,
)
