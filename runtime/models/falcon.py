# SPDX-License-Identifier: Apache-2.0
"""Falcon (Almazrouei et al. 2023): halves in parallel with one norm or two and few key/value heads; falcon-rw: serial, ALiBi."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from phalanx.checkpoints.spec import WeightSpec
from phalanx.runtime.alibi import alibi_slopes
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models import blocks, declarations
from phalanx.runtime.models.base import Family, Pass, feed_forward_shard, head_shard, lm_head, token_table
from phalanx.runtime.models.gpt_neox import head
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.llama import embed
from phalanx.runtime.ops import AttentionSpec, Ops, Tensor

__all__ = ["FALCON"]

TABLE = "transformer.word_embeddings.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class FalconConfig(ModelConfig):
    """What tells the sizes apart.

    Attributes:
        is_parallel: attention and feed-forward part read the block's input, not one the other's output.
        norms: of the block in the checkpoint: the only one, or those of attention and feed-forward part.
        has_bias: matrices have biases.
        alibi: distances in place of rotation.
    """

    is_parallel: bool
    norms: tuple[str, ...]
    has_bias: bool
    alibi: bool


def read_fields(reader: ConfigReader) -> FalconConfig:
    """Read ``config.json`` of a ``FalconForCausalLM``; ``num_kv_heads`` counts only with ``new_decoder_architecture``."""
    width = reader.either("hidden_size", "n_embed")
    heads = reader.either("num_attention_heads", "n_head")
    # Falcon 40B's first form has no other switch; the first 7B and rw are RefinedWebModel.
    first_40b = reader.value("model_type") == "RefinedWeb"
    is_new, alibi = reader.flag("new_decoder_architecture", first_40b), reader.flag("alibi", False)
    is_parallel, head_dim = reader.flag("parallel_attn", True), reader.exact_quotient(width, heads)
    if is_new:
        reader.refuse_unless("parallel_attn", True)
    num_heads, given = reader.integer(heads), reader.either("num_kv_heads", "n_head_kv")
    few_heads = 1 if reader.flag("multi_query", True) else num_heads
    norms = reader.integer("num_ln_in_parallel_attn", 2 if is_new else 1)
    reader.refuse_unless("num_ln_in_parallel_attn", norms if norms == 1 or (norms == 2 and is_new) else 1)
    reader.refuse_unless("apply_residual_connection_post_layernorm", False)
    size = reader.integer("ffn_hidden_size", reader.integer("ff_factor", 4) * reader.integer(width))
    reader.refuse_unless("ff_factor", size / reader.integer(width))  # which Falcon 11B has, too
    rope = reader.rope(head_dim)
    return FalconConfig(
        architecture="FalconForCausalLM",
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer(width),
        num_layers=reader.integer(reader.either("num_hidden_layers", "n_layer")),
        num_heads=num_heads,
        num_kv_heads=reader.integer(given, num_heads) if is_new else few_heads,
        head_dim=head_dim,
        intermediate_size=size,
        max_positions=reader.integer("max_position_embeddings", 2048),
        norm_eps=reader.number("layer_norm_epsilon", 1e-5),
        activation=reader.activation("activation", "gelu"),
        rope=None if alibi else rope,
        tie_embeddings=reader.flag("tie_word_embeddings", True),
        is_parallel=is_parallel,
        norms=_norms(is_parallel, norms),
        has_bias=reader.flag("bias", False),
        alibi=alibi,
        **reader.common(),
    )


def _norms(is_parallel: bool, count: int) -> tuple[str, ...]:
    if not is_parallel:
        return ("input_layernorm", "post_attention_layernorm")
    return ("ln_attn", "ln_mlp") if count == 2 else ("input_layernorm",)


def attention(config: FalconConfig, layer: int) -> AttentionSpec:
    """Rotation, or ALiBi with slopes in bfloat16, scaled as the scores are.

    transformers rounds each slope's product with the position to bfloat16, too, which is exact up to position 256 with at most 8 heads.
    """
    spec = AttentionSpec.of(config)
    if not config.alibi:
        return spec
    return replace(spec, alibi_slopes=tuple(_bfloat16(slope) * spec.scale for slope in alibi_slopes(config.num_heads)))


def _bfloat16(value: float) -> float:
    """The nearest bfloat16, ties to even."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    (result,) = struct.unpack("<f", struct.pack("<I", rounded))
    return float(result)


def block(
    ops: Ops[Tensor], config: FalconConfig, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block; its halves in parallel take one sum over ranks."""
    name, eps, spec = f"layers.{layer}", config.norm_eps, attention(config, layer)
    x, residual = ops.add_layer_norm(x, residual, f"{name}.norm", eps)
    if not config.is_parallel:
        x = blocks.attention(ops, name, layer, x, spec)
        x, residual = ops.add_layer_norm(x, residual, f"{name}.mlp_norm", eps)
        return blocks.mlp(ops, name, x, config.activation), residual
    y = x if len(config.norms) == 1 else ops.layer_norm(residual, f"{name}.mlp_norm", eps)
    y = ops.activation(ops.column_linear(y, f"{name}.up"), config.activation)
    x = ops.attention(ops.column_linear(x, f"{name}.qkv"), f"{name}.attention", layer, spec)
    return ops.row_linear_pair(x, f"{name}.output", y, f"{name}.down"), residual


def embed_weights(config: ModelConfig) -> list[WeightSpec]:
    """The token table."""
    return [WeightSpec("embed.weight", (token_table(config, TABLE),))]


def block_weights(config: FalconConfig, layer: int) -> list[WeightSpec]:
    """Weights of one block; ``query_key_value`` holds q, k and v group by group."""
    d, f, bias = config.hidden_size, config.intermediate_size, config.has_bias
    name, source = f"layers.{layer}", f"transformer.h.{layer}"
    columns, rows, heads = feed_forward_shard(config, 0), feed_forward_shard(config, 1), head_shard(config, 1)
    norms = zip((f"{name}.norm", f"{name}.mlp_norm"), config.norms, strict=False)
    return [
        *(spec for ours, theirs in norms for spec in declarations.norm(ours, f"{source}.{theirs}", d, bias=True)),
        *declarations.fused_qkv(config, f"{name}.qkv", f"{source}.self_attention.query_key_value", bias),
        *declarations.row_linear(f"{name}.output", f"{source}.self_attention.dense", (d, d), heads, bias),
        *declarations.column_linear(f"{name}.up", f"{source}.mlp.dense_h_to_4h", (f, d), columns, bias),
        *declarations.row_linear(f"{name}.down", f"{source}.mlp.dense_4h_to_h", (d, f), rows, bias),
    ]


def head_weights(config: ModelConfig) -> list[WeightSpec]:
    """Final norm and LM head."""
    norm = declarations.norm("final_norm", "transformer.ln_f", config.hidden_size, bias=True)
    return [*norm, lm_head(config, TABLE)]


FALCON = Family(
    architecture="FalconForCausalLM",
    model_type="falcon",
    other_names=("RWForCausalLM", "FalconModel", "RWModel"),
    read_fields=read_fields,
    passes={"decode": Pass[FalconConfig](embed, block, head, embed_weights, block_weights, head_weights, attention)},
    ignored_tensors=(r"lm_head\.weight",),  # a copy of the token table, where they are tied
)
