# SPDX-License-Identifier: Apache-2.0
"""GPT-NeoX and Pythia (Black et al. 2022; Biderman et al. 2023): parallel halves, rotary positions on part of each head."""

from __future__ import annotations

from dataclasses import dataclass

from phalanx.checkpoints.spec import WeightSpec
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models import blocks, declarations
from phalanx.runtime.models.base import Family, Pass, feed_forward_shard, head_shard, lm_head, token_table
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.llama import attention, embed
from phalanx.runtime.ops import Ops, Tensor

__all__ = ["GPT_NEOX"]

TABLE, HEAD = "gpt_neox.embed_in.weight", "embed_out.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class GptNeoxConfig(ModelConfig):
    """Whether attention and feed-forward part read the same input, and whether attention has biases."""

    is_parallel: bool
    attention_bias: bool


def read_fields(reader: ConfigReader) -> GptNeoxConfig:
    """Read ``config.json`` of a ``GPTNeoXForCausalLM``."""
    num_heads, head_dim = reader.integer("num_attention_heads"), reader.head_dim()
    # transformers 4.57 writes the usual names next to the family's own.
    theta, partial = (
        reader.either("rotary_emb_base", "rope_theta"),
        reader.either("rotary_pct", "partial_rotary_factor"),
    )
    return GptNeoxConfig(
        architecture="GPTNeoXForCausalLM",
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("hidden_size"),
        num_layers=reader.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        intermediate_size=reader.integer("intermediate_size"),
        max_positions=reader.integer("max_position_embeddings", 2048),
        norm_eps=reader.number("layer_norm_eps", 1e-5),
        activation=reader.activation("hidden_act", "gelu"),
        rope=reader.rope(head_dim, partial=0.25, theta_key=theta, partial_key=partial),
        tie_embeddings=reader.flag("tie_word_embeddings", False),
        is_parallel=reader.flag("use_parallel_residual", True),
        attention_bias=reader.flag("attention_bias", True),
        **reader.common(),
    )


def embed_weights(config: ModelConfig) -> list[WeightSpec]:
    """The token table."""
    return [WeightSpec("embed.weight", (token_table(config, TABLE, HEAD),))]


def block(
    ops: Ops[Tensor], config: GptNeoxConfig, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block; its halves in parallel take one sum over ranks."""
    name, eps, spec = f"layers.{layer}", config.norm_eps, attention(config, layer)
    x, residual = ops.add_layer_norm(x, residual, f"{name}.attention_norm", eps)
    if not config.is_parallel:
        x = blocks.attention(ops, name, layer, x, spec)
        x, residual = ops.add_layer_norm(x, residual, f"{name}.mlp_norm", eps)
        return blocks.mlp(ops, name, x, config.activation), residual
    y = ops.column_linear(ops.layer_norm(residual, f"{name}.mlp_norm", eps), f"{name}.up")
    x = ops.attention(ops.column_linear(x, f"{name}.qkv"), f"{name}.attention", layer, spec)
    return ops.row_linear_pair(x, f"{name}.output", ops.activation(y, config.activation), f"{name}.down"), residual


def block_weights(config: GptNeoxConfig, layer: int) -> list[WeightSpec]:
    """Weights of one block; ``query_key_value`` holds q, k and v head by head."""
    d, f, bias = config.hidden_size, config.intermediate_size, config.attention_bias
    name, source = f"layers.{layer}", f"gpt_neox.layers.{layer}"
    columns, rows, heads = feed_forward_shard(config, 0), feed_forward_shard(config, 1), head_shard(config, 1)
    return [
        *declarations.norm(f"{name}.attention_norm", f"{source}.input_layernorm", d, bias=True),
        *declarations.fused_qkv(config, f"{name}.qkv", f"{source}.attention.query_key_value", bias),
        *declarations.row_linear(f"{name}.output", f"{source}.attention.dense", (d, d), heads, bias),
        *declarations.norm(f"{name}.mlp_norm", f"{source}.post_attention_layernorm", d, bias=True),
        *declarations.column_linear(f"{name}.up", f"{source}.mlp.dense_h_to_4h", (f, d), columns, bias=True),
        *declarations.row_linear(f"{name}.down", f"{source}.mlp.dense_4h_to_h", (d, f), rows, bias=True),
    ]


def head(ops: Ops[Tensor], config: ModelConfig, x: Tensor, residual: Tensor | None) -> Tensor:
    """Logits of the rows that need them: ``[B, V local]``."""
    x, _ = ops.add_layer_norm(x, residual, "final_norm", config.norm_eps)
    return ops.logits(x, "lm_head")


def head_weights(config: ModelConfig) -> list[WeightSpec]:
    """Final norm and LM head."""
    norm = declarations.norm("final_norm", "gpt_neox.final_layer_norm", config.hidden_size, bias=True)
    return [*norm, lm_head(config, TABLE, HEAD)]


GPT_NEOX = Family(
    architecture="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    other_names=("GPTNeoXModel",),
    read_fields=read_fields,
    passes={"decode": Pass[GptNeoxConfig](embed, block, head, embed_weights, block_weights, head_weights, attention)},
    # Causal masks and rotary tables of older files; a copy of the token table, where they are tied.
    ignored_tensors=(
        r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)", r"embed_out\.weight",
    ),
)  # fmt: skip
