# SPDX-License-Identifier: Apache-2.0
"""Phi 3, 3.5 mini and 4 (Abdin et al. 2024): Llama's block with q, k and v in one matrix, gate and up in another."""

from __future__ import annotations

from phalanx.checkpoints.spec import WeightSpec
from phalanx.runtime.models import declarations, llama
from phalanx.runtime.models.base import Family, Pass, feed_forward_shard, head_shard
from phalanx.runtime.models.hf_config import ConfigReader
from phalanx.runtime.models.mistral import MistralConfig, attention, block

__all__ = ["PHI3"]


def read_fields(reader: ConfigReader) -> MistralConfig:
    """Read ``config.json`` of a ``Phi3ForCausalLM``."""
    head_dim, window = reader.head_dim(), reader.integer("sliding_window", 0, minimum=0)
    for name, value in {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False}.items():
        reader.refuse_unless(name, value)  # of Phi 4 mini
    reader.ignore("full_attn_mod", "interpolate_factor")  # of Phi 4 mini, whose own code does not read them either
    return MistralConfig(
        architecture="Phi3ForCausalLM",
        **llama.decoder_fields(reader, head_dim, max_positions=4096, norm_eps=1e-5),
        activation=reader.activation("hidden_act", "silu"),
        rope=reader.rope(head_dim, partial=1.0, original=4096),
        tie_embeddings=reader.flag("tie_word_embeddings", False),
        windows=(window,) * reader.integer("num_hidden_layers"),
    )


def block_weights(config: MistralConfig, layer: int) -> list[WeightSpec]:
    """Weights of one block."""
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    name, source = f"layers.{layer}", f"model.layers.{layer}"
    inputs, rows = head_shard(config, 1), feed_forward_shard(config, 1)
    return [
        *declarations.norm(f"{name}.attention_norm", f"{source}.input_layernorm", d),
        *declarations.stacked_qkv(config, f"{name}.qkv", f"{source}.self_attn.qkv_proj"),
        *declarations.row_linear(f"{name}.output", f"{source}.self_attn.o_proj", (d, heads), inputs),
        *declarations.norm(f"{name}.mlp_norm", f"{source}.post_attention_layernorm", d),
        *declarations.stacked_gate_up(config, f"{name}.gate_up", f"{source}.mlp.gate_up_proj"),
        *declarations.row_linear(f"{name}.down", f"{source}.mlp.down_proj", (d, f), rows),
    ]


PHI3 = Family(
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    other_names=("Phi3Model",),
    read_fields=read_fields,
    passes={
        "decode": Pass[MistralConfig](
            llama.embed, block, llama.head, llama.embed_weights, block_weights, llama.head_weights, attention
        )
    },
    ignored_tensors=llama.LLAMA.ignored_tensors,
)
