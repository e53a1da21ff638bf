# SPDX-License-Identifier: Apache-2.0
"""Qwen 1.5 and 2 MoE (Qwen team 2024): Qwen 2 with experts, and a shared expert that a gate weighs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from phalanx.checkpoints.spec import Part, WeightSpec
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models import blocks, declarations, llama, qwen2
from phalanx.runtime.models.base import Family, Pass, feed_forward_shard
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.qwen2 import Qwen2Config
from phalanx.runtime.ops import ExpertsSpec, Ops, Tensor
from phalanx.runtime.token_fields import shown

__all__ = ["QWEN2_MOE", "SparseLayers", "expert_weights", "sparse_layers"]


@dataclass(frozen=True, slots=True)
class SparseLayers:
    """Which layers of a Qwen model have experts, and what these are.

    Attributes:
        spec: of the routing.
        expert_size: F of an expert; the model's ``intermediate_size`` is that of layers without experts.
        layers: the layers that have experts.
    """

    spec: ExpertsSpec
    expert_size: int
    layers: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen2MoeConfig(Qwen2Config):
    """``shared_size``: F of the shared expert."""

    sparse: SparseLayers
    shared_size: int


def read_fields(reader: ConfigReader) -> Qwen2MoeConfig:
    """Read ``config.json`` of a ``Qwen2MoeForCausalLM``."""
    head_dim = reader.head_dim()
    slides, first = reader.flag("use_sliding_window", False), reader.integer("max_window_layers", 28, minimum=0)
    window = reader.nullable("sliding_window", 4096) if slides else 0
    reader.ignore("sliding_window")  # which published files name without `use_sliding_window`
    num_layers = reader.integer("num_hidden_layers")
    return Qwen2MoeConfig(
        architecture="Qwen2MoeForCausalLM",
        **llama.decoder_fields(reader, head_dim, max_positions=32768, norm_eps=1e-6),
        sparse=sparse_layers(reader, num_experts=60, top_k=4, expert_size=1408),
        activation=reader.activation("hidden_act", "silu"),
        rope=reader.rope(head_dim),
        tie_embeddings=reader.flag("tie_word_embeddings", False),
        attention_bias=reader.flag("qkv_bias", True),
        # Not Qwen 2's rule: every second layer, and those below `max_window_layers`.
        windows=reader.windows(num_layers, window, lambda layer: layer % 2 == 0 and layer < first),
        shared_size=reader.integer("shared_expert_intermediate_size", 5632),
    )


def sparse_layers(reader: ConfigReader, *, num_experts: int, top_k: int, expert_size: int) -> SparseLayers:
    """Read what Qwen's models call their experts' fields, with a family's own defaults."""
    num_layers, step = reader.integer("num_hidden_layers"), reader.integer("decoder_sparse_step", 1)
    dense = reader.value("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise ConfigError(f"mlp_only_layers={shown(dense)} in config.json is not a list of layers; the file is damaged")
    spec = ExpertsSpec(
        num_experts=reader.integer(reader.either("num_experts", "num_local_experts"), num_experts),
        top_k=reader.integer("num_experts_per_tok", top_k),
        activation=reader.activation("hidden_act", "silu"),
        renormalise=reader.flag("norm_topk_prob", False),
    )
    layers = (layer for layer in range(num_layers) if (layer + 1) % step == 0 and layer not in dense)
    return SparseLayers(spec, reader.integer("moe_intermediate_size", expert_size), frozenset(layers))


def expert_weights(config: ModelConfig, sparse: SparseLayers, layer: int) -> list[WeightSpec]:
    """Router and experts of one layer."""
    source = f"model.layers.{layer}.mlp"
    return declarations.experts(
        replace(config, intermediate_size=sparse.expert_size), f"layers.{layer}.experts", f"{source}.gate",
        f"{source}.experts", ("gate_proj", "up_proj", "down_proj"), sparse.spec.num_experts,
    )  # fmt: skip


def block(
    ops: Ops[Tensor], config: Qwen2MoeConfig, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block."""
    if layer not in config.sparse.layers:
        return qwen2.block(ops, config, layer, x, residual)
    name, shared = f"layers.{layer}", f"layers.{layer}.shared"
    x, residual = blocks.attended(ops, config, layer, x, residual, qwen2.attention(config, layer))
    hidden = ops.gated_activation(ops.column_linear(x, f"{shared}.gate_up"), config.activation)
    weighed = ops.sigmoid_gate(ops.row_linear_partial(hidden, f"{shared}.down"), x, f"{shared}.gate")
    return ops.all_reduce(ops.add(ops.experts(x, f"{name}.experts", config.sparse.spec), weighed)), residual


def block_weights(config: Qwen2MoeConfig, layer: int) -> list[WeightSpec]:
    """Weights of one block."""
    if layer not in config.sparse.layers:
        return llama.block_weights(config, layer)
    name, source, d = f"layers.{layer}.shared", f"model.layers.{layer}.mlp.shared_expert", config.hidden_size
    shared = replace(config, intermediate_size=config.shared_size)
    return [
        *llama.attention_weights(config, layer),
        *expert_weights(config, config.sparse, layer),
        *declarations.gate_up(shared, f"{name}.gate_up", (f"{source}.gate_proj", f"{source}.up_proj")),
        *declarations.row_linear(
            f"{name}.down", f"{source}.down_proj", (d, config.shared_size), feed_forward_shard(shared, 1)
        ),
        WeightSpec(f"{name}.gate.weight", (Part(f"{source}_gate.weight", (1, d)),)),
    ]


QWEN2_MOE = Family(
    architecture="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    other_names=("Qwen2MoeModel",),
    read_fields=read_fields,
    passes={
        "decode": Pass[Qwen2MoeConfig](
            llama.embed, block, llama.head, llama.embed_weights, block_weights, llama.head_weights, qwen2.attention
        )
    },
    ignored_tensors=llama.LLAMA.ignored_tensors,
)
