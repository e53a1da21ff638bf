# SPDX-License-Identifier: Apache-2.0
"""GPT-3 as Megatron-LM trains it (Shoeybi et al. 2019): its tensors, flat and whole, under its names, its arguments as keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from phalanx.checkpoints.spec import Part, WeightSpec
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models import blocks, declarations
from phalanx.runtime.models.base import Family, Pass, feed_forward_shard, head_shard, lm_head, token_table
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.llama import attention
from phalanx.runtime.ops import Ops, Tensor
from phalanx.runtime.token_fields import shown

__all__ = ["MEGATRON"]

PREFIX = "language_model."
TABLE, HEAD = f"{PREFIX}embedding.word_embeddings.weight", f"{PREFIX}output_layer.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronConfig(ModelConfig):
    """Switches of Megatron's command line.

    Attributes:
        norm: of every layer; ``norm_offset`` is added to its weights (LayerNorm1P).
        is_gated: the feed-forward part has a gate, which lies before the other half (``--swiglu``).
        linear_bias, qkv_bias: which matrices have biases.
    """

    norm: Literal["layer", "rms"]
    norm_offset: float
    is_gated: bool
    linear_bias: bool
    qkv_bias: bool


def read_fields(reader: ConfigReader) -> MegatronConfig:
    """Read ``config.json`` of a ``MegatronGPTModel``, whose keys are Megatron's arguments."""
    num_heads, hidden_size = reader.integer("num_attention_heads"), reader.integer("hidden_size")
    head_dim = reader.head_dim("kv_channels")
    norm, positions = (
        _one_of(reader, "normalization", "LayerNorm", "LayerNorm1P", "RMSNorm"),
        _one_of(reader, "position_embedding_type", "learned_absolute", "rope"),
    )
    rope = reader.rope(head_dim, partial=1.0, theta_key="rotary_base", partial_key="rotary_percent")
    linear_bias = reader.flag("add_bias_linear", True)
    return MegatronConfig(
        architecture="MegatronGPTModel",
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=reader.integer("num_layers"),
        num_heads=num_heads,
        num_kv_heads=reader.integer("num_query_groups", num_heads),
        head_dim=head_dim,
        intermediate_size=reader.integer("ffn_hidden_size", 4 * hidden_size),
        max_positions=reader.integer("max_position_embeddings"),
        norm_eps=reader.number("norm_epsilon", 1e-5),
        activation=reader.activation("activation_function", "gelu_pytorch_tanh"),
        rope=rope if positions == "rope" else None,
        tie_embeddings=not reader.flag("untie_embeddings_and_output_weights", False),
        norm="rms" if norm == "RMSNorm" else "layer",
        norm_offset=1.0 if norm == "LayerNorm1P" else 0.0,
        is_gated=reader.flag("gated_linear_unit", False),
        linear_bias=linear_bias,
        qkv_bias=reader.flag("add_qkv_bias", False) or linear_bias,
        **reader.common(),
    )


def _one_of(reader: ConfigReader, name: str, *known: str) -> str:
    """A field's value; the first of ``known`` where it is absent."""
    value = reader.value(name, known[0])
    if value not in known:
        raise ConfigError(f"{name}={shown(value)} in config.json is not supported; supported: {', '.join(known)}")
    return str(value)


def embed(ops: Ops[Tensor], config: MegatronConfig) -> Tensor:
    """Token rows, plus position rows where nothing is rotated: ``[T, D]``."""
    x = ops.embedding("embed")
    return ops.position_embedding(x, "positions") if config.rope is None else x


def _norm(
    ops: Ops[Tensor], config: MegatronConfig, x: Tensor, residual: Tensor | None, name: str
) -> tuple[Tensor, Tensor]:
    add = ops.add_rms_norm if config.norm == "rms" else ops.add_layer_norm
    return add(x, residual, name, config.norm_eps, config.norm_offset)


def block(
    ops: Ops[Tensor], config: MegatronConfig, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block."""
    name = f"layers.{layer}"
    x, residual = _norm(ops, config, x, residual, f"{name}.attention_norm")
    x = blocks.attention(ops, name, layer, x, attention(config, layer))
    x, residual = _norm(ops, config, x, residual, f"{name}.mlp_norm")
    mlp = blocks.gated_mlp if config.is_gated else blocks.mlp
    return mlp(ops, name, x, config.activation), residual


def head(ops: Ops[Tensor], config: MegatronConfig, x: Tensor, residual: Tensor | None) -> Tensor:
    """Logits of the rows that need them: ``[B, V local]``."""
    return ops.logits(_norm(ops, config, x, residual, "final_norm")[0], "lm_head")


def embed_weights(config: MegatronConfig) -> list[WeightSpec]:
    """The token table, and that of positions where nothing is rotated."""
    table = WeightSpec("embed.weight", (token_table(config, TABLE, HEAD),))
    rows = Part(f"{PREFIX}embedding.position_embeddings.weight", (config.max_positions, config.hidden_size))
    return [table] if config.rope is not None else [table, WeightSpec("positions.weight", (rows,))]


def block_weights(config: MegatronConfig, layer: int) -> list[WeightSpec]:
    """Weights of one block; ``query_key_value`` holds the rows of each group of heads together."""
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    name, source, bias = f"layers.{layer}", f"{PREFIX}encoder.layers.{layer}", config.linear_bias
    up, down = f"{source}.mlp.dense_h_to_4h", f"{source}.mlp.dense_4h_to_h"
    columns, rows, has_shift = feed_forward_shard(config, 0), feed_forward_shard(config, 1), config.norm == "layer"
    return [
        *declarations.norm(f"{name}.attention_norm", f"{source}.input_layernorm", d, has_shift),
        *declarations.fused_qkv(config, f"{name}.qkv", f"{source}.self_attention.query_key_value", config.qkv_bias),
        *declarations.row_linear(
            f"{name}.output", f"{source}.self_attention.dense", (d, heads), head_shard(config, 1), bias
        ),
        *declarations.norm(f"{name}.mlp_norm", f"{source}.post_attention_layernorm", d, has_shift),
        *(
            declarations.stacked_gate_up(config, f"{name}.gate_up", up, bias)
            if config.is_gated
            else declarations.column_linear(f"{name}.up", up, (f, d), columns, bias)
        ),
        *declarations.row_linear(f"{name}.down", down, (d, f), rows, bias),
    ]


def head_weights(config: MegatronConfig) -> list[WeightSpec]:
    """Final norm and LM head."""
    source, has_shift = f"{PREFIX}encoder.final_layernorm", config.norm == "layer"
    return [*declarations.norm("final_norm", source, config.hidden_size, has_shift), lm_head(config, TABLE, HEAD)]


MEGATRON = Family(
    architecture="MegatronGPTModel",
    model_type="megatron_gpt",
    read_fields=read_fields,
    passes={"decode": Pass[MegatronConfig](embed, block, head, embed_weights, block_weights, head_weights, attention)},
    ignored_tensors=(r"language_model\.output_layer\.weight",),  # a copy of the token table, where they are tied
)
