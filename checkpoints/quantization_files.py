# SPDX-License-Identifier: Apache-2.0
"""Files next to ``config.json`` in which quantisers describe what they did, for checkpoints whose ``config.json`` does not.

Sources: ModelOpt ``torch/export/unified_export_hf.py``; AutoGPTQ ``quantization/config.py``; AutoAWQ ``models/_config.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from phalanx.checkpoints.files import ModelDirectory
from phalanx.checkpoints.quantized import QUANTIZATION_KEYS
from phalanx.parallel.errors import ConfigError

__all__ = ["QUANTIZATION_FILES", "with_quantization_file"]

QUANTIZATION_FILES: Mapping[str, str] = MappingProxyType(
    {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
)
"""File -> the ``quant_method`` that it stands for."""

_SPELLINGS: Mapping[str, str] = MappingProxyType(
    {
        "w_bit": "bits",
        "q_group_size": "group_size",
        "format": "checkpoint_format",
        "ignore": "exclude_modules",
        "kv_cache_scheme": "kv_cache_quant_algo",
    }
)
"""What one and the same field is called in one of the two places, and in the other."""

_ABOUT_THE_RUN = frozenset(
    {"producer", "meta", "model_name_or_path", "model_file_base_name", "dataset", "tokenizer", "damp_percent"}
)
"""Fields that say how weights were made, not what they are."""


def with_quantization_file(config: dict[str, Any], directory: ModelDirectory) -> dict[str, Any]:
    """``config.json`` with the ``quantization_config`` of its ``text_config`` or a file next to it, or with what its own leaves out.

    ModelOpt, for one, writes the size of groups into its file alone, and GPTQ's packers the meaning of their zero points.

    Raises:
        ConfigError: both are there and disagree.
        CheckpointError: the file is no JSON object.
    """
    config = _with_that_of_the_text(config)
    for name, method in QUANTIZATION_FILES.items():
        if not directory.has(name):
            continue
        found = {"quant_method": method, **directory.read_json(name)}
        own = config.get("quantization_config") or config.get("compression_config")
        if not own:
            return {**config, "quantization_config": found}
        if isinstance(own, dict):
            config = {**config, "quantization_config": _merged(_flat(own), _flat(found), name)}
    return config


def _with_that_of_the_text(config: dict[str, Any]) -> dict[str, Any]:
    """Some checkpoints for texts and images describe it in ``text_config``, and vLLM looks there, too."""
    text = config.get("text_config")
    found = {key: text[key] for key in QUANTIZATION_KEYS if text.get(key)} if isinstance(text, dict) else {}
    for key, value in found.items():
        if config.get(key, value) != value:
            raise ConfigError(
                f"{key} of config.json and that of its text_config differ; remove the one that is wrong, or restore the file from where "
                "the checkpoint comes from"
            )
    return {**config, **found}


def _flat(section: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say something, those that ModelOpt nests in ``quantization`` among them."""
    nested = section.get("quantization")
    fields = {**section, **nested} if isinstance(nested, dict) else section
    return {key: value for key, value in fields.items() if key != "quantization" and value is not None}


def _merged(own: dict[str, Any], found: Mapping[str, Any], name: str) -> dict[str, Any]:
    keys = {_SPELLINGS.get(key, key): key for key in own}
    for key, value in found.items():
        field = _SPELLINGS.get(key, key)
        if field not in keys:
            own = {**own, field: value}
        elif field not in _ABOUT_THE_RUN and _meaning(own[keys[field]]) != _meaning(value):
            raise ConfigError(
                f"{field} is {own[keys[field]]!r} in quantization_config of config.json, but {value!r} in {name}; "
                "remove the one that is wrong"
            )
    return own


def _meaning(value: Any) -> Any:
    """What equal values have in common: case says nothing, nor do the order and nesting of names."""
    if isinstance(value, list):
        return frozenset(str(name) for one in value for name in (one if isinstance(one, list) else [one]))
    if isinstance(value, dict) and value.get("type") == "float":
        return f"fp{value.get('num_bits')}"  # ModelOpt's cache: {"num_bits": 8, "type": "float"} here, "FP8" there
    if isinstance(value, dict):
        return frozenset((key, _meaning(one)) for key, one in value.items())
    return str(value).lower()
