# SPDX-License-Identifier: Apache-2.0
"""Gemma 1 (Gemma team 2024): Llama's block with norm weights stored as w - 1, a scaled embedding and GeGLU."""

from __future__ import annotations

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.config import Activation, ModelConfig
from phalanx.runtime.models import blocks, llama
from phalanx.runtime.models.base import Family, Pass
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.llama import LlamaConfig
from phalanx.runtime.ops import Ops, Tensor

__all__ = ["GEMMA"]


def read_fields(reader: ConfigReader) -> LlamaConfig:
    """Read ``config.json`` of a ``GemmaForCausalLM``."""
    head_dim = reader.integer("head_dim", 256)
    return LlamaConfig(
        architecture="GemmaForCausalLM",
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("hidden_size"),
        num_layers=reader.integer("num_hidden_layers"),
        num_heads=reader.integer("num_attention_heads"),
        num_kv_heads=reader.integer("num_key_value_heads", reader.integer("num_attention_heads")),
        head_dim=head_dim,
        intermediate_size=reader.integer("intermediate_size"),
        max_positions=reader.integer("max_position_embeddings", 8192),
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        activation=_activation(reader),
        rope=reader.rope(head_dim),
        tie_embeddings=reader.flag("tie_word_embeddings", True),
        attention_bias=reader.flag("attention_bias", False),
        **reader.common(),
    )


def _activation(reader: ConfigReader) -> Activation:
    """Early checkpoints say "gelu" in ``hidden_act`` and were trained with its tanh form, as ``hidden_activation`` says later."""
    old = reader.activation("hidden_act", "gelu_pytorch_tanh")
    old = "gelu_tanh" if old == "gelu" else old
    if reader.value("hidden_activation") is None:
        return old
    new = reader.activation("hidden_activation", "gelu_pytorch_tanh")
    if new != old and reader.value("hidden_act") is not None:
        raise ConfigError(
            f"hidden_activation={reader.value('hidden_activation')!r} and hidden_act={reader.value('hidden_act')!r} in config.json "
            "disagree; remove the wrong one"
        )
    return new


def embed(ops: Ops[Tensor], config: ModelConfig) -> Tensor:
    """Token rows times sqrt(D): ``[T, D]``."""
    return ops.embedding("embed", scale=config.hidden_size**0.5)


def block(
    ops: Ops[Tensor], config: ModelConfig, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block."""
    name = f"layers.{layer}"
    x, residual = ops.add_rms_norm(x, residual, f"{name}.attention_norm", config.norm_eps, weight_offset=1.0)
    x = blocks.attention(ops, name, layer, x, llama.attention(config, layer))
    x, residual = ops.add_rms_norm(x, residual, f"{name}.mlp_norm", config.norm_eps, weight_offset=1.0)
    return blocks.gated_mlp(ops, name, x, config.activation), residual


def head(ops: Ops[Tensor], config: ModelConfig, x: Tensor, residual: Tensor | None) -> Tensor:
    """Logits of the rows that need them: ``[B, V local]``."""
    x, _ = ops.add_rms_norm(x, residual, "final_norm", config.norm_eps, weight_offset=1.0)
    return ops.logits(x, "lm_head")


GEMMA = Family(
    architecture="GemmaForCausalLM",
    model_type="gemma",
    other_names=("GemmaModel",),
    read_fields=read_fields,
    passes={
        "decode": Pass[LlamaConfig](
            embed, block, head, llama.embed_weights, llama.block_weights, llama.head_weights, llama.attention
        )
    },
    ignored_tensors=llama.LLAMA.ignored_tensors,
)
