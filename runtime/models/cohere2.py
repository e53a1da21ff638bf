# SPDX-License-Identifier: Apache-2.0
"""Command R7B and A (Cohere 2025): Command R with a window in most layers; those without one have no rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass, replace

from phalanx.runtime.models import cohere, llama
from phalanx.runtime.models.base import Family, Pass
from phalanx.runtime.models.cohere import CohereConfig
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.ops import AttentionSpec, Ops, Tensor

__all__ = ["COHERE2"]

_SWITCHES = {
    "use_parallel_block": True, "use_gated_activation": True, "use_qk_norm": False, "rotary_pct": 1.0,
    "position_embedding_type": "rope_gptj", "order_of_interleaved_layers": "local_attn_first",
}  # fmt: skip
"""What published files say next to the keys that transformers reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohere2Config(CohereConfig):
    """``windows``: of each layer, 0 = none, which has no rotary embedding either."""

    windows: tuple[int, ...]


def read_fields(reader: ConfigReader) -> Cohere2Config:
    """Read ``config.json`` of a ``Cohere2ForCausalLM``."""
    num_layers = reader.integer("num_hidden_layers")
    pattern = reader.integer(reader.either("sliding_window_pattern", "_sliding_window_pattern"), 4)
    window = reader.nullable("sliding_window", 4096)
    for name, value in _SWITCHES.items():
        reader.refuse_unless(name, value)
    reader.ignore("cache_implementation", "layer_switch", "use_embedding_sharing", "use_parallel_embedding")
    return Cohere2Config(
        architecture="Cohere2ForCausalLM",
        **cohere.fields(reader, theta=1e4),
        windows=reader.windows(num_layers, window, lambda layer: (layer + 1) % pattern != 0),
    )


def attention(config: Cohere2Config, layer: int) -> AttentionSpec:
    """A window and a rotary embedding, or neither."""
    window = config.windows[layer]
    return replace(AttentionSpec.of(config), rope=config.rope if window else None, window=window)


def block(
    ops: Ops[Tensor], config: Cohere2Config, layer: int, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decoder block."""
    return cohere.parallel_halves(ops, config, layer, x, residual, attention(config, layer))


COHERE2 = Family(
    architecture="Cohere2ForCausalLM",
    model_type="cohere2",
    other_names=("Cohere2Model",),
    read_fields=read_fields,
    passes={
        "decode": Pass[Cohere2Config](
            llama.embed, block, cohere.head, llama.embed_weights, cohere.block_weights, llama.head_weights, attention
        )
    },
    ignored_tensors=llama.LLAMA.ignored_tensors,
)
