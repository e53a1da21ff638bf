# SPDX-License-Identifier: Apache-2.0
"""What an executor has, compared with everything that a model uses before a weight is read.

An executor lists features by name: operations, their options, and the fields of each layer's attention. What is not on its
list is refused, so a feature that an executor has never heard of cannot be computed wrongly. ``rms_norm.weight_offset`` is an
option of an operation; ``attention.rope.interleaved`` a field of `RopeConfig` in an `AttentionSpec`. Options and fields that
are at their default need no entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from phalanx.checkpoints.formats import DENSE, FormattedWeight
from phalanx.parallel.errors import ConfigError
from phalanx.runtime.config import ModelConfig
from phalanx.runtime.models import Model
from phalanx.runtime.models.shapes import use_of
from phalanx.runtime.rope import TABLE_FIELDS

__all__ = ["ALL_ENGINES", "ANY", "Capabilities", "Limit"]


@dataclass(frozen=True, slots=True)
class Limit:
    """Which values of a feature an executor computes.

    Attributes:
        at_most, multiple_of: bounds of a number.
    """

    at_most: int | None = None
    multiple_of: int = 1

    def complaint(self, name: str, value: Any) -> str | None:
        """What is wrong with ``value``, or None."""
        if self.at_most is not None and value > self.at_most:
            return f"{name}={value} exceeds its limit of {self.at_most}"
        if self.multiple_of > 1 and value % self.multiple_of:
            return f"{name}={value} is not a multiple of {self.multiple_of}"
        return None


ANY = Limit()
"""Every value."""

ALL_ENGINES: Mapping[str, Limit] = MappingProxyType(
    dict.fromkeys(
        (
            "embedding", "embedding.scale", "position_embedding",
            "rms_norm", "rms_norm.weight_offset", "layer_norm", "layer_norm.weight_offset",
            "column_linear", "row_linear_partial", "add_bias", "all_reduce", "add", "scale", "clip",
            "activation", "activation.kind", "gated_activation", "gated_activation.kind",
            "attention", "attention.num_heads", "attention.num_kv_heads", "attention.head_dim", "attention.scale",
            "attention.window",
            "attention.rope", "attention.rope.interleaved", *(f"attention.rope.{name}" for name in TABLE_FIELDS),
            "logits",
        ),
        ANY,
    )
)  # fmt: skip
"""What every engine computes, the rotary tables among them, which one function makes for all."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an executor has.

    Attributes:
        engine: ``numpy``, ``cuda`` or ``tensorrt``, for messages.
        dtypes: compute types.
        features: by name; see the module.
        formats: names of the weight formats that it can multiply; None = any, by `Format.dequantize`.
    """

    engine: str
    dtypes: frozenset[str]
    features: Mapping[str, Limit]
    formats: frozenset[str] | None = frozenset({DENSE.name})

    def check_formats(self, config: ModelConfig, weights: Iterable[FormattedWeight]) -> None:
        """Raise `ConfigError` naming engine, format and weight for the first weight that the engine cannot multiply."""
        for weight in weights:
            if self.formats is not None and weight.format.name not in self.formats:
                raise ConfigError(
                    f"the {self.engine} engine cannot multiply {weight.format.name} weights, which {weight.spec.owner} of "
                    f"this {config.architecture} has (it multiplies {', '.join(sorted(self.formats))}); try --engine numpy"
                )

    def check(self, model: Model, config: ModelConfig, dtype: str) -> None:
        """Compare everything that the model uses, in every layer.

        Raises:
            ConfigError: naming engine, model and the first feature that is missing.
        """
        complaint = next(self.complaints(model, config, dtype), None)
        if complaint is not None:
            way_out = "" if self.engine == "numpy" else "; use --engine numpy"
            raise ConfigError(f"the {self.engine} engine cannot run {config.architecture}: {complaint}{way_out}")

    def complaints(self, model: Model, config: ModelConfig, dtype: str) -> Iterator[str]:
        """What the engine lacks for the model, a clause each. Raises as `use_of`."""
        if "decode" not in model.passes:
            yield f"it has no decoding pass (only {', '.join(model.passes)})"
        if dtype not in self.dtypes:
            yield f"dtype={dtype} is not supported (only {', '.join(sorted(self.dtypes))})"
        for feature in use_of(model, config).features:
            limit = self.features.get(feature.name)
            if limit is None:
                value = "" if feature.value is None else f"={feature.value}"
                yield f"{feature.name}{value} is not supported"
            elif complaint := limit.complaint(feature.name, feature.value):
                yield complaint
