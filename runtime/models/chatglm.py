# SPDX-License-Identifier: Apache-2.0
"""ChatGLM 2 and 3, and GLM-4-9B (GLM team 2024) in the form of their own code: GLM-4 under other names."""

from __future__ import annotations

from phalanx.checkpoints.spec import WeightSpec
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.config import ModelConfig, RopeConfig
from phalanx.runtime.models import declarations, llama
from phalanx.runtime.models.base import Family, Pass, feed_forward_shard, head_shard, lm_head, token_table
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.llama import LlamaConfig

__all__ = ["CHATGLM", "refuse_own_quantisation"]

TABLE, HEAD = "transformer.embedding.word_embeddings.weight", "transformer.output_layer.weight"


def read_fields(reader: ConfigReader) -> LlamaConfig:
    """Read ``config.json`` of a ``ChatGLMModel`` (version 2 on). ``rope_ratio`` multiplies the base, as in GLM-4."""
    refuse_own_quantisation(reader)
    for name, value in {"rmsnorm": True, "post_layer_norm": True, "original_rope": True}.items():
        reader.refuse_unless(name, value)
    for name in ("apply_residual_connection_post_layernorm", "position_encoding_2d", "interleaved_qkv"):
        reader.refuse_unless(name, False)
    # The first cancels out; the others are about rounding, the vocabulary before padding, and prefix tuning without a prefix.
    reader.ignore("apply_query_key_layer_scaling", "fp32_residual_connection", "vocab_size", "prefix_projection")
    num_heads, head_dim = reader.integer("num_attention_heads"), reader.integer("kv_channels", 128)
    has_groups, groups = reader.flag("multi_query_attention", False), reader.integer("multi_query_group_num", 1)
    linear_bias = reader.flag("add_bias_linear", True)
    return LlamaConfig(
        architecture="ChatGLMModel",
        vocab_size=reader.integer("padded_vocab_size"),
        hidden_size=reader.integer("hidden_size"),
        num_layers=reader.integer(reader.either("num_layers", "num_hidden_layers")),
        num_heads=num_heads,
        num_kv_heads=groups if has_groups else num_heads,
        head_dim=head_dim,
        intermediate_size=reader.integer("ffn_hidden_size"),
        max_positions=reader.integer("seq_length", 2048),
        norm_eps=reader.number("layernorm_epsilon", 1e-5),
        activation="silu",
        rope=RopeConfig(1e4 * reader.number("rope_ratio", 1.0), head_dim // 2, interleaved=True),
        tie_embeddings=reader.flag("tie_word_embeddings", False),
        attention_bias=reader.flag("add_qkv_bias", False) or linear_bias,
        mlp_bias=linear_bias,
        **reader.common(),
    )


def refuse_own_quantisation(reader: ConfigReader) -> None:
    """Refuse weights that the checkpoint's own code has quantised. Raises ConfigError."""
    if reader.value("quantization_bit", 0):
        raise ConfigError(
            f"quantization_bit={reader.value('quantization_bit')!r} in config.json: the weights are in a format of the checkpoint's own "
            "code, which is not read; use the checkpoint in float16, with --quantize if it is too large"
        )
    reader.ignore("quantization_embeddings")


def embed_weights(config: ModelConfig) -> list[WeightSpec]:
    """The token table."""
    return [WeightSpec("embed.weight", (token_table(config, TABLE, HEAD),))]


def block_weights(config: LlamaConfig, layer: int) -> list[WeightSpec]:
    """Weights of one block; q, k and v lie one after the other, or head by head where each has its own keys."""
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    name, source, bias = f"layers.{layer}", f"transformer.encoder.layers.{layer}", config.mlp_bias
    qkv = declarations.fused_qkv if config.num_kv_heads == config.num_heads else declarations.stacked_qkv
    dense, down, rows = f"{source}.self_attention.dense", f"{source}.mlp.dense_4h_to_h", feed_forward_shard(config, 1)
    return [
        *declarations.norm(f"{name}.attention_norm", f"{source}.input_layernorm", d),
        *qkv(config, f"{name}.qkv", f"{source}.self_attention.query_key_value", config.attention_bias),
        *declarations.row_linear(f"{name}.output", dense, (d, heads), head_shard(config, 1), bias),
        *declarations.norm(f"{name}.mlp_norm", f"{source}.post_attention_layernorm", d),
        *declarations.stacked_gate_up(config, f"{name}.gate_up", f"{source}.mlp.dense_h_to_4h", bias),
        *declarations.row_linear(f"{name}.down", down, (d, f), rows, bias),
    ]


def head_weights(config: ModelConfig) -> list[WeightSpec]:
    """Final norm and LM head."""
    norm = declarations.norm("final_norm", "transformer.encoder.final_layernorm", config.hidden_size)
    return [*norm, lm_head(config, TABLE, HEAD)]


CHATGLM = Family(
    architecture="ChatGLMModel",
    model_type="chatglm",
    other_names=("ChatGLMForConditionalGeneration",),
    read_fields=read_fields,
    passes={
        "decode": Pass[LlamaConfig](
            llama.embed, llama.block, llama.head, embed_weights, block_weights, head_weights, llama.attention
        )
    },
    # Frequencies of the rotary embedding; a copy of the token table, where they are tied.
    ignored_tensors=(r"transformer\.rotary_pos_emb\.inv_freq", r"transformer\.output_layer\.weight"),
)
