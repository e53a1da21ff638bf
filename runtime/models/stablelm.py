# SPDX-License-Identifier: Apache-2.0
"""StableLM 3B and 2 (Stability AI 2023): Llama's block with LayerNorm, a quarter of each head rotated.

The halves of StableLM 2 12B are parallel, and each of its query and key heads has a LayerNorm with its own weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from phalanx.checkpoints.spec import Part, WeightSpec
from phalanx.runtime.attention import HeadNorm
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models import blocks, declarations, llama
from phalanx.runtime.models.base import Family, Pass, head_shard, kv_head_shard, lm_head
from phalanx.runtime.models.gpt_neox import head
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.llama import LlamaConfig
from phalanx.runtime.ops import AttentionSpec, Ops, Tensor

__all__ = ["STABLELM"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StableLmConfig(LlamaConfig):
    """``is_parallel``: attention and feed-forward part read the same normed rows; ``has_head_norms``: query and key heads are normed."""

    is_parallel: bool
    has_head_norms: bool

    @property
    def output_bias(self) -> bool:
        """The output projection has none."""
        return False


def read_fields(reader: ConfigReader) -> StableLmConfig:
    """Read ``config.json`` of a ``StableLmForCausalLM``."""
    head_dim = reader.head_dim()
    reader.refuse_unless("num_heads", reader.value("num_attention_heads"))
    # The first files of StableLM 3B have other names.
    epsilon, partial = reader.either("layer_norm_eps", "norm_eps"), reader.either("partial_rotary_factor", "rope_pct")
    return StableLmConfig(
        architecture="StableLmForCausalLM",
        **llama.decoder_fields(reader, head_dim, max_positions=4096, norm_eps=1e-5, num_kv_heads=32, eps_key=epsilon),
        activation=reader.activation("hidden_act", "silu"),
        rope=reader.rope(head_dim, partial=0.25, partial_key=partial),
        tie_embeddings=reader.flag("tie_word_embeddings", False),
        attention_bias=reader.flag("use_qkv_bias", False),
        is_parallel=reader.flag("use_parallel_residual", False),
        has_head_norms=reader.flag("qk_layernorm", False),
    )


def attention(config: StableLmConfig, layer: int) -> AttentionSpec:
    """The same in every layer."""
    norm = HeadNorm(config.norm_eps, kind="layer", own_weights=True) if config.has_head_norms else None
    return replace(AttentionSpec.of(config), head_norm=norm)


def block(
    ops: Ops[Tensor], config: StableLmConfig, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block; its halves in parallel take one sum over ranks."""
    name, eps, spec = f"layers.{layer}", config.norm_eps, attention(config, layer)
    x, residual = ops.add_layer_norm(x, residual, f"{name}.attention_norm", eps)
    if not config.is_parallel:
        x = blocks.attention(ops, name, layer, x, spec)
        x, residual = ops.add_layer_norm(x, residual, f"{name}.mlp_norm", eps)
        return blocks.gated_mlp(ops, name, x, config.activation), residual
    y = ops.gated_activation(ops.column_linear(x, f"{name}.gate_up"), config.activation)
    x = ops.attention(ops.column_linear(x, f"{name}.qkv"), f"{name}.attention", layer, spec)
    return ops.row_linear_pair(x, f"{name}.output", y, f"{name}.down"), residual


def block_weights(config: StableLmConfig, layer: int) -> list[WeightSpec]:
    """Llama's with biases of the norms; parallel halves share the first."""
    d, name, source = config.hidden_size, f"layers.{layer}", f"model.layers.{layer}"
    products = [spec for spec in llama.block_weights(config, layer) if not spec.owner.endswith("_norm")]
    second = declarations.norm(f"{name}.mlp_norm", f"{source}.post_attention_layernorm", d, bias=True)
    return [
        *declarations.norm(f"{name}.attention_norm", f"{source}.input_layernorm", d, bias=True),
        *(() if config.is_parallel else second),
        *(_head_norms(config, layer) if config.has_head_norms else ()),
        *products,
    ]


def _head_norms(config: StableLmConfig, layer: int) -> list[WeightSpec]:
    """Norms of query and key heads, stored as one vector per head, split with the heads: ``[H C]`` and ``[K C]``."""
    name, source, heads = f"layers.{layer}.attention", f"model.layers.{layer}.self_attn", config.num_heads
    sides = (
        ("query_norm", "q", heads, head_shard(config, 0)),
        ("key_norm", "k", config.num_kv_heads, kv_head_shard(config)),
    )
    return [
        WeightSpec(
            f"{name}.{ours}.weight",
            tuple(
                Part(f"{source}.{letter}_layernorm.norms.{head}.weight", (config.head_dim,), replace(shard, start=head, whole=count))
                for head in range(count)
            ),
        )
        for ours, letter, count, shard in sides
    ]  # fmt: skip


def head_weights(config: ModelConfig) -> list[WeightSpec]:
    """Final norm and LM head."""
    norm = declarations.norm("final_norm", "model.norm", config.hidden_size, bias=True)
    return [*norm, lm_head(config, llama.TABLE)]


STABLELM = Family(
    architecture="StableLmForCausalLM",
    model_type="stablelm",
    other_names=("StableLMEpochForCausalLM", "StableLmModel"),
    read_fields=read_fields,
    passes={
        "decode": Pass[StableLmConfig](
            llama.embed, block, head, llama.embed_weights, block_weights, head_weights, attention
        )
    },
    ignored_tensors=llama.LLAMA.ignored_tensors,
)
