"""Reading Hugging Face ``config.json`` values with one clear error each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.config import Activation, RopeConfig
from phalanx.runtime.config import DTypeName as _DTypeName

__all__ = ["ConfigReader"]

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


class _Common(TypedDict):
    dtype: Any
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ConfigReader:
    """Typed access to one parsed ``config.json``. Every method raises `ConfigError` naming the field and its value."""

    raw: Mapping[str, Any]

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number; absent or null means ``default``, which is required where the field is."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name}={value!r} in config.json is not a whole number; the file is damaged")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        return _number(name, self._get(name, default))

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{name}={value!r} in config.json is neither true nor false; the file is damaged")
        return value

    def activation(self, name: str, default: str) -> Activation:
        """An activation under any of its published names."""
        value = self._get(name, default)
        if value not in _ACTIVATIONS:
            raise ConfigError(f"{name}={value!r} in config.json is not supported; supported: {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[value]

    def exact_quotient(self, numerator: str, denominator: str) -> int:
        """One field divided by another, without rest."""
        quotient, rest = divmod(self.integer(numerator), max(self.integer(denominator), 1))
        if rest:
            raise ConfigError(
                f"{numerator}={self.integer(numerator)} in config.json is not a multiple of "
                f"{denominator}={self.integer(denominator)}; the file is damaged"
            )
        return quotient

    def refuse_unless(self, name: str, expected: object) -> None:
        """Refuse a model that needs a feature its family's functions do not have."""
        value = self.raw.get(name, expected)
        if value != expected:
            raise ConfigError(f"{name}={value!r} in config.json is not supported; only {expected!r} is")

    def common(self) -> _Common:
        """Fields that every family has: stored dtype and special tokens."""
        dtype = str(self.raw.get("dtype") or self.raw.get("torch_dtype") or "float32")
        supported: tuple[_DTypeName, ...] = ("float32", "bfloat16", "float16")
        if dtype not in supported:
            raise ConfigError(f"dtype={dtype!r} in config.json is not supported; supported: {', '.join(supported)}")
        eos = self.raw.get("eos_token_id")
        eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
        return {"dtype": dtype, "bos_token_id": self.raw.get("bos_token_id"), "eos_token_ids": eos_ids}

    def rope(self, head_dim: int) -> RopeConfig:
        """Rotary parameters, in the layout of transformers 5 (``rope_parameters``) or earlier (``rope_scaling``)."""
        fields = dict(self.raw.get("rope_parameters") or self.raw.get("rope_scaling") or {})
        theta = _number("rope_theta", fields.get("rope_theta", self.raw.get("rope_theta", 10000.0)))
        kind = fields.get("rope_type", fields.get("type", "default"))
        rotary_dim = int(head_dim * _number("partial_rotary_factor", self.raw.get("partial_rotary_factor", 1.0)))
        base: dict[str, Any] = {"theta": theta, "rotary_dim": rotary_dim}
        if kind == "default":
            return RopeConfig(**base)
        if kind not in ("linear", "llama3", "yarn"):
            raise ConfigError(
                f"rope_type={kind!r} in config.json is not supported; supported: default, linear, llama3, yarn"
            )
        original = fields.get("original_max_position_embeddings", self.raw.get("max_position_embeddings", 2048))
        scaled = {**base, "scaling": kind, "factor": _number("rope factor", fields.get("factor")),
                  "original_max_positions": int(original)}  # fmt: skip
        if kind == "llama3":
            scaled |= {key: _number(key, fields.get(key)) for key in ("low_freq_factor", "high_freq_factor")}
        if kind == "yarn":
            scaled |= {key: _number(key, fields[key]) for key in ("beta_fast", "beta_slow") if fields.get(key)}
            default = 0.1 * math.log(scaled["factor"]) + 1.0 if scaled["factor"] > 1 else 1.0
            scaled["attention_factor"] = _number("attention_factor", fields.get("attention_factor") or default)
        return RopeConfig(**scaled)

    def _get(self, name: str, default: Any) -> Any:
        value = self.raw.get(name)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{name} is missing from config.json; the file is damaged or of another architecture")
        return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{name}={value!r} in config.json is not a finite number; the file is damaged")
    return float(value)
