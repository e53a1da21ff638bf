# SPDX-License-Identifier: Apache-2.0
"""SantaCoder and StarCoder (Li et al. 2023): GPT-2's block with one key/value head for all queries, weights ``[out, in]``."""

from __future__ import annotations

from phalanx.checkpoints.spec import Part, WeightSpec
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models import declarations
from phalanx.runtime.models.base import Family, Pass, feed_forward_shard, head_shard, lm_head, token_table
from phalanx.runtime.models.gpt2 import Gpt2Config, attention, block, embed, head
from phalanx.runtime.models.hf_config import ConfigReader

__all__ = ["GPT_BIGCODE"]

PREFIX = "transformer."
TABLE = f"{PREFIX}wte.weight"


def read_fields(reader: ConfigReader) -> Gpt2Config:
    """Read ``config.json`` of a ``GPTBigCodeForCausalLM``; ``multi_query`` decides how many key/value heads there are."""
    width, heads = reader.either("n_embd", "hidden_size"), reader.either("n_head", "num_attention_heads")
    num_heads, head_dim = reader.integer(heads), reader.exact_quotient(width, heads)
    num_kv_heads = 1 if reader.flag("multi_query", True) else num_heads
    reader.refuse_unless("num_key_value_heads", num_kv_heads)  # repeated by transformers 5
    # Of an inference runner of the reference implementation, which does not change results.
    reader.ignore(
        "inference_runner", "validate_runner_input", "pre_allocate_kv_cache", "pad_key_length", "max_batch_size"
    )
    return Gpt2Config(
        architecture="GPTBigCodeForCausalLM",
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer(width),
        num_layers=reader.integer(reader.either("n_layer", "num_hidden_layers")),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=reader.integer("n_inner", 4 * reader.integer(width)),
        max_positions=reader.integer(reader.either("n_positions", "max_position_embeddings"), 1024),
        norm_eps=reader.number("layer_norm_epsilon", 1e-5),
        activation=reader.activation("activation_function", "gelu_pytorch_tanh"),
        rope=None,
        tie_embeddings=reader.flag("tie_word_embeddings", True),
        score_scale=head_dim**-0.5 if reader.flag("scale_attn_weights", True) else 1.0,
        **reader.common(),
    )


def embed_weights(config: ModelConfig) -> list[WeightSpec]:
    """Token and position tables."""
    positions = Part(f"{PREFIX}wpe.weight", (config.max_positions, config.hidden_size))
    specs = [WeightSpec("embed.weight", (token_table(config, TABLE),)), WeightSpec("positions.weight", (positions,))]
    return declarations.also_without(PREFIX, specs)


def block_weights(config: ModelConfig, layer: int) -> list[WeightSpec]:
    """Weights of one block; ``c_attn`` holds q, k and v group by group, with one key/value head one after the other."""
    d, f = config.hidden_size, config.intermediate_size
    name, source = f"layers.{layer}", f"{PREFIX}h.{layer}"
    columns, rows, heads = feed_forward_shard(config, 0), feed_forward_shard(config, 1), head_shard(config, 1)
    specs = [
        *declarations.norm(f"{name}.attention_norm", f"{source}.ln_1", d, bias=True),
        *declarations.fused_qkv(config, f"{name}.qkv", f"{source}.attn.c_attn", bias=True),
        *declarations.row_linear(f"{name}.output", f"{source}.attn.c_proj", (d, d), heads, bias=True),
        *declarations.norm(f"{name}.mlp_norm", f"{source}.ln_2", d, bias=True),
        *declarations.column_linear(f"{name}.up", f"{source}.mlp.c_fc", (f, d), columns, bias=True),
        *declarations.row_linear(f"{name}.down", f"{source}.mlp.c_proj", (d, f), rows, bias=True),
    ]
    return declarations.also_without(PREFIX, specs)


def head_weights(config: ModelConfig) -> list[WeightSpec]:
    """Final norm and LM head."""
    norm = declarations.norm("final_norm", f"{PREFIX}ln_f", config.hidden_size, bias=True)
    return declarations.also_without(PREFIX, [*norm, lm_head(config, TABLE)])


GPT_BIGCODE = Family(
    architecture="GPTBigCodeForCausalLM",
    model_type="gpt_bigcode",
    other_names=("GPTBigCodeModel",),
    read_fields=read_fields,
    passes={"decode": Pass[Gpt2Config](embed, block, head, embed_weights, block_weights, head_weights, attention)},
    # Causal masks of older files; a copy of the token table, where they are tied.
    ignored_tensors=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)", r"lm_head\.weight"),
)
