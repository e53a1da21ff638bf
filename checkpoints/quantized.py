# SPDX-License-Identifier: Apache-2.0
"""Recognising quantised checkpoints, so that what cannot be loaded is refused by its own name.

Sources: ``quantizers/auto.py`` of transformers (``quant_method``), the packers of GPTQ, AWQ, bitsandbytes, compressed-tensors,
ModelOpt and MLX (names of keys and tensors).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["QUANTIZATION_KEYS", "describe_quantization", "quantization_method", "quantized_tensors"]

QUANTIZATION_KEYS = frozenset({"quantization_config", "compression_config", "quantization"})
"""Keys of ``config.json`` that describe a quantisation; the last is MLX's."""

_TENSORS: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        "GPTQ or AWQ": re.compile(r".*\.(qweight|qzeros|g_idx)"),
        "bitsandbytes": re.compile(r".*(\.(absmax|SCB|quant_map|nested_absmax|nested_quant_map)|\.quant_state\..*)"),
        "compressed-tensors": re.compile(r".*\.(weight_packed|weight_shape|weight_zero_point|weight_g_idx)"),
        "FP8 or INT8": re.compile(
            r".*\.(weight_scale|weight_scale_inv|weight_scale_2|qscale_weight|input_scale|qscale_act|[kv]_scale)"
        ),
        "MLX": re.compile(r".*\.(scales|biases)"),
    }
)


def describe_quantization(config: Mapping[str, Any]) -> str | None:
    """Name the key of a parsed ``config.json`` that says the checkpoint is quantised, and the method; None if none does."""
    for key in sorted(QUANTIZATION_KEYS):
        value = config.get(key)
        if not value:
            continue
        fields = value if isinstance(value, dict) else {}
        method = quantization_method(fields) or fields.get("quant_algo") or fields.get("mode")
        bits = fields.get("bits") or _bits_loaded_in(fields)
        words = [f"quant_method={str(method)[:40]!r}"] if method else []
        words += [f"bits={str(bits)[:10]}"] if bits else []
        return f"{key} in config.json says that this checkpoint is quantised ({', '.join(words) or str(value)[:80]})"
    return None


def quantization_method(fields: Mapping[str, Any]) -> str:
    """``quant_method`` of a ``quantization_config``, also where the first files of a method leave it out; "" = it does not say."""
    producer = fields.get("producer")
    if method := fields.get("quant_method"):
        return str(method)
    if isinstance(producer, dict) and producer.get("name") == "modelopt":
        return "modelopt"
    return "bitsandbytes" if _bits_loaded_in(fields) else ""


def _bits_loaded_in(fields: Mapping[str, Any]) -> int | None:
    return next((bits for bits in (4, 8) if fields.get(f"load_in_{bits}bit")), None)


def quantized_tensors(names: Iterable[str]) -> str | None:
    """Name the method whose packed weights or scales are among ``names``; None if none are."""
    listed = list(names)
    for method, pattern in _TENSORS.items():
        if any(pattern.fullmatch(name) for name in listed):
            return method
    return None
