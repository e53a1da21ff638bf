# SPDX-License-Identifier: Apache-2.0
"""GPT-J (Wang & Komatsuzaki 2021): one norm for parallel halves, rotary pairs of neighbouring channels, a bias at the head."""

from __future__ import annotations

from phalanx.checkpoints.spec import Part, WeightSpec
from phalanx.runtime.config import ModelConfig, RopeConfig
from phalanx.runtime.models import declarations
from phalanx.runtime.models.base import (
    Family,
    Pass,
    feed_forward_shard,
    head_shard,
    lm_head,
    token_table,
    vocabulary_shard,
)  # fmt: skip
from phalanx.runtime.models.gpt_neox import head
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.llama import attention, embed
from phalanx.runtime.ops import AttentionSpec, Ops, Tensor

__all__ = ["GPTJ", "parallel_halves"]

TABLE = "transformer.wte.weight"


def read_fields(reader: ConfigReader) -> ModelConfig:
    """Read ``config.json`` of a ``GPTJForCausalLM``. ``rotary_dim`` null: all of each head is rotated."""
    width, heads = reader.either("n_embd", "hidden_size"), reader.either("n_head", "num_attention_heads")
    head_dim = reader.exact_quotient(width, heads)
    rope = RopeConfig(rotary_dim=reader.nullable("rotary_dim", 64) or head_dim, interleaved=True)
    reader.ignore("n_ctx", "rotary")  # written by conversions; every GPT-J is rotary
    return ModelConfig(
        architecture="GPTJForCausalLM",
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer(width),
        num_layers=reader.integer(reader.either("n_layer", "num_hidden_layers")),
        num_heads=reader.integer(heads),
        num_kv_heads=reader.integer(heads),
        head_dim=head_dim,
        intermediate_size=reader.integer("n_inner", 4 * reader.integer(width)),
        max_positions=reader.integer(reader.either("n_positions", "max_position_embeddings"), 2048),
        norm_eps=reader.number("layer_norm_epsilon", 1e-5),
        activation=reader.activation("activation_function", "gelu_new"),
        rope=rope,
        tie_embeddings=reader.flag("tie_word_embeddings", False),
        **reader.common(),
    )


def embed_weights(config: ModelConfig) -> list[WeightSpec]:
    """The token table."""
    return [WeightSpec("embed.weight", (token_table(config, TABLE),))]


def block(
    ops: Ops[Tensor], config: ModelConfig, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block."""
    return parallel_halves(ops, config, layer, x, residual, attention(config, layer))


def parallel_halves(
    ops: Ops[Tensor], config: ModelConfig, layer: int, x: Tensor, residual: Tensor | None, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """Attention and feed-forward part of the same normed rows, with one sum over ranks."""
    name = f"layers.{layer}"
    x, residual = ops.add_layer_norm(x, residual, f"{name}.norm", config.norm_eps)
    y = ops.activation(ops.column_linear(x, f"{name}.up"), config.activation)
    x = ops.attention(ops.column_linear(x, f"{name}.qkv"), f"{name}.attention", layer, spec)
    return ops.row_linear_pair(x, f"{name}.output", y, f"{name}.down"), residual


def block_weights(config: ModelConfig, layer: int) -> list[WeightSpec]:
    """Weights of one block; only the feed-forward part has biases."""
    d, f = config.hidden_size, config.intermediate_size
    name, source = f"layers.{layer}", f"transformer.h.{layer}"
    q, k, v, out = (f"{source}.attn.{letter}_proj" for letter in ("q", "k", "v", "out"))
    columns, rows = feed_forward_shard(config, 0), feed_forward_shard(config, 1)
    return [
        *declarations.norm(f"{name}.norm", f"{source}.ln_1", d, bias=True),
        *declarations.qkv(config, f"{name}.qkv", (q, k, v)),
        *declarations.row_linear(f"{name}.output", out, (d, d), head_shard(config, 1)),
        *declarations.column_linear(f"{name}.up", f"{source}.mlp.fc_in", (f, d), columns, bias=True),
        *declarations.row_linear(f"{name}.down", f"{source}.mlp.fc_out", (d, f), rows, bias=True),
    ]


def head_weights(config: ModelConfig) -> list[WeightSpec]:
    """Final norm, LM head and its bias."""
    bias = WeightSpec("lm_head.bias", (Part("lm_head.bias", (config.vocab_size,), vocabulary_shard()),))
    norm = declarations.norm("final_norm", "transformer.ln_f", config.hidden_size, bias=True)
    return [*norm, lm_head(config, TABLE), bias]


GPTJ = Family(
    architecture="GPTJForCausalLM",
    model_type="gptj",
    other_names=("GPTJModel",),
    read_fields=read_fields,
    passes={"decode": Pass[ModelConfig](embed, block, head, embed_weights, block_weights, head_weights, attention)},
    # Causal masks of older files; a copy of the token table, where they are tied.
    ignored_tensors=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)", r"lm_head\.weight"),
)
