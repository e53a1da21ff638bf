# SPDX-License-Identifier: Apache-2.0
"""MPT (MosaicML 2023): GPT-2's block with ALiBi in place of positions and without any bias."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from phalanx.checkpoints.spec import WeightSpec
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.alibi import alibi_slopes
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models import blocks, declarations
from phalanx.runtime.models.base import Family, Pass, feed_forward_shard, head_shard, lm_head, token_table
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.llama import embed
from phalanx.runtime.ops import AttentionSpec, Ops, Tensor
from phalanx.runtime.token_fields import shown

__all__ = ["MPT"]

TABLE = "transformer.wte.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class MptConfig(ModelConfig):
    """What ``attn_config`` says, and the factor on the logits.

    Attributes:
        score_scale: factor on the scores.
        bias_max: the last head's ALiBi slope is ``2^-bias_max``.
        clip_qkv: limit of queries, keys and values; 0 = none.
        logit_scale: factor on the logits.
    """

    score_scale: float
    bias_max: float
    clip_qkv: float
    logit_scale: float


def read_fields(reader: ConfigReader) -> MptConfig:
    """Read ``config.json`` of an ``MPTForCausalLM``."""
    width, heads = reader.either("d_model", "hidden_size"), reader.either("n_heads", "num_attention_heads")
    num_heads, head_dim = reader.integer(heads), reader.exact_quotient(width, heads)
    reader.refuse_unless("no_bias", True)
    if reader.value("norm_type", "low_precision_layernorm") not in ("low_precision_layernorm", "layernorm"):
        reader.refuse_unless("norm_type", "low_precision_layernorm")
    # ALiBi replaces positions whatever learned_pos_emb says; the others act on gradients, initial values and logs.
    reader.ignore("learned_pos_emb", "embedding_fraction", "init_config", "verbose", "emb_pdrop", "tokenizer_name")
    reader.refuse_unless("fc_type", "torch")
    _check_feed_forward(_nested(reader, "ffn_config"))
    return MptConfig(
        architecture="MPTForCausalLM",
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer(width),
        num_layers=reader.integer(reader.either("n_layers", "num_hidden_layers")),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        intermediate_size=reader.integer("expansion_ratio", 4) * reader.integer(width),
        max_positions=reader.integer("max_seq_len", 2048),
        norm_eps=reader.number("layer_norm_epsilon", 1e-5),
        activation="gelu",
        rope=None,
        tie_embeddings=reader.flag("tie_word_embeddings", True),
        logit_scale=_logit_scale(reader, reader.integer(width)),
        **_attention_fields(_nested(reader, "attn_config"), num_heads, head_dim),
        **reader.common(),
    )


def _logit_scale(reader: ConfigReader, hidden_size: int) -> float:
    """A number, or ``inv_sqrt_d_model``, as llm-foundry reads it; transformers ignores it."""
    if reader.value("logit_scale") == "inv_sqrt_d_model":
        return 1 / math.sqrt(hidden_size)
    return reader.number("logit_scale", 1.0)


def _nested(reader: ConfigReader, name: str) -> ConfigReader:
    fields = reader.value(name, {})
    if not isinstance(fields, dict):
        raise ConfigError(f"{name}={shown(fields)} in config.json is not a JSON object; the file is damaged")
    return ConfigReader(fields)


def _check_feed_forward(reader: ConfigReader) -> None:
    """``ffn_config``, which newer versions of llm-foundry write, must ask for nothing else."""
    reader.refuse_unless("ffn_type", "mptmlp")
    reader.refuse_unless("fc_type", "torch")
    reader.finish("ffn_config of MPTForCausalLM")


def _attention_fields(reader: ConfigReader, num_heads: int, head_dim: int) -> dict[str, Any]:
    """What only `MptConfig` has, from ``attn_config``, whose other fields must ask for nothing else."""
    required = {
        "attn_type": "multihead_attention", "alibi": True, "prefix_lm": False, "qk_ln": False, "attn_uses_sequence_id": False,
        "rope": False, "sliding_window_size": -1, "kv_n_heads": num_heads, "fused_qkv": True,
    }  # fmt: skip
    for name, value in required.items():
        reader.refuse_unless(name, value)
    reader.ignore("attn_impl", "attn_pdrop", "dtype", "torch_dtype")
    reader.ignore("rope_theta", "rope_impl", "rope_dail_config", "rope_hf_config")  # of `rope`
    numbers = {
        "score_scale": reader.number("softmax_scale", head_dim**-0.5),
        "bias_max": reader.number("alibi_bias_max", 8),
        "clip_qkv": reader.number("clip_qkv", 0),
    }
    reader.finish("attn_config of MPTForCausalLM")
    return numbers


def attention(config: MptConfig, layer: int) -> AttentionSpec:
    """ALiBi in every layer."""
    slopes = alibi_slopes(config.num_heads, config.bias_max)
    return replace(AttentionSpec.of(config), scale=config.score_scale, alibi_slopes=slopes)


def embed_weights(config: ModelConfig) -> list[WeightSpec]:
    """The token table."""
    return [WeightSpec("embed.weight", (token_table(config, TABLE),))]


def block(ops: Ops[Tensor], config: MptConfig, layer: int, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """One decoder block."""
    name = f"layers.{layer}"
    x, residual = ops.add_layer_norm(x, residual, f"{name}.attention_norm", config.norm_eps)
    qkv = ops.column_linear(x, f"{name}.qkv")
    qkv = ops.clip(qkv, config.clip_qkv) if config.clip_qkv else qkv
    x = ops.row_linear(ops.attention(qkv, f"{name}.attention", layer, attention(config, layer)), f"{name}.output")
    x, residual = ops.add_layer_norm(x, residual, f"{name}.mlp_norm", config.norm_eps)
    return blocks.mlp(ops, name, x, config.activation), residual


def block_weights(config: ModelConfig, layer: int) -> list[WeightSpec]:
    """Weights of one block."""
    d, f = config.hidden_size, config.intermediate_size
    name, source = f"layers.{layer}", f"transformer.blocks.{layer}"
    columns, rows = feed_forward_shard(config, 0), feed_forward_shard(config, 1)
    return [
        *declarations.norm(f"{name}.attention_norm", f"{source}.norm_1", d),
        *declarations.stacked_qkv(config, f"{name}.qkv", f"{source}.attn.Wqkv"),
        *declarations.row_linear(f"{name}.output", f"{source}.attn.out_proj", (d, d), head_shard(config, 1)),
        *declarations.norm(f"{name}.mlp_norm", f"{source}.norm_2", d),
        *declarations.column_linear(f"{name}.up", f"{source}.ffn.up_proj", (f, d), columns),
        *declarations.row_linear(f"{name}.down", f"{source}.ffn.down_proj", (d, f), rows),
    ]


def head(ops: Ops[Tensor], config: MptConfig, x: Tensor, residual: Tensor | None) -> Tensor:
    """Logits of the rows that need them, scaled: ``[B, V local]``."""
    x, _ = ops.add_layer_norm(x, residual, "final_norm", config.norm_eps)
    return ops.logits(x if config.logit_scale == 1.0 else ops.scale(x, config.logit_scale), "lm_head")


def head_weights(config: ModelConfig) -> list[WeightSpec]:
    """Final norm and LM head."""
    return [*declarations.norm("final_norm", "transformer.norm_f", config.hidden_size), lm_head(config, TABLE)]


MPT = Family(
    architecture="MPTForCausalLM",
    model_type="mpt",
    other_names=("MptForCausalLM", "MptModel"),
    read_fields=read_fields,
    passes={"decode": Pass[MptConfig](embed, block, head, embed_weights, block_weights, head_weights, attention)},
    ignored_tensors=(r"lm_head\.weight",),  # a copy of the token table, where they are tied
)
