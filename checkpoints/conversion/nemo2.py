# SPDX-License-Identifier: Apache-2.0
"""NeMo 2's configurations: ``context/model.yaml``, next to which ``weights`` is a distributed checkpoint of Megatron-core.

Source: ``nemo/collections/llm/gpt/model`` of NeMo 2 for the classes; its fields are those of ``TransformerConfig`` of Megatron-core. The
same reading is in ``nemo_export/trt_llm/nemo_ckpt_loader`` of NeMo's exporter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from phalanx.checkpoints.conversion.megatron import refuse_arguments
from phalanx.parallel.errors import ConfigError

__all__ = ["CONTEXT", "arguments_of_context"]

CONTEXT = "context/model.yaml"
_CLASS = re.compile(r"nemo\.collections\.llm\.gpt\.model\.(\w+)\.\w+")
_FAMILIES = ("base", "llama", "mistral", "nemotron", "qwen2", "starcoder")
"""Modules whose configurations say by their fields all that their models compute; Gemma's scales embeddings in its code."""
_NEEDED = (
    "hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size", "seq_length", "normalization", "gated_linear_unit",
    "activation_func", "position_embedding_type", "rotary_base", "rotary_percent", "layernorm_epsilon", "add_bias_linear",
    "add_qkv_bias", "bias_activation_fusion", "layernorm_zero_centered_gamma", "share_embeddings_and_output_weights",
)  # fmt: skip
"""Fields whose defaults differ by class, so that a file without one cannot be read."""
_REFUSED = (
    "num_moe_experts",
    "seq_len_interpolation_factor",
    "scale_factor",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
"""Fields that must be absent or empty; ``scale_factor`` is that of Llama 3.1's rotary embedding."""
_ACTIVATIONS = ("silu", "gelu", "openai_gelu", "squared_relu")
_WAY_OUT = "export it with NeMo's export_ckpt to Hugging Face's format"


def arguments_of_context(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return Megatron's arguments that ``context/model.yaml`` stands for.

    Raises:
        ConfigError: it is of another family, lacks a field, or asks for something that Megatron-LM's GPT does not have here.
    """
    config = model.get("config")
    if not isinstance(config, dict):
        raise ConfigError(f"{CONTEXT} holds no config of a model; {_WAY_OUT}")
    _check_class(config.get("_target_"))
    if missing := [name for name in _NEEDED if config.get(name) is None]:
        raise ConfigError(f"{CONTEXT} lacks {', '.join(missing)}; {_WAY_OUT}")
    for name in _REFUSED:
        if config.get(name):
            raise ConfigError(f"{name}={config[name]!r} in {CONTEXT} is not supported; {_WAY_OUT}")
    refuse_arguments(config)
    activation, is_gated = _activation(config["activation_func"]), config["gated_linear_unit"]
    if activation not in _ACTIVATIONS or is_gated != (activation == "silu"):
        raise ConfigError(
            f"activation_func={activation} with gated_linear_unit={is_gated} in {CONTEXT} is not supported: silu is with a gate, "
            f"{', '.join(_ACTIVATIONS[1:])} without; {_WAY_OUT}"
        )
    copied = (
        "hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size", "normalization", "position_embedding_type", "rotary_base",
        "rotary_percent", "layernorm_epsilon", "add_bias_linear", "add_qkv_bias",
    )  # fmt: skip
    return {
        **{name: config[name] for name in copied},
        "kv_channels": config.get("kv_channels"),
        "num_query_groups": config.get("num_query_groups") or config["num_attention_heads"],
        "group_query_attention": True,
        "max_position_embeddings": config["seq_length"],
        "apply_layernorm_1p": config["layernorm_zero_centered_gamma"],
        "swiglu": is_gated,
        "squared_relu": activation == "squared_relu",
        # The kernel that adds the bias computes the tanh form.
        "bias_gelu_fusion": activation == "openai_gelu"
        or (config["add_bias_linear"] and config["bias_activation_fusion"]),
        "untie_embeddings_and_output_weights": not config["share_embeddings_and_output_weights"],
    }


def _check_class(target: object) -> None:
    match = _CLASS.fullmatch(str(target))
    if match is None or match[1] not in _FAMILIES:
        raise ConfigError(
            f"{target} in {CONTEXT} is not supported; supported are configurations of {', '.join(_FAMILIES)}; {_WAY_OUT}"
        )


def _activation(given: object) -> str:
    """The function's name, which the file gives as ``{_target_: torch.nn.functional.silu, _call_: false}``."""
    target = given.get("_target_") if isinstance(given, dict) else given
    return str(target).rpartition(".")[2]
