"""Files next to ``config.json`` in which quantisers describe what they did, for checkpoints whose ``config.json`` does not.

Sources: ModelOpt ``torch/export/unified_export_hf.py``; AutoGPTQ ``quantization/config.py``; AutoAWQ ``models/_config.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from phalanx.checkpoints.files import ModelDirectory
from phalanx.parallel.errors import ConfigError

__all__ = ["QUANTIZATION_FILES", "with_quantization_file"]

QUANTIZATION_FILES: Mapping[str, str] = MappingProxyType(
    {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
)
"""File -> the ``quant_method`` that it stands for."""

_SPELLINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"bits": ("bits", "w_bit"), "group_size": ("group_size", "q_group_size"), "quant_algo": ("quant_algo",)}
)
"""What two descriptions must agree in, and the keys of it."""


def with_quantization_file(config: dict[str, Any], directory: ModelDirectory) -> dict[str, Any]:
    """``config.json`` with the ``quantization_config`` that a file next to it holds, or with what its own leaves out.

    ModelOpt, for one, writes the size of groups into its file alone.

    Raises:
        ConfigError: both are there and disagree.
        CheckpointError: the file is no JSON object.
    """
    for name, method in QUANTIZATION_FILES.items():
        if not directory.has(name):
            continue
        found = {"quant_method": method, **directory.read_json(name)}
        own = config.get("quantization_config") or config.get("compression_config")
        if not own:
            return {**config, "quantization_config": found}
        if isinstance(own, dict):
            _refuse_contradiction(own, found, name)
            left_out = {
                field: value
                for field, keys in _SPELLINGS.items()
                if _value(own, keys) is None and (value := _value(found, keys)) is not None
            }
            config = {**config, "quantization_config": {**own, **left_out}}
    return config


def _refuse_contradiction(own: Mapping[str, Any], found: Mapping[str, Any], name: str) -> None:
    for field, keys in {"quant_method": ("quant_method",), **_SPELLINGS}.items():
        one, other = _value(own, keys), _value(found, keys)
        if one is not None and other is not None and str(one).lower() != str(other).lower():
            raise ConfigError(
                f"{field} is {one!r} in quantization_config of config.json, but {other!r} in {name}; remove the one that is wrong"
            )


def _value(section: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    nested = section.get("quantization")
    fields = {**section, **nested} if isinstance(nested, dict) else section
    return next((fields[key] for key in keys if fields.get(key) is not None), None)
