# SPDX-License-Identifier: Apache-2.0
"""A ``config.json`` of any family made small: what it computes stays, its sizes do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["smaller"]

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "n_head_kv",
    "multi_query_group_num",
    "num_query_groups",
)
_WIDTHS = ("hidden_size", "n_embd", "d_model", "n_embed")
_INNER = (
    "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "inner_hidden_size", "word_embed_proj_dim",
    "moe_intermediate_size", "shared_expert_intermediate_size",
)  # fmt: skip
_MOST: Mapping[str, int] = {
    **dict.fromkeys(("num_experts", "num_local_experts"), 8), "num_experts_per_tok": 4, "sliding_window": 9, "sliding_window_size": 9, "max_window_layers": 4,
    **dict.fromkeys(("vocab_size", "padded_vocab_size"), 499),
}  # fmt: skip
"""Largest values of sizes that nothing else depends on; windows are shorter than the prompt."""
_NUM_LAYERS = 6
_HEAD_SIZES = ("head_dim", "kv_channels")
_PARTS = ("text_config", "vision_config")


def smaller(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``raw`` with up to six layers, few heads of their own size in groups of up to four, and widths in proportion.

    Lists with an entry for each layer are cut to match. Keys that name no size stay, and so do sizes under other names.
    """
    config: dict[str, Any] = {
        name: smaller(value) if name in _PARTS and isinstance(value, dict) else value for name, value in raw.items()
    }
    config |= {name: min(value, _MOST[name]) for name, value in config.items() if name in _MOST and _is_size(value)}
    config |= {name: _token(value) for name, value in config.items() if name.endswith("_token_id")}
    for count in {value for name, value in raw.items() if name in _LAYERS and _is_size(value)}:
        config |= {name: min(count, _NUM_LAYERS) for name in _LAYERS if raw.get(name) == count}
        config |= {
            name: value[:_NUM_LAYERS]
            for name, value in config.items()
            if isinstance(value, list) and len(value) == count and not name.endswith("_token_id")
        }
    return config | _few_heads(raw)


def _few_heads(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Heads and widths; nothing where they are missing or do not divide."""
    heads = next((raw[name] for name in _HEADS if _is_size(raw.get(name))), 0)
    kv_heads = next((raw[name] for name in _KV_HEADS if _is_size(raw.get(name))), heads)
    width = next((raw[name] for name in _WIDTHS if _is_size(raw.get(name))), 0)
    has_own_size = any(_is_size(raw.get(name)) for name in _HEAD_SIZES)
    if not heads or heads % kv_heads or (width % heads and not has_own_size):
        return {}
    few = min(kv_heads, 2 if kv_heads < heads else 4)
    many = few * min(heads // kv_heads, 4)
    found: dict[str, Any] = {name: many for name in _HEADS if raw.get(name) == heads}
    found |= {name: few for name in _KV_HEADS if raw.get(name) == kv_heads}
    if isinstance(attention := raw.get("attn_config"), dict) and attention.get("kv_n_heads") == heads:  # MPT's
        found["attn_config"] = {**attention, "kv_n_heads": many}
    return found | {name: max(raw[name] * many // heads, 1) for name in (*_WIDTHS, *_INNER) if _is_size(raw.get(name))}


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _token(value: Any) -> Any:
    """Within the small vocabulary."""
    most = _MOST["vocab_size"]
    if isinstance(value, list):
        return [_token(each) for each in value]
    return value % most if _is_size(value) else value
