# SPDX-License-Identifier: Apache-2.0
"""Rotary frequencies as tables, in float64, for every executor."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from phalanx.runtime.config import RopeConfig

__all__ = ["TABLE_FIELDS", "inverse_frequencies", "rotary_table"]

Float64Array = NDArray[np.float64]

TABLE_FIELDS = (
    "theta", "rotary_dim", "scaling", "factor", "low_freq_factor", "high_freq_factor", "original_max_positions", "beta_fast",
    "beta_slow", "attention_factor", "truncate", "short_factors",
)  # fmt: skip
"""Fields of `RopeConfig` that `rotary_table` takes into account; executors refuse others unless they list them."""


def inverse_frequencies(rope: RopeConfig, longest: int = 0) -> Float64Array:
    """``[rotary_dim / 2]`` radians per position; ``longest``: tokens of the longest sequence, by which longrope chooses its factors.

    Sources: Su et al. 2021 (default); position interpolation, Chen et al. 2023 (linear); the Llama 3.1 model card's
    reference code (llama3); Peng et al. 2023, YaRN (yarn); Ding et al. 2024, LongRoPE (longrope).
    """
    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float64) / rope.rotary_dim
    frequencies = rope.theta**-exponents
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "llama3":
        return _llama3(frequencies, rope)
    if rope.scaling == "yarn":
        return _yarn(frequencies, rope)
    if rope.scaling == "longrope":
        factors = rope.long_factors if longest > rope.original_max_positions else rope.short_factors
        return frequencies / np.array(factors, np.float64)
    return frequencies


def rotary_table(rope: RopeConfig, num_positions: int) -> tuple[Float64Array, Float64Array]:
    """Cosines and sines of an engine's sequences, each ``[num_positions, rotary_dim / 2]``, times the attention factor."""
    angles = np.outer(np.arange(num_positions, dtype=np.float64), inverse_frequencies(rope, num_positions))
    return np.cos(angles) * rope.attention_factor, np.sin(angles) * rope.attention_factor


def _llama3(frequencies: Float64Array, rope: RopeConfig) -> Float64Array:
    """Stretch long wavelengths by ``factor``, keep short ones, blend linearly between the two limits."""
    rotations = rope.original_max_positions * frequencies / (2 * math.pi)
    blend = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(blend, 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / rope.factor)


def _yarn(frequencies: Float64Array, rope: RopeConfig) -> Float64Array:
    """Stretch dimensions that turn less than ``beta_slow`` times over the training length, ramp up to ``beta_fast``."""

    def dimension(rotations: float) -> float:
        turns = rope.original_max_positions / (rotations * 2 * math.pi)
        return rope.rotary_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    # A band of no width is a step; transformers widens it by the same amount.
    ramp = (np.arange(rope.rotary_dim // 2, dtype=np.float64) - low) / (high - low if high != low else 0.001)
    stretch = np.clip(ramp, 0.0, 1.0)
    return frequencies * (1 - stretch + stretch / rope.factor)
