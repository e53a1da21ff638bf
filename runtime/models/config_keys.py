# SPDX-License-Identifier: Apache-2.0
"""Keys of ``config.json`` that cannot change what a decoder computes, and those that have to hold one value.

A family declares the keys that it honours by reading them (`ConfigReader`). What it never reads must be listed here, or hold a
value that asks for nothing; anything else is refused by name. ``docs/checkpoints.md`` prints these tables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from phalanx.runtime.generation_config import GENERATION_KEYS

__all__ = ["FIXED_KEYS", "HARMLESS_KEYS", "asks_for_nothing", "is_harmless"]

HARMLESS_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "describes the files, or who wrote them": (
            "_commit_hash", "_name_or_path", "name_or_path", "base_model_name_or_path", "architectures", "model_type",
            "transformers_version", "auto_map", "_auto_class", "_from_model_config", "unsloth_version", "unsloth_fixed",
            "axolotl_version", "transformers.js_config", "library_name", "license", "language", "tags", "tokenizer_class",
            "processor_class", "finetuning_task", "model_name", "vocab_file", "_diffusers_version", "custom_pipelines", "is_llama_config",
            "paddlenlp_version", "trust_remote_code", "author", "created_date",
            "max_sequence_length", "model_max_length", "tokenizer_model_max_length", "tokenizer_padding_side",
        ),
        "acts in training alone": (
            "initializer_range", "init_std", "initializer_factor", "attention_dropout", "attn_dropout", "attn_pdrop",
            "embd_pdrop", "resid_pdrop", "hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout",
            "ffn_dropout", "emb_dropout_prob", "attn_dropout_prob", "activation_dropout", "layerdrop", "classifier_dropout",
            "gradient_checkpointing", "use_gradient_checkpointing", "neftune_noise_alpha", "router_aux_loss_coef",
            "router_jitter_noise", "router_z_loss_coef", "output_router_logits", "pretraining_tp", "seed", "freeze",
            "embedding_dropout", "residual_dropout",
        ),
        "chooses an implementation, not a result": (
            "use_cache", "output_past", "torchscript", "use_bfloat16", "attn_implementation", "_attn_implementation",
            "_attn_implementation_autoset", "_attn_implementation_internal", "_experts_implementation", "experts_implementation",
            "_experts_implementation_internal", "_flash_attn_2_enabled", "use_flash_attention", "use_flash_attention_2",
            "use_flash_attn", "flash_attn", "use_fused_rmsnorm", "use_fused_rms_norm", "use_fused_rope",
            "use_sdpa", "bias_dropout_fusion",
            "masked_softmax_fusion", "skip_bias_add", "skip_bias_add_qkv", "offset_alibi", "use_recompute", "recompute_granularity", "tensor_parallel_degree", "virtual_pp_degree", "sequence_parallel", "fused_ops", "chunk_size_feed_forward",
            "model_parallel", "device_map", "init_device", "attention_softmax_in_fp32",
            "scale_attention_softmax_in_fp32", "low_cpu_mem_usage", "kernel_config",
        ),
        "belongs to another head or another use of the weights": (
            "id2label", "label2id", "num_labels", "_num_labels", "problem_type", "summary_activation", "summary_first_dropout",
            "summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params", "prefix", "return_dict",
            "use_return_dict", "output_attentions", "output_hidden_states", "output_scores", "is_decoder",
            "type_vocab_size", "n_special", "predict_special_tokens",
        ),
        "names a special token; the tokenizer's files decide": (
            "pad_token_id", "sep_token_id", "unk_token_id", "cls_token_id", "mask_token_id", "decoder_start_token_id",
            "bos_token", "eos_token", "pad_token",
        ),
        "is a sampling setting; generation_config.json decides": tuple(
            sorted(GENERATION_KEYS.keys() - {"bos_token_id", "eos_token_id"})
        ),
    }
)  # fmt: skip
"""By reason: keys that every family ignores."""

FIXED_KEYS: Mapping[str, bool] = MappingProxyType(
    {
        "is_causal": True,
        "causal": True,
        "use_causal_mask": True,
        "use_bidirectional_attention": False,
        "scale_attn_weights": True,
        "is_encoder_decoder": False,
        "add_cross_attention": False,
        "tie_encoder_decoder": False,
    }
)
"""Switches of any family that must have this value, or be null, unless the family reads them."""

_HARMLESS = frozenset(key for keys in HARMLESS_KEYS.values() for key in keys)

_FACTOR = re.compile(r"scale|scaling|multiplier|factor|ratio|alpha|temperature")
"""Names of multipliers, which 1 leaves without effect."""


def is_harmless(key: str) -> bool:
    """Whether ``key`` is in `HARMLESS_KEYS`."""
    return key in _HARMLESS


def asks_for_nothing(key: str, value: Any) -> bool:
    """Whether ``value`` switches an unknown feature off: null, false, zero, empty, or one for a multiplier."""
    if value is None or value is False or value in ("", [], {}):
        return True
    if key.startswith("_") and isinstance(value, str):  # a note
        return True
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value == 0 or (value == 1 and (isinstance(value, float) or _FACTOR.search(key) is not None))
