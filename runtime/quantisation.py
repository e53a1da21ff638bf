# SPDX-License-Identifier: Apache-2.0
"""How a model's weights, activations and cache are quantised, in words for reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from phalanx.checkpoints.quantization.held import check_not_quantized, held_formats, quantized_while_loading

if TYPE_CHECKING:
    from phalanx.checkpoints.formats import FormatPlan
    from phalanx.checkpoints.quantization.held import QuantizeName
    from phalanx.checkpoints.spec import WeightSpec
    from phalanx.runtime.config import EngineConfig, ModelConfig
    from phalanx.runtime.models import Model

__all__ = [
    "check_cache_dtype",
    "check_quantize",
    "has_fp8_cache",
    "in_one_line",
    "quantisation_by_part",
    "quantisation_in_words",
    "saturation_in_words",
    "schemes_in_words",
]


def quantisation_in_words(model: Model, config: ModelConfig, stored: FormatPlan, options: EngineConfig) -> str:
    """`quantisation_by_part` in one line."""
    return in_one_line(quantisation_by_part(model, config, stored, options))


def in_one_line(parts: Mapping[str, str]) -> str:
    """``weights: fp8 by row, activations by token; cache: fp8 with a scale of 1``."""
    return "; ".join(f"{part}: {words}" for part, words in parts.items())


def quantisation_by_part(
    model: Model, config: ModelConfig, stored: FormatPlan, options: EngineConfig
) -> dict[str, str]:
    """Words for ``weights``, with the activations that they meet, and ``cache``.

    Args:
        stored: formats of the checkpoint, which `options` may have quantised while it is loaded.
    """
    held = held_formats(stored, options.quantize)
    found = [(held.choose(spec).scheme or stored.choose(spec).scheme, spec) for spec in _matrices(model, config)]
    return {"weights": schemes_in_words(found), "cache": _cache(stored, options)}


def schemes_in_words(found: Sequence[tuple[str, WeightSpec]]) -> str:
    """The schemes of a model's weights, each once, and how many matrices of layers have none.

    Args:
        found: the scheme of each weight and its declaration; "" = it stays as it is, which routers, embeddings and the head usually do.
    """
    words = " and ".join(sorted({scheme for scheme, _ in found if scheme})) or "not quantised"
    split = [scheme for scheme, spec in found if quantized_while_loading(spec)]
    if any(split) and not all(split):
        words += f" (all but {split.count('')} of {len(split)} matrices of layers)"
    return words


def check_quantize(
    model: Model, config: ModelConfig, stored: FormatPlan, quantize: QuantizeName, flag: str = "--quantize"
) -> None:
    """Refuse ``--quantize``, or another ``flag`` that says it, of a checkpoint that is quantised already.

    Raises:
        ConfigError: naming its format.
    """
    check_not_quantized(map(stored.choose, _matrices(model, config)), quantize, flag)


def check_cache_dtype(options: EngineConfig, dtype: str) -> None:
    """Refuse a cache of values in another type than ``dtype``, which the model computes in.

    Raises:
        ConfigError: with both types.
    """
    from phalanx.parallel.errors import ConfigError

    wanted = options.kv_cache_dtype
    if wanted not in ("auto", "fp8", dtype):
        raise ConfigError(f"--kv-cache-dtype={wanted} is neither fp8 nor the compute type {dtype}; use one of these")


def has_fp8_cache(stored: FormatPlan, options: EngineConfig) -> bool:
    """Whether keys and values are held as fp8, by the operator's choice or the checkpoint's."""
    return options.kv_cache_dtype == "fp8" or (stored.has_kv_scales and options.kv_cache_dtype == "auto")


def saturation_in_words(count: int) -> str:
    """A warning about ``count`` values that did not fit an fp8 cache."""
    return (
        f"{count:,} keys or values were too large for the fp8 cache and were cut to the largest that its scales allow, which "
        "changes answers; calibrate the checkpoint (phalanx quantize --kv-cache fp8), or keep the cache in the compute type (--kv-cache-dtype)"
    )


def _matrices(model: Model, config: ModelConfig) -> list[WeightSpec]:
    return [spec for spec in model.weights(config) if len(spec.parts[0].shape) > 1]


def _cache(stored: FormatPlan, options: EngineConfig) -> str:
    if not has_fp8_cache(stored, options):
        return "not quantised"
    return "fp8 with the checkpoint's scales" if stored.has_kv_scales else "fp8 with a scale of 1"
