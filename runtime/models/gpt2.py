# SPDX-License-Identifier: Apache-2.0
"""GPT-2 (Radford et al. 2019): LayerNorm, learned positions, biases everywhere, weights stored ``[in, out]`` (Conv1D)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from phalanx.checkpoints.spec import Part, WeightSpec
from phalanx.parallel.sharding import Shard
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models import blocks
from phalanx.runtime.models.base import (
    Family,
    Pass,
    feed_forward_shard,
    head_shard,
    kv_head_shard,
    lm_head,
    token_table,
)
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.ops import AttentionSpec, Ops, Tensor

__all__ = ["GPT2", "Gpt2Config", "attention", "block", "embed", "head"]

TABLE = "transformer.wte.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpt2Config(ModelConfig):
    """Factor on the scores, and whether each layer divides it by its number, counted from 1 (BioMedLM)."""

    score_scale: float
    divides_by_layer: bool = False


def read_fields(reader: ConfigReader) -> Gpt2Config:
    """Read ``config.json`` of a ``GPT2LMHeadModel``."""
    width, heads = reader.either("n_embd", "hidden_size"), reader.either("n_head", "num_attention_heads")
    hidden_size, num_heads = reader.integer(width), reader.integer(heads)
    head_dim = reader.exact_quotient(width, heads)
    reader.ignore("n_ctx", "reorder_and_upcast_attn")  # the length of a mask that early checkpoints store; rounding
    return Gpt2Config(
        architecture="GPT2LMHeadModel",
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=reader.integer(reader.either("n_layer", "num_hidden_layers")),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        intermediate_size=reader.integer("n_inner", 4 * hidden_size),
        max_positions=reader.integer(reader.either("n_positions", "max_position_embeddings"), 1024),
        norm_eps=reader.number("layer_norm_epsilon", 1e-5),
        activation=reader.activation("activation_function", "gelu_new"),
        rope=None,
        tie_embeddings=reader.flag("tie_word_embeddings", True),
        score_scale=head_dim**-0.5 if reader.flag("scale_attn_weights", True) else 1.0,
        divides_by_layer=reader.flag("scale_attn_by_inverse_layer_idx", False),
        **reader.common(),
    )


def attention(config: Gpt2Config, layer: int) -> AttentionSpec:
    """The same in every layer but for its scale."""
    divisor = layer + 1 if config.divides_by_layer else 1
    return replace(AttentionSpec.of(config), scale=config.score_scale / divisor)


def embed(ops: Ops[Tensor], config: ModelConfig) -> Tensor:
    """Token rows plus position rows: ``[T, D]``."""
    return ops.position_embedding(ops.embedding("embed"), "positions")


def block(
    ops: Ops[Tensor], config: Gpt2Config, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block."""
    name = f"layers.{layer}"
    x, residual = ops.add_layer_norm(x, residual, f"{name}.attention_norm", config.norm_eps)
    x = blocks.attention(ops, name, layer, x, attention(config, layer))
    x, residual = ops.add_layer_norm(x, residual, f"{name}.mlp_norm", config.norm_eps)
    return blocks.mlp(ops, name, x, config.activation), residual


def head(ops: Ops[Tensor], config: ModelConfig, x: Tensor, residual: Tensor | None) -> Tensor:
    """Logits of the rows that need them: ``[B, V local]``."""
    x, _ = ops.add_layer_norm(x, residual, "final_norm", config.norm_eps)
    return ops.logits(x, "lm_head")


def embed_weights(config: ModelConfig) -> list[WeightSpec]:
    """Token and position tables."""
    d = config.hidden_size
    return [
        WeightSpec("embed.weight", (token_table(config, TABLE),)),
        WeightSpec("positions.weight", (_part("wpe.weight", (config.max_positions, d)),)),
    ]


def block_weights(config: ModelConfig, layer: int) -> list[WeightSpec]:
    """Weights of one block; ``c_attn`` holds q, k and v of all heads, one after the other."""
    d, f = config.hidden_size, config.intermediate_size
    name, source = f"layers.{layer}", f"h.{layer}"
    return [
        *_norm(f"{name}.attention_norm", f"{source}.ln_1", d),
        WeightSpec(f"{name}.qkv.weight", _qkv(config, f"{source}.attn.c_attn.weight", (d,))),
        WeightSpec(f"{name}.qkv.bias", _qkv(config, f"{source}.attn.c_attn.bias", ())),
        _conv1d(f"{name}.output", f"{source}.attn.c_proj", (d, d), head_shard(config, 1)),
        WeightSpec(f"{name}.output.bias", (_part(f"{source}.attn.c_proj.bias", (d,)),)),
        *_norm(f"{name}.mlp_norm", f"{source}.ln_2", d),
        _conv1d(f"{name}.up", f"{source}.mlp.c_fc", (f, d), feed_forward_shard(config, 0)),
        WeightSpec(f"{name}.up.bias", (_part(f"{source}.mlp.c_fc.bias", (f,), feed_forward_shard(config, 0)),)),
        _conv1d(f"{name}.down", f"{source}.mlp.c_proj", (d, f), feed_forward_shard(config, 1)),
        WeightSpec(f"{name}.down.bias", (_part(f"{source}.mlp.c_proj.bias", (d,)),)),
    ]


def head_weights(config: ModelConfig) -> list[WeightSpec]:
    """Final norm and LM head; the head is the token table itself where they are tied."""
    return [*_norm("final_norm", "ln_f", config.hidden_size), lm_head(config, TABLE)]


def _part(name: str, shape: tuple[int, ...], shard: Shard | None = None, transposed: bool = False) -> Part:
    """A source tensor; the published checkpoints leave the prefix ``transformer.`` out."""
    return Part(f"transformer.{name}", shape, shard, aliases=(name,), transposed=transposed)


def _conv1d(name: str, source: str, shape: tuple[int, int], shard: Shard) -> WeightSpec:
    return WeightSpec(f"{name}.weight", (_part(f"{source}.weight", shape, shard, transposed=True),))


def _norm(name: str, source: str, size: int) -> list[WeightSpec]:
    return [WeightSpec(f"{name}.{kind}", (_part(f"{source}.{kind}", (size,)),)) for kind in ("weight", "bias")]


def _qkv(config: ModelConfig, source: str, tail: tuple[int, ...]) -> tuple[Part, ...]:
    d = config.hidden_size
    shards = (head_shard(config, 0), kv_head_shard(config), kv_head_shard(config))
    return tuple(
        Part(
            f"transformer.{source}",
            (d, *tail),
            shard,
            aliases=(source,),
            transposed=bool(tail),
            first_row=index * d,
            source_rows=3 * d,
        )
        for index, shard in enumerate(shards)
    )


GPT2 = Family(
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    other_names=("GPT2Model",),
    read_fields=read_fields,
    passes={"decode": Pass[Gpt2Config](embed, block, head, embed_weights, block_weights, head_weights, attention)},
    # Published checkpoints also hold causal masks, and tied ones sometimes a copy of the token table.
    ignored_tensors=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)", r"lm_head\.weight"),
)
