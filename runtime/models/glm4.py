# SPDX-License-Identifier: Apache-2.0
"""GLM-4-0414 (Z.ai 2025): GLM-4's attention and feed-forward part with a norm after each half, too."""

from __future__ import annotations

from phalanx.checkpoints.spec import WeightSpec
from phalanx.runtime.models import blocks, declarations, glm, llama
from phalanx.runtime.models.base import Family, Pass
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.llama import LlamaConfig
from phalanx.runtime.ops import Ops, Tensor

__all__ = ["GLM4"]


def read_fields(reader: ConfigReader) -> LlamaConfig:
    """Read ``config.json`` of a ``Glm4ForCausalLM``."""
    return LlamaConfig(architecture="Glm4ForCausalLM", **glm.fields(reader))


def block(
    ops: Ops[Tensor], config: LlamaConfig, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block."""
    return blocks.sandwich(ops, config, layer, x, residual, llama.attention(config, layer))


def block_weights(config: LlamaConfig, layer: int) -> list[WeightSpec]:
    """GLM-4's, with two more norms."""
    name, source, d = f"layers.{layer}", f"model.layers.{layer}", config.hidden_size
    return [
        *glm.block_weights(config, layer),
        *declarations.norm(f"{name}.attention_post_norm", f"{source}.post_self_attn_layernorm", d),
        *declarations.norm(f"{name}.mlp_post_norm", f"{source}.post_mlp_layernorm", d),
    ]


GLM4 = Family(
    architecture="Glm4ForCausalLM",
    model_type="glm4",
    other_names=("Glm4Model",),
    read_fields=read_fields,
    passes={
        "decode": Pass[LlamaConfig](
            llama.embed, block, llama.head, llama.embed_weights, block_weights, llama.head_weights, llama.attention
        )
    },
    ignored_tensors=llama.LLAMA.ignored_tensors,
)
