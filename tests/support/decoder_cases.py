"""Small odd configurations of the decoders that call their fields as each other's or Llama's."""

from __future__ import annotations

from typing import Any

from .checkpoint_case import CheckpointCase

__all__ = ["DECODERS"]

TWO_KV_HEADS = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1))
"""Each axis, both, and more ranks than key/value heads."""
SIX_HEADS = ((1, 1), (2, 1), (1, 2), (2, 2), (3, 1))
"""Layouts of six heads that each have their own keys."""

_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32"}


def _mpt(name: str, **attention: Any) -> CheckpointCase:
    config = {
        "architectures": ["MPTForCausalLM"], "model_type": "mpt", "vocab_size": 101, "d_model": 96, "n_heads": 6,
        "n_layers": 3, "max_seq_len": 128, "attn_config": attention, **_SPECIAL,
    }  # fmt: skip
    return CheckpointCase(f"mpt-{name}", config, layouts=SIX_HEADS)


DECODERS = (
    _mpt("scaled", softmax_scale=0.2),
    _mpt("flat-biases", alibi_bias_max=4, alibi=True),
)
