# SPDX-License-Identifier: Apache-2.0
"""Quantised numbers: rounding to fp8 and int8, scales per tensor, row and group, and the way back.

These definitions are what every engine implements; the CUDA kernels produce the same codes and scales bit for bit. All
arithmetic is IEEE single precision, rounded to nearest even. fp8 is e4m3 (Micikevicius et al. 2022, "FP8 formats for deep
learning"): four exponent bits, three mantissa bits, no infinities, largest value 448.

Shapes: T rows (tokens, or output features of a weight), I columns, G groups of columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "E4M3",
    "E4M3_MAX",
    "FP8_SMALLEST_SCALE",
    "INT8_SMALLEST_SCALE",
    "CodeKind",
    "Codes",
    "dequantize",
    "quantize_groups",
    "quantize_rows",
    "quantize_static",
    "sums_of_codes",
    "to_codes",
]

Float32Array = NDArray[np.float32]
CodeKind = Literal["fp8", "int8"]

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E4M3_MAX = 448.0
INT8_MAX = 127.0

FP8_SMALLEST_SCALE = np.float32(1.0 / (448 * 512))
"""Keeps the inverse finite for rows of zeros."""
INT8_SMALLEST_SCALE = np.float32(2.0**-40)
EXACT_COLUMNS = 1024
"""Products of int8 codes are at most 2**14, and float32 holds every integer up to 2**24: so many are summed exactly, in any order."""


@dataclass(frozen=True, slots=True)
class Codes:
    """A quantised matrix: ``value[t, i] = codes[t, i] * scale[t, group of i]``.

    Attributes:
        codes: ``[T, I]``, float8_e4m3fn or int8.
        scale: ``[T, G]`` float32; G = 1 for one scale a row.
    """

    codes: NDArray[Any]
    scale: Float32Array


def to_codes(x: Float32Array, inverse: Float32Array | np.float32, kind: CodeKind) -> NDArray[Any]:
    """``x * inverse`` rounded to nearest even and saturated; NaN stays NaN in fp8."""
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = x * inverse
        if kind == "fp8":
            # Clipped first: ml_dtypes gives NaN above 464, the GPU's conversion saturates.
            codes: NDArray[Any] = np.clip(scaled, -E4M3_MAX, E4M3_MAX).astype(E4M3)
        else:
            codes = np.clip(np.rint(scaled), -128, 127).astype(np.int8)
        return codes


def quantize_rows(x: Float32Array, kind: CodeKind = "fp8", ceiling: float = np.inf) -> Codes:
    """One scale a row: the largest magnitude becomes the largest code.

    ``ceiling`` bounds that magnitude before the scale is made, larger values saturate (FBGEMM's ``activation_scale_ub``).
    """
    return quantize_groups(x, 0, kind, ceiling)


def quantize_groups(
    x: Float32Array, group: int, kind: CodeKind = "fp8", ceiling: float = np.inf, powers_of_two: bool = False
) -> Codes:
    """One scale for each ``group`` columns of each row, the last group possibly short; ``group`` 0 = whole rows.

    ``powers_of_two``: scales are rounded up to one (``scale_fmt: ue8m0`` of DeepSeek-V3.1), which no value saturates by.
    """
    starts = np.arange(0, x.shape[1], group) if group else np.zeros(1, np.intp)
    amax = np.maximum.reduceat(np.abs(x), starts, axis=1)
    scale = _scale(np.minimum(amax, np.float32(ceiling)), kind)
    if powers_of_two:
        scale = _power_of_two(scale)
    inverse = _spread(np.float32(1) / scale, group, x.shape[1])
    return Codes(to_codes(x, inverse, kind), scale)


def quantize_static(x: Float32Array, scale: float, kind: CodeKind = "fp8") -> Codes:
    """A given scale for the whole matrix; values beyond its range saturate."""
    fixed = np.float32(scale)
    return Codes(to_codes(x, np.float32(1) / fixed, kind), np.full((len(x), 1), fixed))


def dequantize(codes: Codes, group: int = 0) -> Float32Array:
    """The float32 values that the codes stand for, ``[T, I]``; ``group`` as it was for `quantize_groups`."""
    values: Float32Array = codes.codes.astype(np.float32)
    values *= _spread(codes.scale, group, values.shape[1])
    return values


def sums_of_codes(
    x: NDArray[np.int8], weight: Float32Array, multiply: Callable[[Float32Array, Float32Array], Float32Array]
) -> NDArray[np.int32]:
    """``x @ weight.T`` of int8 codes ``[T, I]`` and ``[O, I]``, the latter held as float32: exact, whatever order ``multiply`` adds in."""
    total = np.zeros((len(x), len(weight)), np.int32)
    for start in range(0, x.shape[1], EXACT_COLUMNS):
        columns = slice(start, start + EXACT_COLUMNS)
        total += multiply(x[:, columns].astype(np.float32), weight[:, columns]).astype(np.int32)
    return total


def _scale(amax: Float32Array, kind: CodeKind) -> Float32Array:
    largest, smallest = (E4M3_MAX, FP8_SMALLEST_SCALE) if kind == "fp8" else (INT8_MAX, INT8_SMALLEST_SCALE)
    scale: Float32Array = np.maximum(amax / np.float32(largest), smallest)
    return scale


def _power_of_two(scale: Float32Array) -> Float32Array:
    """The smallest power of two that is not below a normal float32; NaN stays."""
    rounded = (scale.view(np.uint32) + np.uint32(0x7FFFFF)) & np.uint32(0xFF800000)
    return np.where(np.isfinite(scale), rounded.view(np.float32), scale)


def _spread(scale: Float32Array, group: int, columns: int) -> Float32Array:
    return np.repeat(scale, group, axis=1)[:, :columns] if group else scale
