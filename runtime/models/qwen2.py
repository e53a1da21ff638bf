# SPDX-License-Identifier: Apache-2.0
"""Qwen 1.5, 2 and 2.5 (Qwen team 2024): Llama's block with biases of q, k and v."""

from __future__ import annotations

from dataclasses import dataclass, replace

from phalanx.runtime.models import blocks, llama
from phalanx.runtime.models.base import Family, Pass
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.llama import LlamaConfig
from phalanx.runtime.ops import AttentionSpec, Ops, Tensor

__all__ = ["QWEN2", "Qwen2Config", "attention", "block", "layer_windows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen2Config(LlamaConfig):
    """``windows``: of each layer, 0 = none."""

    attention_bias: bool = True
    windows: tuple[int, ...]

    @property
    def output_bias(self) -> bool:
        """The output projection has none."""
        return False


def read_fields(reader: ConfigReader) -> Qwen2Config:
    """Read ``config.json`` of a ``Qwen2ForCausalLM``."""
    head_dim = reader.head_dim()
    return Qwen2Config(
        architecture="Qwen2ForCausalLM",
        **llama.decoder_fields(reader, head_dim, max_positions=32768, norm_eps=1e-6),
        activation=reader.activation("hidden_act", "silu"),
        rope=reader.rope(head_dim),
        tie_embeddings=reader.flag("tie_word_embeddings", False),
        windows=layer_windows(reader),
    )


def layer_windows(reader: ConfigReader) -> tuple[int, ...]:
    """The window of each layer, 0 = none. ``sliding_window`` counts only with ``use_sliding_window``, from a layer on."""
    slides, first = reader.flag("use_sliding_window", False), reader.integer("max_window_layers", 28, minimum=0)
    window = reader.nullable("sliding_window", 4096)
    return reader.windows(reader.integer("num_hidden_layers"), window if slides else 0, lambda layer: layer >= first)


def attention(config: Qwen2Config, layer: int) -> AttentionSpec:
    """A window in the layers that have one."""
    return replace(AttentionSpec.of(config), window=config.windows[layer])


def block(
    ops: Ops[Tensor], config: Qwen2Config, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block."""
    return blocks.pre_norm(ops, config, layer, x, residual, attention(config, layer))


QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    other_names=("Qwen2Model",),
    read_fields=read_fields,
    passes={
        "decode": Pass[Qwen2Config](
            llama.embed, block, llama.head, llama.embed_weights, llama.block_weights, llama.head_weights, attention
        )
    },
    ignored_tensors=llama.LLAMA.ignored_tensors,
)
