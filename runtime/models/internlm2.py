# SPDX-License-Identifier: Apache-2.0
"""InternLM 2 and 2.5 (Cai et al. 2024): Llama's block; q, k and v are stored by key/value head, under other names."""

from __future__ import annotations

from phalanx.checkpoints.spec import WeightSpec
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models import declarations, llama
from phalanx.runtime.models.base import Family, Pass, feed_forward_shard, head_shard, lm_head, token_table
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.llama import LlamaConfig

__all__ = ["INTERNLM2"]

TABLE, HEAD = "model.tok_embeddings.weight", "output.weight"


def read_fields(reader: ConfigReader) -> LlamaConfig:
    """Read ``config.json`` of an ``InternLM2ForCausalLM``."""
    head_dim = reader.exact_quotient("hidden_size", "num_attention_heads")
    return LlamaConfig(
        architecture="InternLM2ForCausalLM",
        **llama.decoder_fields(reader, head_dim, max_positions=2048, norm_eps=1e-6),
        activation=reader.activation("hidden_act", "silu"),
        rope=reader.rope(head_dim),
        tie_embeddings=reader.flag("tie_word_embeddings", False),
        attention_bias=reader.flag("bias", True),
    )


def embed_weights(config: ModelConfig) -> list[WeightSpec]:
    """The token table."""
    return [WeightSpec("embed.weight", (token_table(config, TABLE, HEAD),))]


def block_weights(config: LlamaConfig, layer: int) -> list[WeightSpec]:
    """Weights of one block: ``w1`` is the gate, ``w3`` up, ``w2`` down."""
    d, f, heads, bias = config.hidden_size, config.intermediate_size, config.num_heads, config.attention_bias
    name, source = f"layers.{layer}", f"model.layers.{layer}"
    gate, up, down = (f"{source}.feed_forward.{kind}" for kind in ("w1", "w3", "w2"))
    shape, inputs = (d, heads * config.head_dim), head_shard(config, 1)
    return [
        *declarations.norm(f"{name}.attention_norm", f"{source}.attention_norm", d),
        *declarations.fused_qkv(config, f"{name}.qkv", f"{source}.attention.wqkv", bias),
        *declarations.row_linear(f"{name}.output", f"{source}.attention.wo", shape, inputs, bias),
        *declarations.norm(f"{name}.mlp_norm", f"{source}.ffn_norm", d),
        *declarations.gate_up(config, f"{name}.gate_up", (gate, up)),
        *declarations.row_linear(f"{name}.down", down, (d, f), feed_forward_shard(config, 1)),
    ]


def head_weights(config: ModelConfig) -> list[WeightSpec]:
    """Final norm and LM head."""
    return [*declarations.norm("final_norm", "model.norm", config.hidden_size), lm_head(config, TABLE, HEAD)]


INTERNLM2 = Family(
    architecture="InternLM2ForCausalLM",
    model_type="internlm2",
    other_names=("InternLM2Model",),
    read_fields=read_fields,
    passes={
        "decode": Pass[LlamaConfig](
            llama.embed, llama.block, llama.head, embed_weights, block_weights, head_weights, llama.attention
        )
    },
    ignored_tensors=(r"output\.weight",),  # a copy of the token table, where they are tied
)
