# SPDX-License-Identifier: Apache-2.0
"""Keys of ``tokenizer_config.json``: honoured, ignored, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from phalanx.parallel.errors import CheckpointError
from phalanx.runtime.token_fields import shown

__all__ = ["HONOURED_KEYS", "IGNORED_KEYS", "check_keys"]

HONOURED_KEYS = (
    "add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder", "additional_special_tokens", "bos_token",
    "chat_template", "cls_token", "eos_token", "extra_special_tokens", "legacy", "mask_token", "pad_token", "sep_token",
    "split_special_tokens", "tokenizer_class", "unk_token",
)  # fmt: skip
"""Keys that are applied as transformers applies them; so are a model's own ``*_token`` texts, for its chat template."""

IGNORED_KEYS = (
    "_commit_hash", "_from_auto", "add_dummy_prefix_space", "add_eos_token_to_prompt", "auto_map", "backend", "cache_dir",
    "chat_control_tokens", "clean_text", "clean_up_tokenization_spaces", "device_map", "do_basic_tokenize", "do_lower_case",
    "do_lowercase", "encode_special_tokens", "errors", "extra_ids", "fix_mistral_regex", "from_slow", "full_tokenizer_file",
    "image_processor_type", "init_inputs", "is_local", "keep_accents", "language", "legacy_behaviour", "local_files_only",
    "max_len", "max_length", "merges_file", "model_input_names", "model_max_length", "model_specific_special_tokens", "name_or_path",
    "never_split", "normalization", "pad_to_multiple_of", "pad_token_type_id", "padding", "padding_side",
    "processor_class", "remove_space", "response_schema", "response_template", "return_token_type_ids", "revision",
    "short_chat_template", "sp_model_kwargs", "spaces_between_special_tokens", "special_tokens_map_file", "spm_file", "src_lang",
    "stride", "strip_accents", "subfolder", "target_lang", "tgt_lang", "token", "tokenize_chinese_chars", "tokenizer_file",
    "tokenizer_type", "tokenizer_version", "transformers_version", "trim_offsets", "truncation", "truncation_side",
    "truncation_strategy", "trust_remote_code", "unk_id", "use_auth_token", "use_default_system_prompt", "use_fast", "use_legacy",
    "use_regex", "verbose", "version", "vocab_file", "vocab_size", "vocab_type", "wordpieces_prefix",
)  # fmt: skip
"""Keys that say nothing which ``tokenizer.json`` does not say, or nothing that a decoder's prompts and answers depend on."""

_KNOWN = frozenset((*HONOURED_KEYS, *IGNORED_KEYS))


def check_keys(config: Mapping[str, Any]) -> None:
    """Refuse a key that is in no list and not empty.

    Raises:
        CheckpointError: naming the key.
    """
    for key, value in config.items():
        if key in _KNOWN or value is None or value is False or value in ("", 0, [], {}):
            continue
        if isinstance(value, float) and not math.isfinite(value):  # says nothing
            continue
        if key.startswith("_") and isinstance(value, str):  # a note
            continue
        if key.endswith("_token") and isinstance(value, str | dict | bool):
            continue
        if key.endswith(("_token_id", "_token_index", "_length", "_size")):  # a model's own numbers, for its processors
            continue
        raise CheckpointError(
            f"{key}={shown(value)} in tokenizer_config.json is unknown and may change how texts become tokens; if it does not, "
            "remove the key from the file"
        )
