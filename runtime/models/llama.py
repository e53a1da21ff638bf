# SPDX-License-Identifier: Apache-2.0
"""Llama 1, 2 and 3 (Touvron et al. 2023; Llama team 2024): RMSNorm, rotary positions, grouped-query heads, SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from phalanx.checkpoints.spec import WeightSpec
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models import blocks, declarations
from phalanx.runtime.models.base import Family, Pass, feed_forward_shard, head_shard, lm_head, token_table
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.ops import AttentionSpec, Ops, Tensor

__all__ = [
    "LLAMA",
    "LlamaConfig",
    "attention_weights",
    "block",
    "block_weights",
    "decoder_fields",
    "embed",
    "embed_weights",
    "head_weights",
]


TABLE = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """Which matrices have biases.

    Attributes:
        attention_bias: q, k, v and o.
        mlp_bias: gate, up and down.
    """

    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def output_bias(self) -> bool:
        """Whether the output projection of attention has a bias."""
        return self.attention_bias


def read_fields(reader: ConfigReader) -> LlamaConfig:
    """Read ``config.json`` of a ``LlamaForCausalLM``."""
    head_dim = reader.head_dim()
    reader.refuse_unless("activation", "swiglu")  # a second name of the gated MLP in some checkpoints
    return LlamaConfig(
        architecture="LlamaForCausalLM",
        **decoder_fields(reader, head_dim, max_positions=2048, norm_eps=1e-6),
        activation=reader.activation("hidden_act", "silu"),
        rope=reader.rope(head_dim),
        tie_embeddings=reader.flag("tie_word_embeddings", False),
        attention_bias=reader.flag("attention_bias", False),
        mlp_bias=reader.flag("mlp_bias", False),
    )


def decoder_fields(
    reader: ConfigReader, head_dim: int, *, max_positions: int, norm_eps: float, num_kv_heads: int = 0,
    eps_key: str = "rms_norm_eps",
) -> dict[str, Any]:  # fmt: skip
    """Return the fields of `ModelConfig` that Llama and its many relatives call alike, with a family's own defaults.

    ``num_kv_heads``: where the file does not say; 0 = as many as query heads, as null means for all.
    """
    num_heads = reader.integer("num_attention_heads")
    return {
        "vocab_size": reader.integer("vocab_size"),
        "hidden_size": reader.integer("hidden_size"),
        "num_layers": reader.integer("num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": reader.nullable("num_key_value_heads", num_kv_heads or num_heads) or num_heads,
        "head_dim": head_dim,
        "intermediate_size": reader.integer("intermediate_size"),
        "max_positions": reader.integer("max_position_embeddings", max_positions),
        "norm_eps": reader.number(eps_key, norm_eps),
        **reader.common(),
    }


def attention(config: ModelConfig, layer: int) -> AttentionSpec:
    """The same in every layer."""
    return AttentionSpec.of(config)


def embed(ops: Ops[Tensor], config: ModelConfig) -> Tensor:
    """Token rows: ``[T, D]``."""
    return ops.embedding("embed")


def embed_weights(config: ModelConfig) -> list[WeightSpec]:
    """The token table."""
    return [WeightSpec("embed.weight", (token_table(config, TABLE),))]


def block(
    ops: Ops[Tensor], config: ModelConfig, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block."""
    name = f"layers.{layer}"
    x, residual = ops.add_rms_norm(x, residual, f"{name}.attention_norm", config.norm_eps)
    x = blocks.attention(ops, name, layer, x, attention(config, layer))
    x, residual = ops.add_rms_norm(x, residual, f"{name}.mlp_norm", config.norm_eps)
    return blocks.gated_mlp(ops, name, x, config.activation), residual


def block_weights(config: LlamaConfig, layer: int) -> list[WeightSpec]:
    """Weights of one block."""
    name, source = f"layers.{layer}", f"model.layers.{layer}.mlp"
    gate, up, down = (f"{source}.{kind}_proj" for kind in ("gate", "up", "down"))
    shape = config.hidden_size, config.intermediate_size
    return [
        *attention_weights(config, layer),
        *declarations.gate_up(config, f"{name}.gate_up", (gate, up), config.mlp_bias),
        *declarations.row_linear(f"{name}.down", down, shape, feed_forward_shard(config, 1), config.mlp_bias),
    ]


def attention_weights(config: LlamaConfig, layer: int) -> list[WeightSpec]:
    """Weights of a block's attention, and of both norms."""
    d, heads = config.hidden_size, config.num_heads * config.head_dim
    name, source = f"layers.{layer}", f"model.layers.{layer}"
    q, k, v, o = (f"{source}.self_attn.{letter}_proj" for letter in "qkvo")
    return [
        *declarations.norm(f"{name}.attention_norm", f"{source}.input_layernorm", d),
        *declarations.qkv(config, f"{name}.qkv", (q, k, v), config.attention_bias),
        *declarations.row_linear(f"{name}.output", o, (d, heads), head_shard(config, 1), config.output_bias),
        *declarations.norm(f"{name}.mlp_norm", f"{source}.post_attention_layernorm", d),
    ]


def head(ops: Ops[Tensor], config: ModelConfig, x: Tensor, residual: Tensor | None) -> Tensor:
    """Logits of the rows that need them: ``[B, V local]``."""
    x, _ = ops.add_rms_norm(x, residual, "final_norm", config.norm_eps)
    return ops.logits(x, "lm_head")


def head_weights(config: ModelConfig) -> list[WeightSpec]:
    """Final norm and LM head."""
    return [*declarations.norm("final_norm", "model.norm", config.hidden_size), lm_head(config, TABLE)]


LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    other_names=("LLaMAForCausalLM", "LlamaModel"),
    read_fields=read_fields,
    passes={"decode": Pass[LlamaConfig](embed, block, head, embed_weights, block_weights, head_weights, attention)},
    ignored_tensors=(r"lm_head\.weight",),  # a copy of the token table, where they are tied
)
