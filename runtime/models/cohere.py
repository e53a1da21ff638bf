# SPDX-License-Identifier: Apache-2.0
"""Command R and R+ (Cohere 2024): one LayerNorm without bias for parallel halves, neighbouring channels rotated, scaled logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from phalanx.checkpoints.spec import WeightSpec
from phalanx.runtime.attention import HeadNorm
from phalanx.runtime.models import declarations, llama
from phalanx.runtime.models.base import Family, Pass, feed_forward_shard, head_shard
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.llama import LlamaConfig
from phalanx.runtime.ops import AttentionSpec, Ops, Tensor

__all__ = ["COHERE", "CohereConfig", "block_weights", "fields", "head", "parallel_halves"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CohereConfig(LlamaConfig):
    """``logit_scale``: factor on the logits; ``has_head_norms``: LayerNorm of each query and key head, with its own weights."""

    logit_scale: float
    has_head_norms: bool = False


def read_fields(reader: ConfigReader) -> CohereConfig:
    """Read ``config.json`` of a ``CohereForCausalLM``."""
    # transformers 5 raised the base that an absent key stands for, and leaves out what is at its default.
    is_old = str(reader.value("transformers_version", "")).startswith("4.")
    return CohereConfig(
        architecture="CohereForCausalLM",
        **fields(reader, theta=1e4 if is_old else 5e5),
        has_head_norms=reader.flag("use_qk_norm", False),
    )


def fields(reader: ConfigReader, theta: float) -> dict[str, Any]:
    """Return what Command R and R7B read alike."""
    head_dim = reader.head_dim()
    return {
        **llama.decoder_fields(reader, head_dim, max_positions=8192, norm_eps=1e-5, eps_key="layer_norm_eps"),
        "activation": reader.activation("hidden_act", "silu"),
        "rope": replace(reader.rope(head_dim, theta=theta), interleaved=True),
        "tie_embeddings": reader.flag("tie_word_embeddings", True),
        "attention_bias": reader.flag("attention_bias", False),
        "logit_scale": reader.number("logit_scale", 0.0625),
    }


def attention(config: CohereConfig, layer: int) -> AttentionSpec:
    """The same in every layer."""
    norm = HeadNorm(config.norm_eps, kind="layer", own_weights=True) if config.has_head_norms else None
    return replace(AttentionSpec.of(config), head_norm=norm)


def block(
    ops: Ops[Tensor], config: CohereConfig, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block."""
    return parallel_halves(ops, config, layer, x, residual, attention(config, layer))


def parallel_halves(
    ops: Ops[Tensor], config: CohereConfig, layer: int, x: Tensor, residual: Tensor | None, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """Attention and gated feed-forward part of the same normed rows, with one sum over ranks."""
    name = f"layers.{layer}"
    x, residual = ops.add_layer_norm(x, residual, f"{name}.norm", config.norm_eps)
    y = ops.gated_activation(ops.column_linear(x, f"{name}.gate_up"), config.activation)
    x = ops.attention(ops.column_linear(x, f"{name}.qkv"), f"{name}.attention", layer, spec)
    return ops.row_linear_pair(x, f"{name}.output", y, f"{name}.down"), residual


def block_weights(config: CohereConfig, layer: int) -> list[WeightSpec]:
    """Weights of one block."""
    d, f, heads, bias = config.hidden_size, config.intermediate_size, config.num_heads, config.attention_bias
    name, source = f"layers.{layer}", f"model.layers.{layer}"
    q, k, v, o = (f"{source}.self_attn.{letter}_proj" for letter in "qkvo")
    gate, up, down = (f"{source}.mlp.{kind}_proj" for kind in ("gate", "up", "down"))
    norms = declarations.own_head_norms(config, f"{name}.attention", f"{source}.self_attn")
    return [
        *declarations.norm(f"{name}.norm", f"{source}.input_layernorm", d),
        *declarations.qkv(config, f"{name}.qkv", (q, k, v), bias),
        *(norms if config.has_head_norms else ()),
        *declarations.row_linear(f"{name}.output", o, (d, heads * config.head_dim), head_shard(config, 1), bias),
        *declarations.gate_up(config, f"{name}.gate_up", (gate, up)),
        *declarations.row_linear(f"{name}.down", down, (d, f), feed_forward_shard(config, 1)),
    ]


def head(ops: Ops[Tensor], config: CohereConfig, x: Tensor, residual: Tensor | None) -> Tensor:
    """Scaled logits of the rows that need them: ``[B, V local]``."""
    x, _ = ops.add_layer_norm(x, residual, "final_norm", config.norm_eps)
    return ops.logits(ops.scale(x, config.logit_scale), "lm_head")


COHERE = Family(
    architecture="CohereForCausalLM",
    model_type="cohere",
    other_names=("CohereModel",),
    read_fields=read_fields,
    passes={
        "decode": Pass[CohereConfig](
            llama.embed, block, head, llama.embed_weights, block_weights, llama.head_weights, attention
        )
    },
    ignored_tensors=llama.LLAMA.ignored_tensors,
)
