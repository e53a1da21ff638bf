# SPDX-License-Identifier: Apache-2.0
"""Rotary parameters of ``config.json``: every key known, one order of precedence, the formulas of transformers 5.

Source: ``modeling_rope_utils.py`` of transformers 5 (``RotaryEmbeddingConfigMixin`` for the order, ``_compute_yarn_parameters``
for the defaults).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from phalanx.parallel.errors import ConfigError
from phalanx.runtime.config import RopeConfig
from phalanx.runtime.models.config_keys import asks_for_nothing
from phalanx.runtime.token_fields import is_finite_number, shown

__all__ = ["ROPE_FIELD_KEYS", "ROPE_KEYS", "RopeFields", "read_rope"]

LARGEST_FACTOR = 65536.0
"""Beyond any context that is stretched; larger values are mistakes that would end in infinities."""

ROPE_KEYS = frozenset({"rope_parameters", "rope_scaling", "original_max_position_embeddings"})
"""Keys at the top level of ``config.json`` that `read_rope` reads."""

_ANY = frozenset(
    {"type", "rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "finetuned"}
)
_OF_KIND: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "default": frozenset(),
        "linear": frozenset({"factor"}),
        "dynamic": frozenset({"factor"}),
        "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
        "yarn": frozenset(
            {
                "factor",
                "attention_factor",
                "attn_factor",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "truncate",
            }
        ),
        "longrope": frozenset({"factor", "attention_factor", "short_factor", "long_factor"}),
    }
)
ROPE_FIELD_KEYS: Mapping[str, frozenset[str]] = MappingProxyType({kind: _ANY | own for kind, own in _OF_KIND.items()})
"""Keys inside ``rope_scaling`` and ``rope_parameters`` that are honoured, by rope type."""


@dataclass(frozen=True, slots=True)
class RopeFields:
    """What a family says about its rotary embedding outside ``rope_scaling`` and ``rope_parameters``.

    Attributes:
        theta: base, from the top level or the family's default.
        partial: share of a head that is rotated, from the top level; None where it is not there.
        default_partial: the family's default share; None where the family always rotates whole heads.
        partial_key: name of ``partial`` at the top level.
        default_original: ``original_max_position_embeddings`` at the top level of a file that leaves it out there; None for a family
            without a default, which takes what the rope parameters say.
    """

    theta: Any
    partial: Any = None
    default_partial: float | None = None
    partial_key: str = "partial_rotary_factor"
    default_original: int | None = None


def read_rope(raw: Mapping[str, Any], head_dim: int, family: RopeFields, layer_type: str | None = None) -> RopeConfig:
    """Combine the rotary fields of ``raw``; see `ConfigReader.rope`.

    Raises:
        ConfigError: an unknown key or rope type, a value that is malformed or out of range, two places that disagree.
    """
    fields = _select(_winning_fields(raw, family), layer_type)
    kind = _kind(fields)
    _check_keys(fields, kind)
    theta = _number("rope_theta", fields.get("rope_theta", family.theta), above=1.0)
    base = RopeConfig(theta, _rotary_dim(fields, head_dim, family))
    if kind == "default":
        return base
    longest = raw.get("max_position_embeddings")
    original = _original_positions(raw, fields, kind, 2048 if longest is None else longest, family.default_original)
    factor = _factor(fields, kind, longest, original)
    if kind == "dynamic":  # equal to "default" up to the trained length, to which max_positions limits a sequence
        return base
    if kind == "longrope":
        return _longrope(base, fields, factor, original)
    if kind == "llama3":
        return _llama3(base, fields, factor, original)
    if kind == "yarn":
        return _yarn(base, fields, factor, original)
    return RopeConfig(base.theta, base.rotary_dim, "linear", factor, original_max_positions=original)


def _winning_fields(raw: Mapping[str, Any], family: RopeFields) -> dict[str, Any]:
    """``rope_scaling`` takes precedence over ``rope_parameters`` as a whole, as in transformers.

    So base and rotated share of ``rope_parameters`` do not count then; they are refused where they differ from what does.
    """
    scaling, parameters = (_fields(raw, name) for name in ("rope_scaling", "rope_parameters"))
    if not scaling:
        return parameters
    if any(isinstance(value, dict) for value in parameters.values()):
        raise ConfigError(
            "rope_scaling in config.json stands next to rope_parameters for each kind of layer; remove one of the two"
        )
    usual = family.default_partial if family.partial is None else family.partial
    outside = {"rope_theta": family.theta, "partial_rotary_factor": 1.0 if usual is None else usual}
    for name, default in outside.items():
        if name in parameters and parameters[name] != scaling.get(name, default):
            raise ConfigError(
                f"rope_scaling in config.json takes precedence over rope_parameters, whose {name}={parameters[name]!r} differs "
                f"from {scaling.get(name, default)!r}; remove one of the two"
            )
    return scaling


def _fields(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{name}={shown(value)} in config.json is not a JSON object; correct it or remove the key")
    return {key: each for key, each in value.items() if each is not None}


def _select(fields: dict[str, Any], layer_type: str | None) -> dict[str, Any]:
    """The fields of one kind of layer, where they are given for each kind."""
    nested = {key: value for key, value in fields.items() if isinstance(value, dict)}
    if not nested:
        return fields
    if layer_type is not None and layer_type in nested:
        chosen = nested[layer_type]
    elif all(value == next(iter(nested.values())) for value in nested.values()) and len(nested) == len(fields):
        chosen = next(iter(nested.values()))
    else:
        raise ConfigError(
            f"rope_parameters in config.json differ by kind of layer ({', '.join(nested)}), which this architecture does not "
            "support"
        )
    return {key: value for key, value in chosen.items() if value is not None}


def _kind(fields: Mapping[str, Any]) -> str:
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind == "su" or (kind == "yarn" and "short_factor" in fields):  # its first names
        kind = "longrope"
    if not isinstance(kind, str) or kind not in _OF_KIND:
        raise ConfigError(f"rope_type={shown(kind)} in config.json is not supported; supported: {', '.join(_OF_KIND)}")
    return kind


def _check_keys(fields: Mapping[str, Any], kind: str) -> None:
    for key, value in fields.items():
        if key not in ROPE_FIELD_KEYS[kind] and not asks_for_nothing(key, value):
            raise ConfigError(
                f"{key}={shown(value)} in the rope parameters of config.json has no meaning for rope_type={kind!r}; "
                f"known: {', '.join(sorted(ROPE_FIELD_KEYS[kind]))}"
            )


def _rotary_dim(fields: Mapping[str, Any], head_dim: int, family: RopeFields) -> int:
    """Rotated part of a head; the rope parameters' own share takes precedence over the top level's."""
    given = fields.get("partial_rotary_factor", family.partial)
    name = "partial_rotary_factor" if "partial_rotary_factor" in fields else family.partial_key
    usual = 1.0 if family.default_partial is None else family.default_partial
    share = _number(name, usual if given is None else given, above=0.0)
    if share > 1.0 or (share < 1.0 and family.default_partial is None):
        limit = "at most 1" if family.default_partial is not None else "1, as this architecture rotates whole heads"
        raise ConfigError(f"{name}={share:g} in config.json is not supported; it must be {limit}")
    rotary_dim = int(head_dim * share)
    if rotary_dim < 2 or rotary_dim % 2:
        raise ConfigError(
            f"head_dim={head_dim} and {name}={share:g} in config.json rotate {rotary_dim} values of a head, which must be even"
        )
    return rotary_dim


def _original_positions(
    raw: Mapping[str, Any], fields: Mapping[str, Any], kind: str, longest: Any, default: int | None
) -> int:
    """Trained length. The top level takes precedence where transformers reads it, which is not so for linear scaling."""
    name = "original_max_position_embeddings"
    top = raw.get(name) if kind in ("llama3", "yarn", "longrope") else None
    if top is None and default is not None and fields.get(name, default) != default:
        raise ConfigError(
            f"{name}={shown(fields[name])} in the rope parameters of config.json does not count for this architecture, which takes "
            f"{default} where the top level does not say; move it to the top level"
        )
    value = fields.get(name, longest if default is None else default) if top is None else top
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ConfigError(
            f"{name}={shown(value)} in config.json is not a whole number of at least 1; the file is damaged"
        )
    return value


def _factor(fields: Mapping[str, Any], kind: str, longest: Any, original: int) -> float:
    if kind in ("yarn", "longrope") and "factor" not in fields and isinstance(longest, int):
        return max(1.0, longest / original)
    return _number("factor", fields.get("factor"), above=0.0, most=LARGEST_FACTOR)


def _llama3(base: RopeConfig, fields: Mapping[str, Any], factor: float, original: int) -> RopeConfig:
    low, high = (_number(key, fields.get(key), above=0.0) for key in ("low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise ConfigError(f"high_freq_factor={high:g} in config.json is not above low_freq_factor={low:g}")
    return RopeConfig(base.theta, base.rotary_dim, "llama3", factor, low, high, original)


def _longrope(base: RopeConfig, fields: Mapping[str, Any], factor: float, original: int) -> RopeConfig:
    short, long = (_divisors(fields, f"{which}_factor", base.rotary_dim // 2) for which in ("short", "long"))
    scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    return RopeConfig(
        base.theta, base.rotary_dim, "longrope", factor, original_max_positions=original, short_factors=short,
        long_factors=long,
        attention_factor=_number("attention_factor", fields.get("attention_factor", scale), above=0.0, most=LARGEST_FACTOR),
    )  # fmt: skip


def _divisors(fields: Mapping[str, Any], name: str, count: int) -> tuple[float, ...]:
    value = fields.get(name)
    if not isinstance(value, list) or len(value) != count:
        raise ConfigError(
            f"{name}={shown(value)} in config.json is not a list of {count} numbers, one for each frequency"
        )
    return tuple(_number(name, each, above=0.0, most=LARGEST_FACTOR) for each in value)


def _yarn(base: RopeConfig, fields: Mapping[str, Any], factor: float, original: int) -> RopeConfig:
    fast, slow = (
        _number(key, fields.get(key) or usual, above=0.0) for key, usual in (("beta_fast", 32), ("beta_slow", 1))
    )
    if fast < slow:
        raise ConfigError(f"beta_fast={fast:g} in config.json is below beta_slow={slow:g}")
    truncate = fields.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ConfigError(f"truncate={shown(truncate)} in config.json is neither true nor false")
    return RopeConfig(
        base.theta, base.rotary_dim, "yarn", factor, original_max_positions=original, beta_fast=fast, beta_slow=slow,
        attention_factor=_yarn_attention_factor(fields, factor), truncate=truncate,
    )  # fmt: skip


def _yarn_attention_factor(fields: Mapping[str, Any], factor: float) -> float:
    """The given one, else the ratio of the two scales where both are given, else the paper's 0.1 ln(factor) + 1; times ``attn_factor``.

    transformers passes over ``attn_factor``; vLLM reads it so, and DeepSeek's distilled Qwen 3 takes the paper's factor back by it.
    """

    def scale(multiplier: float) -> float:
        return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1 else 1.0

    own = _number("attn_factor", fields.get("attn_factor", 1.0), above=0.0, most=LARGEST_FACTOR)
    if "attention_factor" in fields:
        return own * _number("attention_factor", fields["attention_factor"], above=0.0, most=LARGEST_FACTOR)
    numerator, denominator = (_number(key, fields.get(key, 0)) for key in ("mscale", "mscale_all_dim"))
    if not numerator or not denominator:
        return own * scale(1.0)
    if scale(numerator) <= 0 or scale(denominator) <= 0:
        raise ConfigError(
            f"mscale={numerator:g} and mscale_all_dim={denominator:g} in config.json give no positive factor"
        )
    return own * scale(numerator) / scale(denominator)


def _number(name: str, value: Any, *, above: float | None = None, most: float = math.inf) -> float:
    if not is_finite_number(value):
        raise ConfigError(f"{name}={shown(value)} in config.json is not a finite number; the file is damaged")
    if above is not None and value <= above:
        raise ConfigError(f"{name}={value} in config.json is not above {above:g}; the file is damaged")
    if value > most:
        raise ConfigError(f"{name}={value} in config.json exceeds {most:g}; the file is damaged")
    return float(value)
