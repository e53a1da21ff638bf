# SPDX-License-Identifier: Apache-2.0
"""Baichuan 1 and 2 (Yang et al. 2023): Llama's block; 13B has ALiBi in place of a rotary embedding, 2 an LM head of unit rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from phalanx.checkpoints.spec import WeightSpec
from phalanx.checkpoints.unit_rows import UnitRows
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.alibi import alibi_slopes
from phalanx.runtime.config import ModelConfig, RopeConfig
from phalanx.runtime.models import blocks, declarations, llama
from phalanx.runtime.models.base import Family, Pass, feed_forward_shard, head_shard
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.ops import AttentionSpec, Ops, Tensor

__all__ = ["BAICHUAN"]

HIDDEN_SIZES = {4096: True, 5120: False}
"""Of 7B and 13B, and whether they rotate; no key says so."""
VOCAB_SIZE_OF_2 = 125696
"""Version 2 is known by it alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaichuanConfig(ModelConfig):
    """``has_unit_head``: rows of the LM head are divided by their lengths."""

    has_unit_head: bool


def read_fields(reader: ConfigReader) -> BaichuanConfig:
    """Read ``config.json`` of a ``BaichuanForCausalLM``. 13B gives the length as ``model_max_length`` alone."""
    head_dim, num_heads = (
        reader.exact_quotient("hidden_size", "num_attention_heads"),
        reader.integer("num_attention_heads"),
    )
    hidden_size, vocab_size = reader.integer("hidden_size"), reader.integer("vocab_size")
    rotates = HIDDEN_SIZES.get(hidden_size, reader.value("max_position_embeddings") is not None)
    rope, longest = reader.rope(head_dim), reader.integer("model_max_length", 4096)
    if not rotates and rope != RopeConfig(rotary_dim=head_dim):
        raise ConfigError("config.json has rotary parameters, but this size of Baichuan has ALiBi; remove them")
    reader.ignore("z_loss_weight")
    return BaichuanConfig(
        architecture="BaichuanForCausalLM",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=reader.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        intermediate_size=reader.integer("intermediate_size"),
        max_positions=reader.integer("max_position_embeddings", longest),
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        activation=reader.activation("hidden_act", "silu"),
        rope=rope if rotates else None,
        tie_embeddings=reader.flag("tie_word_embeddings", False),
        has_unit_head=vocab_size == VOCAB_SIZE_OF_2,
        **reader.common(),
    )


def attention(config: BaichuanConfig, layer: int) -> AttentionSpec:
    """Rotary embedding or ALiBi, the same in every layer."""
    slopes = alibi_slopes(config.num_heads) if config.rope is None else None
    return replace(AttentionSpec.of(config), alibi_slopes=slopes)


def block(
    ops: Ops[Tensor], config: BaichuanConfig, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block."""
    return blocks.pre_norm(ops, config, layer, x, residual, attention(config, layer))


def block_weights(config: BaichuanConfig, layer: int) -> list[WeightSpec]:
    """Llama's, with q, k and v in one matrix."""
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    name, source = f"layers.{layer}", f"model.layers.{layer}"
    gate, up, down = (f"{source}.mlp.{kind}_proj" for kind in ("gate", "up", "down"))
    inputs = head_shard(config, 1)
    return [
        *declarations.norm(f"{name}.attention_norm", f"{source}.input_layernorm", d),
        *declarations.stacked_qkv(config, f"{name}.qkv", f"{source}.self_attn.W_pack"),
        *declarations.row_linear(f"{name}.output", f"{source}.self_attn.o_proj", (d, heads), inputs),
        *declarations.norm(f"{name}.mlp_norm", f"{source}.post_attention_layernorm", d),
        *declarations.gate_up(config, f"{name}.gate_up", (gate, up)),
        *declarations.row_linear(f"{name}.down", down, (d, f), feed_forward_shard(config, 1)),
    ]


def head_weights(config: BaichuanConfig) -> list[WeightSpec]:
    """Final norm and LM head."""
    norm, head = llama.head_weights(config)
    if not config.has_unit_head:
        return [norm, head]
    return [norm, replace(head, parts=tuple(replace(part, encoding=UnitRows()) for part in head.parts))]


BAICHUAN = Family(
    architecture="BaichuanForCausalLM",
    model_type="baichuan",
    other_names=("BaiChuanForCausalLM", "BaichuanModel"),
    read_fields=read_fields,
    passes={
        "decode": Pass[BaichuanConfig](
            llama.embed, block, llama.head, llama.embed_weights, block_weights, head_weights, attention
        )
    },
    # Frequencies of the rotary embedding; a copy of the token table, where they are tied.
    ignored_tensors=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", *llama.LLAMA.ignored_tensors),
)
