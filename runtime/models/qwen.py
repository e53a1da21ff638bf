# SPDX-License-Identifier: Apache-2.0
"""Qwen 1 (Bai et al. 2023): Llama's block with biases of q, k and v, under GPT-2's names."""

from __future__ import annotations

from phalanx.checkpoints.spec import WeightSpec
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models import declarations, llama
from phalanx.runtime.models.base import Family, Pass, feed_forward_shard, head_shard, lm_head, token_table
from phalanx.runtime.models.hf_config import ConfigReader

__all__ = ["QWEN"]

TABLE = "transformer.wte.weight"


def read_fields(reader: ConfigReader) -> ModelConfig:
    """Read ``config.json`` of a ``QWenLMHeadModel``.

    ``use_dynamic_ntk`` and ``use_logn_attn`` act beyond ``seq_length`` alone, to which sequences are limited.
    """
    num_heads, head_dim = reader.integer("num_attention_heads"), reader.integer("kv_channels", 128)
    reader.refuse_unless("no_bias", True)
    reader.refuse_unless("rotary_pct", 1.0)
    reader.ignore("use_dynamic_ntk", "use_logn_attn", "onnx_safe", "bf16", "fp16", "fp32", "softmax_in_fp32",
                  "use_cache_kernel", "max_position_embeddings")  # fmt: skip
    return ModelConfig(
        architecture="QWenLMHeadModel",
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("hidden_size"),
        num_layers=reader.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        intermediate_size=reader.integer("intermediate_size") // 2,  # of both matrices of the gated part
        max_positions=reader.integer("seq_length", 2048),
        norm_eps=reader.number("layer_norm_epsilon", 1e-6),
        activation="silu",
        rope=reader.rope(head_dim, theta_key="rotary_emb_base"),
        tie_embeddings=reader.flag("tie_word_embeddings", False),
        **reader.common(),
    )


def embed_weights(config: ModelConfig) -> list[WeightSpec]:
    """The token table."""
    return [WeightSpec("embed.weight", (token_table(config, TABLE),))]


def block_weights(config: ModelConfig, layer: int) -> list[WeightSpec]:
    """Weights of one block: ``w2`` is the gate, ``w1`` up."""
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    name, source = f"layers.{layer}", f"transformer.h.{layer}"
    gate, up, down = (f"{source}.mlp.{kind}" for kind in ("w2", "w1", "c_proj"))
    inputs = head_shard(config, 1)
    return [
        *declarations.norm(f"{name}.attention_norm", f"{source}.ln_1", d),
        *declarations.stacked_qkv(config, f"{name}.qkv", f"{source}.attn.c_attn", bias=True),
        *declarations.row_linear(f"{name}.output", f"{source}.attn.c_proj", (d, heads), inputs),
        *declarations.norm(f"{name}.mlp_norm", f"{source}.ln_2", d),
        *declarations.gate_up(config, f"{name}.gate_up", (gate, up)),
        *declarations.row_linear(f"{name}.down", down, (d, f), feed_forward_shard(config, 1)),
    ]


def head_weights(config: ModelConfig) -> list[WeightSpec]:
    """Final norm and LM head."""
    return [*declarations.norm("final_norm", "transformer.ln_f", config.hidden_size), lm_head(config, TABLE)]


QWEN = Family(
    architecture="QWenLMHeadModel",
    model_type="qwen",
    other_names=("QWenModel",),
    read_fields=read_fields,
    passes={
        "decode": Pass[ModelConfig](
            llama.embed, llama.block, llama.head, embed_weights, block_weights, head_weights, llama.attention
        )
    },
    # Frequencies of the rotary embedding; a copy of the token table, where they are tied.
    ignored_tensors=(r"transformer\.rotary_emb\.inv_freq", r"lm_head\.weight"),
)
