# SPDX-License-Identifier: Apache-2.0
"""ChatGLM-6B, the first (Du et al. 2022): a prefix that sees all of itself, positions in two dimensions, scaled residuals."""

from __future__ import annotations

from dataclasses import dataclass, replace

from phalanx.checkpoints.spec import WeightSpec
from phalanx.runtime.config import ModelConfig, RopeConfig
from phalanx.runtime.models import blocks, declarations, llama
from phalanx.runtime.models.base import Family, Pass, feed_forward_shard, head_shard, lm_head, token_table
from phalanx.runtime.models.chatglm import refuse_own_quantisation
from phalanx.runtime.models.gpt_neox import head
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.ops import AttentionSpec, Ops, Tensor

__all__ = ["CHATGLM1"]

TABLE = "transformer.word_embeddings.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatGlm1Config(ModelConfig):
    """``prefix_end``: the tokens [gMASK] and <sop>, between which the prefix ends and after which the answer begins."""

    prefix_end: tuple[int, int]


def read_fields(reader: ConfigReader) -> ChatGlm1Config:
    """Read ``config.json`` of a ``ChatGLMModel`` of version 1; absent token ids are those of its first revision."""
    width, heads = "hidden_size", "num_attention_heads"
    refuse_own_quantisation(reader)
    reader.refuse_unless("position_encoding_2d", True)
    reader.ignore("prefix_projection")  # of prefix tuning, which `pre_seq_len` switches on
    head_dim = reader.exact_quotient(width, heads)
    return ChatGlm1Config(
        architecture="ChatGLMForConditionalGeneration",
        vocab_size=reader.integer("vocab_size", 150528),
        hidden_size=reader.integer(width),
        num_layers=reader.integer("num_layers"),
        num_heads=reader.integer(heads),
        num_kv_heads=reader.integer(heads),
        head_dim=head_dim,
        intermediate_size=reader.integer("inner_hidden_size", 4 * reader.integer(width)),
        max_positions=reader.integer("max_sequence_length", 2048),
        norm_eps=reader.number("layernorm_epsilon", 1e-5),
        activation="gelu_tanh",
        rope=RopeConfig(rotary_dim=head_dim // 2, two_dimensional=True),
        tie_embeddings=reader.flag("tie_word_embeddings", True),
        prefix_end=_prefix_end(reader),
        **reader.common(),
    )


def _prefix_end(reader: ConfigReader) -> tuple[int, int]:
    gmask, start = (
        reader.integer(key, value, minimum=0) for key, value in (("gmask_token_id", 150001), ("bos_token_id", 150004))
    )
    return gmask, start


def attention(config: ChatGlm1Config, layer: int) -> AttentionSpec:
    """The same in every layer."""
    return replace(AttentionSpec.of(config), prefix_end=config.prefix_end)


def block(
    ops: Ops[Tensor], config: ChatGlm1Config, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, None]:
    """One decoder block: each half is added to its normed input times sqrt(2 L)."""
    name, scale = f"layers.{layer}", (2 * config.num_layers) ** 0.5
    x = ops.layer_norm(x, f"{name}.attention_norm", config.norm_eps)
    x = ops.add(blocks.attention(ops, name, layer, x, attention(config, layer)), ops.scale(x, scale))
    x = ops.layer_norm(x, f"{name}.mlp_norm", config.norm_eps)
    return ops.add(blocks.mlp(ops, name, x, config.activation), ops.scale(x, scale)), None


def embed_weights(config: ModelConfig) -> list[WeightSpec]:
    """The token table."""
    return [WeightSpec("embed.weight", (token_table(config, TABLE),))]


def block_weights(config: ModelConfig, layer: int) -> list[WeightSpec]:
    """Weights of one block; ``query_key_value`` holds q, k and v head by head."""
    d, f = config.hidden_size, config.intermediate_size
    name, source = f"layers.{layer}", f"transformer.layers.{layer}"
    columns, rows, heads = feed_forward_shard(config, 0), feed_forward_shard(config, 1), head_shard(config, 1)
    return [
        *declarations.norm(f"{name}.attention_norm", f"{source}.input_layernorm", d, bias=True),
        *declarations.fused_qkv(config, f"{name}.qkv", f"{source}.attention.query_key_value", bias=True),
        *declarations.row_linear(f"{name}.output", f"{source}.attention.dense", (d, d), heads, bias=True),
        *declarations.norm(f"{name}.mlp_norm", f"{source}.post_attention_layernorm", d, bias=True),
        *declarations.column_linear(f"{name}.up", f"{source}.mlp.dense_h_to_4h", (f, d), columns, bias=True),
        *declarations.row_linear(f"{name}.down", f"{source}.mlp.dense_4h_to_h", (d, f), rows, bias=True),
    ]


def head_weights(config: ModelConfig) -> list[WeightSpec]:
    """Final norm and LM head."""
    norm = declarations.norm("final_norm", "transformer.final_layernorm", config.hidden_size, bias=True)
    return [*norm, lm_head(config, TABLE)]


CHATGLM1 = Family(
    architecture="ChatGLMForConditionalGeneration",
    model_type="chatglm",
    other_names=("ChatGLMModel",),
    told_by=("inner_hidden_size", "max_sequence_length", "gmask_token_id"),
    read_fields=read_fields,
    passes={
        "decode": Pass[ChatGlm1Config](llama.embed, block, head, embed_weights, block_weights, head_weights, attention)
    },
    ignored_tensors=(r"transformer\.layers\.\d+\.attention\.rotary_emb\.inv_freq", r"lm_head\.weight"),
)
