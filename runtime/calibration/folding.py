# SPDX-License-Identifier: Apache-2.0
"""Factors of columns that move from a product's input into its weight: the norm before it is divided by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["NormFold", "awq_factors", "fold_into_norm", "smoothquant_factors"]

Float32Array = NDArray[np.float32]
_ALPHA = 0.5


@dataclass(frozen=True, slots=True)
class NormFold:
    """A norm with smaller outputs.

    Attributes:
        weight: ``[D]`` in the stored format.
        factors: ``[D]`` float32, by which the columns of the products must be multiplied.
        bias: ``[D]`` in its stored format; None = the norm has none.
    """

    weight: NDArray[Any]
    factors: Float32Array
    bias: NDArray[Any] | None = None


def smoothquant_factors(input_amax: Float32Array, weight_amax: Float32Array) -> Float32Array:
    """``input_amax**0.5 / weight_amax**0.5`` for each column (Xiao et al. 2023 with alpha 0.5), 1 where either is zero."""
    is_used = (input_amax > 0) & (weight_amax > 0)
    x, w = (np.where(is_used, amax, np.float32(1)) for amax in (input_amax, weight_amax))
    factors: Float32Array = (x**_ALPHA / w ** (1 - _ALPHA)).astype(np.float32)
    return factors


def awq_factors(input_mean: Float32Array, power: float) -> Float32Array:
    """``input_mean**power`` for each column, around 1 (Lin et al. 2024); 1 where a column is always zero."""
    is_used = input_mean > 0
    raised = np.where(is_used, np.where(is_used, input_mean, np.float32(1)) ** np.float32(power), np.float32(1))
    used = raised[is_used] if is_used.any() else raised
    return np.where(is_used, raised / np.sqrt(used.max() * used.min()), np.float32(1)).astype(np.float32)


def fold_into_norm(
    stored: NDArray[Any], weight_offset: float, wanted: Float32Array, bias: NDArray[Any] | None = None
) -> NormFold:
    """Divide a norm by about ``wanted``.

    The quotient is rounded to the stored format; the factors are what it comes to then, so that norm times product stays what it was.
    A bias is divided by the same factors and rounded to its format, half a last place. A channel that a format cannot divide so keeps its
    weight and bias.
    """
    offset = np.float32(weight_offset)
    whole = stored.astype(np.float32) + offset
    with np.errstate(over="ignore"):
        divided = (whole / wanted - offset).astype(stored.dtype)
        rounded = divided.astype(np.float32) + offset
        is_possible = np.isfinite(rounded) & (rounded != 0) & (whole != 0)
        factors = np.where(is_possible, whole / np.where(is_possible, rounded, np.float32(1)), np.float32(1))
        if bias is not None:
            moved = (bias.astype(np.float32) / factors).astype(bias.dtype)
            is_possible &= np.isfinite(moved)
            factors, bias = np.where(is_possible, factors, np.float32(1)), np.where(is_possible, moved, bias)
    return NormFold(np.where(is_possible, divided, stored), factors.astype(np.float32), bias)
