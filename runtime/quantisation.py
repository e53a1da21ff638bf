"""How a model's weights, activations and cache are quantised, in one line for reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phalanx.checkpoints.quantization.held import held_formats

if TYPE_CHECKING:
    from phalanx.checkpoints.formats import FormatPlan
    from phalanx.runtime.config import EngineConfig, ModelConfig
    from phalanx.runtime.models import Model

__all__ = ["quantisation_in_words"]


def quantisation_in_words(model: Model, config: ModelConfig, stored: FormatPlan, options: EngineConfig) -> str:
    """``weights: fp8 by row, activations by token; cache: fp8 with a scale of 1``.

    Args:
        stored: formats of the checkpoint, which `options` may have quantised while it is loaded.
    """
    choose = held_formats(stored, options.quantize).choose
    matrices = (spec for spec in model.weights(config) if len(spec.parts[0].shape) > 1)
    schemes = sorted({scheme for spec in matrices if (scheme := choose(spec).scheme)})
    return f"weights: {' and '.join(schemes) or 'not quantised'}; cache: {_cache(stored, options)}"


def _cache(stored: FormatPlan, options: EngineConfig) -> str:
    wanted = options.kv_cache_dtype
    if stored.has_kv_scales and wanted in ("auto", "fp8"):
        return "fp8 with the checkpoint's scales"
    return "fp8 with a scale of 1" if wanted == "fp8" else "not quantised"
