"""Llama 1, 2 and 3 (Touvron et al. 2023; Llama team 2024): RMSNorm, rotary positions, grouped-query heads, SwiGLU."""

from __future__ import annotations

from phalanx.checkpoints.spec import Part, WeightSpec
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models.base import Model, feed_forward_shard, head_shard, lm_head, qkv_weight, token_table
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.ops import AttentionSpec, Ops, Tensor

__all__ = ["LLAMA", "block_weights"]

TABLE = "model.embed_tokens.weight"


def read_fields(reader: ConfigReader) -> ModelConfig:
    """Read ``config.json`` of a ``LlamaForCausalLM``."""
    head_dim = reader.head_dim()
    reader.refuse_unless("activation", "swiglu")  # a second name of the gated MLP in some checkpoints
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("hidden_size"),
        num_layers=reader.integer("num_hidden_layers"),
        num_heads=reader.integer("num_attention_heads"),
        num_kv_heads=reader.integer("num_key_value_heads", reader.integer("num_attention_heads")),
        head_dim=head_dim,
        intermediate_size=reader.integer("intermediate_size"),
        max_positions=reader.integer("max_position_embeddings", 2048),
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        activation=reader.activation("hidden_act", "silu"),
        rope=reader.rope(head_dim),
        tie_embeddings=reader.flag("tie_word_embeddings", False),
        attention_bias=reader.flag("attention_bias", False),
        output_bias=reader.flag("attention_bias", False),
        mlp_bias=reader.flag("mlp_bias", False),
        **reader.common(),
    )


def embed(ops: Ops[Tensor], config: ModelConfig) -> Tensor:
    """Token rows: ``[T, D]``."""
    return ops.embedding("embed")


def block(
    ops: Ops[Tensor], config: ModelConfig, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block."""
    name = f"layers.{layer}"
    x, residual = ops.add_rms_norm(x, residual, f"{name}.attention_norm", config.norm_eps)
    x = ops.attention(ops.column_linear(x, f"{name}.qkv"), f"{name}.attention", layer, AttentionSpec.of(config))
    x = ops.row_linear(x, f"{name}.output")
    x, residual = ops.add_rms_norm(x, residual, f"{name}.mlp_norm", config.norm_eps)
    x = ops.gated_activation(ops.column_linear(x, f"{name}.gate_up"), config.activation)
    return ops.row_linear(x, f"{name}.down"), residual


def head(ops: Ops[Tensor], config: ModelConfig, x: Tensor, residual: Tensor | None) -> Tensor:
    """Logits of the rows that need them: ``[B, V local]``."""
    x, _ = ops.add_rms_norm(x, residual, "final_norm", config.norm_eps)
    return ops.logits(x, "lm_head")


def embed_weights(config: ModelConfig) -> list[WeightSpec]:
    """The token table."""
    return [WeightSpec("embed.weight", (token_table(config, TABLE),))]


def block_weights(config: ModelConfig, layer: int) -> list[WeightSpec]:
    """Weights of one block; Gemma declares the same."""
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    name, source = f"layers.{layer}", f"model.layers.{layer}"
    columns, rows = feed_forward_shard(config, 0), feed_forward_shard(config, 1)
    mlp = f"{source}.mlp"
    qkv = tuple(f"{source}.self_attn.{letter}_proj" for letter in "qkv")
    specs = [
        WeightSpec(f"{name}.attention_norm.weight", (Part(f"{source}.input_layernorm.weight", (d,)),)),
        *qkv_weight(config, f"{name}.qkv", (qkv[0], qkv[1], qkv[2]), config.attention_bias),
        WeightSpec(
            f"{name}.output.weight", (Part(f"{source}.self_attn.o_proj.weight", (d, heads), head_shard(config, 1)),)
        ),
        WeightSpec(f"{name}.mlp_norm.weight", (Part(f"{source}.post_attention_layernorm.weight", (d,)),)),
        WeightSpec(
            f"{name}.gate_up.weight",
            (Part(f"{mlp}.gate_proj.weight", (f, d), columns), Part(f"{mlp}.up_proj.weight", (f, d), columns)),
        ),
        WeightSpec(f"{name}.down.weight", (Part(f"{mlp}.down_proj.weight", (d, f), rows),)),
    ]
    if config.output_bias:
        specs.append(WeightSpec(f"{name}.output.bias", (Part(f"{source}.self_attn.o_proj.bias", (d,)),)))
    if config.mlp_bias:
        gate_up = (Part(f"{mlp}.gate_proj.bias", (f,), columns), Part(f"{mlp}.up_proj.bias", (f,), columns))
        specs.append(WeightSpec(f"{name}.gate_up.bias", gate_up))
        specs.append(WeightSpec(f"{name}.down.bias", (Part(f"{mlp}.down_proj.bias", (d,)),)))
    return specs


def head_weights(config: ModelConfig) -> list[WeightSpec]:
    """Final norm and LM head; the head is the token table itself where they are tied."""
    norm = WeightSpec("final_norm.weight", (Part("model.norm.weight", (config.hidden_size,)),))
    return [norm, lm_head(config, TABLE)]


LLAMA = Model(
    architecture="LlamaForCausalLM",
    model_type="llama",
    other_names=("LLaMAForCausalLM", "LlamaModel"),
    read_fields=read_fields,
    embed=embed,
    block=block,
    head=head,
    embed_weights=embed_weights,
    block_weights=block_weights,
    head_weights=head_weights,
    ignored_tensors=(r"lm_head\.weight",),  # a copy of the token table, where they are tied
)
