# SPDX-License-Identifier: Apache-2.0
"""OPT and Galactica (Zhang et al. 2022): GPT-2's block with ReLU; OPT-350m norms after each half and has narrower embeddings."""

from __future__ import annotations

from dataclasses import dataclass

from phalanx.checkpoints.spec import Part, WeightSpec
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models import blocks, declarations
from phalanx.runtime.models.base import Family, Pass, feed_forward_shard, head_shard, vocabulary_shard
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.llama import attention
from phalanx.runtime.ops import Ops, Tensor

__all__ = ["OPT"]

PREFIX = "model."
DECODER = f"{PREFIX}decoder"
FIRST_POSITION = 2
"""The row of the position table that the first token takes; those before it belong to padding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptConfig(ModelConfig):
    """What tells the sizes apart.

    Attributes:
        norm_first: each half norms its input, and the last block is normed; otherwise each half's sum is normed.
        has_final_norm: a norm after the last block.
        embed_size: width of token rows and LM head, projected from and to D where they differ.
        has_bias: matrices have biases.
        has_norm_weights: norms have weights and biases (``layer_norm_elementwise_affine``).
    """

    norm_first: bool
    has_final_norm: bool
    embed_size: int
    has_bias: bool
    has_norm_weights: bool


def read_fields(reader: ConfigReader) -> OptConfig:
    """Read ``config.json`` of an ``OPTForCausalLM``; epsilon is not in it."""
    norm_first, num_heads = reader.flag("do_layer_norm_before", True), reader.integer("num_attention_heads")
    reader.refuse_unless("learned_embeddings", True)
    reader.refuse_unless("scale_embeddings", False)
    is_removed = reader.flag("_remove_final_layer_norm", False)
    return OptConfig(
        architecture="OPTForCausalLM",
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("hidden_size"),
        num_layers=reader.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=reader.exact_quotient("hidden_size", "num_attention_heads"),
        intermediate_size=reader.integer("ffn_dim"),
        max_positions=reader.integer("max_position_embeddings", 2048),
        norm_eps=1e-5,
        activation=reader.activation("activation_function", "relu"),
        rope=None,
        tie_embeddings=reader.flag("tie_word_embeddings", True),
        norm_first=norm_first,
        has_final_norm=norm_first and not is_removed,
        embed_size=reader.integer("word_embed_proj_dim", reader.integer("hidden_size")),
        has_bias=reader.flag("enable_bias", True),
        has_norm_weights=reader.flag("layer_norm_elementwise_affine", True),
        **reader.common(),
    )


def embed(ops: Ops[Tensor], config: OptConfig) -> Tensor:
    """Token rows, brought to width D, plus position rows: ``[T, D]``."""
    x = ops.embedding("embed")
    x = x if config.embed_size == config.hidden_size else ops.linear(x, "project_in")
    return ops.position_embedding(x, "positions")


def block(
    ops: Ops[Tensor], config: OptConfig, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One decoder block; with norms after each half nothing is left to add."""
    name, eps, spec = f"layers.{layer}", config.norm_eps, attention(config, layer)
    if config.norm_first:
        x, residual = ops.add_layer_norm(x, residual, f"{name}.attention_norm", eps)
        x = blocks.attention(ops, name, layer, x, spec)
        x, residual = ops.add_layer_norm(x, residual, f"{name}.mlp_norm", eps)
        return blocks.mlp(ops, name, x, config.activation), residual
    x = ops.layer_norm(ops.add(blocks.attention(ops, name, layer, x, spec), x), f"{name}.attention_norm", eps)
    return ops.layer_norm(ops.add(blocks.mlp(ops, name, x, config.activation), x), f"{name}.mlp_norm", eps), None


def head(ops: Ops[Tensor], config: OptConfig, x: Tensor, residual: Tensor | None) -> Tensor:
    """Logits of the rows that need them: ``[B, V local]``."""
    if config.has_final_norm:
        x, _ = ops.add_layer_norm(x, residual, "final_norm", config.norm_eps)
    elif residual is not None:
        x = ops.add(x, residual)
    x = x if config.embed_size == config.hidden_size else ops.linear(x, "project_out")
    return ops.logits(x, "lm_head")


def embed_weights(config: OptConfig) -> list[WeightSpec]:
    """Token table, its projection, and positions; the two rows that are not positions follow, where none looks them up."""
    d, e, rows = config.hidden_size, config.embed_size, config.max_positions
    whole, source = rows + FIRST_POSITION, f"{DECODER}.embed_positions.weight"
    table = (
        Part(source, (rows, d), first_row=FIRST_POSITION, source_rows=whole),
        Part(source, (FIRST_POSITION, d), source_rows=whole),
    )
    specs = [WeightSpec("embed.weight", (_token_rows(config),)), WeightSpec("positions.weight", table)]
    return declarations.also_without(PREFIX, [*specs, *([] if e == d else [_whole("project_in", (d, e))])])


def block_weights(config: OptConfig, layer: int) -> list[WeightSpec]:
    """Weights of one block; its ``final_layer_norm`` is the feed-forward part's."""
    d, f, bias = config.hidden_size, config.intermediate_size, config.has_bias
    name, source = f"layers.{layer}", f"{DECODER}.layers.{layer}"
    q, k, v, out = (f"{source}.self_attn.{kind}_proj" for kind in ("q", "k", "v", "out"))
    columns, rows = feed_forward_shard(config, 0), feed_forward_shard(config, 1)
    specs = [
        *_norm(config, f"{name}.attention_norm", f"{source}.self_attn_layer_norm"),
        *declarations.qkv(config, f"{name}.qkv", (q, k, v), bias),
        *declarations.row_linear(f"{name}.output", out, (d, d), head_shard(config, 1), bias),
        *_norm(config, f"{name}.mlp_norm", f"{source}.final_layer_norm"),
        *declarations.column_linear(f"{name}.up", f"{source}.fc1", (f, d), columns, bias),
        *declarations.row_linear(f"{name}.down", f"{source}.fc2", (d, f), rows, bias),
    ]
    return declarations.also_without(PREFIX, specs)


def head_weights(config: OptConfig) -> list[WeightSpec]:
    """Final norm, projection to the width of token rows, and LM head."""
    d, e = config.hidden_size, config.embed_size
    norm = _norm(config, "final_norm", f"{DECODER}.final_layer_norm")
    own = Part("lm_head.weight", (config.vocab_size, e), vocabulary_shard())
    table = WeightSpec("lm_head.weight", (_token_rows(config) if config.tie_embeddings else own,))
    projection = [] if e == d else [_whole("project_out", (e, d))]
    return declarations.also_without(PREFIX, [*(norm if config.has_final_norm else []), *projection, table])


def _norm(config: OptConfig, name: str, source: str) -> list[WeightSpec]:
    return declarations.norm(name, source, config.hidden_size, bias=True) if config.has_norm_weights else []


def _token_rows(config: OptConfig) -> Part:
    aliases = ("lm_head.weight",) if config.tie_embeddings else ()
    shape = (config.vocab_size, config.embed_size)
    return Part(f"{DECODER}.embed_tokens.weight", shape, vocabulary_shard(), aliases)


def _whole(name: str, shape: tuple[int, int]) -> WeightSpec:
    return WeightSpec(f"{name}.weight", (Part(f"{DECODER}.{name}.weight", shape),))


OPT = Family(
    architecture="OPTForCausalLM",
    model_type="opt",
    other_names=("OPTModel",),
    read_fields=read_fields,
    passes={"decode": Pass[OptConfig](embed, block, head, embed_weights, block_weights, head_weights, attention)},
    ignored_tensors=(r"lm_head\.weight",),  # a copy of the token table, where they are tied
)
