# SPDX-License-Identifier: Apache-2.0
"""The pieces that Megatron-LM's ranks save, as whole tensors under one set of names, and its arguments as a ``config.json``.

Source: ``megatron/training/arguments.py`` and ``checkpointing.py`` of Megatron-LM; for the order of rows before version 2 its
``fix_query_key_value_ordering``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from phalanx.checkpoints.source import Array
from phalanx.parallel.errors import CheckpointError, ConfigError

__all__ = ["MegatronLayout", "canonical_name", "config_of", "join_pieces", "refuse_arguments"]

PREFIX = "language_model."
_STACK = re.compile(r"(?:language_model\.)?(?:encoder|transformer|decoder)\.(.*)")
_LAYER = re.compile(r"layers\.(\d+)\.(.*)")
_IGNORED = re.compile(
    r".*(_extra_state|rotary_pos_emb\.inv_freq|rotary_emb\.inv_freq)|(word_embeddings_for_head|word_embeddings)\..*"
)
_RENAMED = (
    (r"(self_)?attention\.linear_qkv\.layer_norm_(weight|bias)", r"input_layernorm.\2"),
    (r"mlp\.linear_fc1\.layer_norm_(weight|bias)", r"post_attention_layernorm.\1"),
    (r"(self_)?attention\.(query_key_value|linear_qkv)\.(weight|bias)", r"self_attention.query_key_value.\3"),
    (r"(self_)?attention\.(dense|linear_proj)\.(weight|bias)", r"self_attention.dense.\3"),
    (r"input_(layernorm|norm)\.(weight|bias)", r"input_layernorm.\2"),
    (
        r"(post_attention_layernorm|post_attention_norm|pre_mlp_layernorm)\.(weight|bias)",
        r"post_attention_layernorm.\2",
    ),
    (r"mlp\.(dense_h_to_4h|linear_fc1)\.(weight|bias)", r"mlp.dense_h_to_4h.\2"),
    (r"mlp\.(dense_4h_to_h|linear_fc2)\.(weight|bias)", r"mlp.dense_4h_to_h.\2"),
)
"""Names below a layer, old and of Megatron-core, and ours."""
_REFUSED = (
    "num_experts", "apply_residual_connection_post_layernorm", "multi_latent_attention", "qk_layernorm", "rotary_interleaved",
    "use_rope_scaling", "rotary_seq_len_interpolation_factor", "window_size", "quick_geglu", "no_rope_freq", "attention_output_gate",
    "head_wise_attn_gate", "glu_linear_offset", "activation_func_clamp_value", "qk_l2_norm", "softmax_scale", "rotary_base_per_layer", "use_mup",
)  # fmt: skip
"""Arguments that must be absent or off; most leave no tensor by which they could be told.

Source: ``megatron/core/transformer/transformer_config.py`` of Megatron-LM.
"""
_ONLY = {"softmax_type": "vanilla", "scaling_recipe": "none"}
"""Arguments that must be absent or have this value."""
_NUMBERS = (
    "hidden_size", "num_layers", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size", "max_position_embeddings",
    "norm_epsilon", "layernorm_epsilon", "rotary_percent", "rotary_base",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class MegatronLayout:
    """What decides how pieces join.

    Attributes:
        version: of the checkpoint, by which rows of ``query_key_value`` are ordered.
        num_heads, num_groups: H and K of the whole model.
        is_gated: the first matrix of the feed-forward part holds gate and up, in each piece.
        vocab_size: rows to keep of the vocabulary, which is padded; 0 = all.
    """

    version: float
    num_heads: int
    num_groups: int
    is_gated: bool
    vocab_size: int = 0


def canonical_name(name: str, first_layer: int) -> str | None:
    """Return a tensor's name, its layer counted over all pipeline stages; None for one that is not needed.

    Raises:
        CheckpointError: the name is unknown.
    """
    if _IGNORED.fullmatch(name.removeprefix(PREFIX)):
        return None
    outside = name.removeprefix(PREFIX)
    if outside in ("embedding.word_embeddings.weight", "embedding.position_embeddings.weight", "output_layer.weight"):
        return PREFIX + outside
    if stack := _STACK.fullmatch(name):
        inside = stack[1]
        if final := re.fullmatch(r"(final_layernorm|final_norm)\.(weight|bias)", inside):
            return f"{PREFIX}encoder.final_layernorm.{final[2]}"
        if layer := _LAYER.fullmatch(inside):
            for old, new in _RENAMED:
                if re.fullmatch(old, layer[2]):
                    return f"{PREFIX}encoder.layers.{first_layer + int(layer[1])}.{re.sub(old, new, layer[2])}"
    raise CheckpointError(f"{name} is no tensor of a GPT of Megatron-LM that is known here; it cannot be converted")


def join_pieces(name: str, pieces: Sequence[Array], layout: MegatronLayout) -> Array:
    """Join what the tensor-parallel ranks hold of the tensor ``name`` (as `canonical_name` gives it), in the order of ranks.

    Raises:
        CheckpointError: ranks differ in a tensor that each holds whole.
    """
    if "query_key_value" in name:
        return np.concatenate([_by_groups(piece, layout, len(pieces)) for piece in pieces])
    if "dense_h_to_4h" in name:
        if not layout.is_gated:
            return np.concatenate(pieces)
        halves = [np.split(piece, 2) for piece in pieces]
        return np.concatenate([half[side] for side in (0, 1) for half in halves])
    if name.endswith(("self_attention.dense.weight", "dense_4h_to_h.weight")):
        return np.concatenate(pieces, axis=1)
    if name.endswith(("word_embeddings.weight", "output_layer.weight")):
        return np.concatenate(pieces)[: layout.vocab_size or None]
    if any(not np.array_equal(piece, pieces[0]) for piece in pieces[1:]):
        raise CheckpointError(
            f"ranks hold different values of {name}, which all should hold alike; the pieces are not of one model"
        )
    return pieces[0]


def _by_groups(piece: Array, layout: MegatronLayout, num_pieces: int) -> Array:
    """Rows ``[K, G + 2, C]``, as Megatron orders them since version 2."""
    heads, tail = layout.num_heads // num_pieces, piece.shape[1:]
    if layout.version >= 2.0:
        return piece
    if layout.version >= 1.0:
        return piece.reshape(heads, -1, 3, *tail).swapaxes(1, 2).reshape(piece.shape)
    return piece.reshape(3, heads, -1, *tail).swapaxes(0, 1).reshape(piece.shape)


def config_of(arguments: Mapping[str, Any], vocab_size: int, dtype: str) -> dict[str, Any]:
    """Return the ``config.json`` of a model trained with these arguments.

    Raises:
        ConfigError: one asks for something that the family does not have.
    """
    norm = arguments.get("normalization") or "LayerNorm"
    positions = arguments.get("position_embedding_type") or "learned_absolute"
    refuse_arguments(arguments)
    if positions not in ("learned_absolute", "rope") or (norm != "LayerNorm" and arguments.get("apply_layernorm_1p")):
        raise ConfigError(
            f"position_embedding_type={positions!r} with normalization={norm!r}, apply_layernorm_1p="
            f"{bool(arguments.get('apply_layernorm_1p'))} of this Megatron checkpoint is not supported; positions may be learned_absolute "
            "or rope, and apply_layernorm_1p goes with LayerNorm"
        )
    for name in _NUMBERS:
        if not isinstance(arguments.get(name), int | float | None):
            raise ConfigError(
                f"{name} of this Megatron checkpoint is not a plain number; save its arguments again as such"
            )
    rotates = arguments.get("use_rotary_position_embeddings") or positions == "rope"
    has_groups = arguments.get("group_query_attention")
    return {
        "architectures": ["MegatronGPTModel"],
        "model_type": "megatron_gpt",
        "vocab_size": vocab_size,
        "hidden_size": arguments["hidden_size"],
        "num_layers": arguments["num_layers"],
        "num_attention_heads": arguments["num_attention_heads"],
        "num_query_groups": arguments["num_query_groups"] if has_groups else arguments["num_attention_heads"],
        "kv_channels": arguments.get("kv_channels"),
        "ffn_hidden_size": arguments.get("ffn_hidden_size"),
        "max_position_embeddings": arguments["max_position_embeddings"],
        "norm_epsilon": arguments.get("norm_epsilon", arguments.get("layernorm_epsilon", 1e-5)),
        "normalization": f"{norm}1P" if norm == "LayerNorm" and arguments.get("apply_layernorm_1p") else norm,
        "position_embedding_type": "rope" if rotates else "learned_absolute",
        "rotary_percent": arguments.get("rotary_percent", 1.0),
        "rotary_base": arguments.get("rotary_base", 10000),
        "activation_function": _activation(arguments),
        "gated_linear_unit": bool(arguments.get("swiglu")),
        "add_bias_linear": arguments.get("add_bias_linear", True),
        "add_qkv_bias": arguments.get("add_qkv_bias", False),
        "untie_embeddings_and_output_weights": arguments.get("untie_embeddings_and_output_weights", False),
        "torch_dtype": dtype,
    }


def refuse_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that change the model and leave no tensor; NeMo hands them on to Megatron-core under the same names.

    Raises:
        ConfigError: naming the first.
    """
    for name in (*_REFUSED, *_ONLY):
        if arguments.get(name) and arguments[name] != _ONLY.get(name):
            raise ConfigError(
                f"{name}={arguments[name]!r} of this Megatron checkpoint is not supported; leave it with Megatron-LM"
            )


def _activation(arguments: Mapping[str, Any]) -> str:
    """The fused bias and GELU, on by default, is the tanh form."""
    if arguments.get("swiglu"):
        return "silu"
    if arguments.get("squared_relu"):
        return "relu2"
    is_tanh = arguments.get("openai_gelu") or arguments.get("bias_gelu_fusion", True)
    return "gelu_pytorch_tanh" if is_tanh else "gelu"
