# SPDX-License-Identifier: Apache-2.0
"""Inputs of products of fp8 blocks as codes with a scale for each group of columns. Enqueues on the current stream and does not wait."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from phalanx.kernels.activation_names import ActivationName
from phalanx.kernels.arrays import Array, Defines, ceil_div, require, scalar_name
from phalanx.kernels.library import Library
from phalanx.kernels.product_sizes import BLOCK, packed_row_bytes, padded_tokens
from phalanx.parallel.errors import ExecutorError

__all__ = ["QuantizedGroups", "group_defines", "quantize_gated_groups", "quantize_groups", "require_groups"]

_TOKENS, _EACH = 8, 4
_WIDEST_LOAD = 4


@dataclass(frozen=True, slots=True)
class QuantizedGroups:
    """``value[t, i] = codes[t, place of i] * scale[i // 128, t]``, in the layouts that cuBLASLt takes.

    Attributes:
        codes: ``[T, packed_row_bytes]`` e4m3 as uint8, T a multiple of 4, columns in the order of `PackedWeight.codes`; zeros beyond I.
        scale: ``[ceil(I / 128), T]`` float32.
        powers_of_two: kernels that fill them round scales up to one.
    """

    codes: Array
    scale: Array
    powers_of_two: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """``[T, packed_row_bytes]``."""
        return self.codes.shape

    def __len__(self) -> int:
        return self.codes.shape[0]


def require_groups(groups: QuantizedGroups, shape: tuple[int, int]) -> None:
    """Raise ExecutorError unless codes and scales are those of inputs of this shape, rows rounded up to a multiple of 4."""
    num_tokens, columns = shape
    if len(groups) != padded_tokens(num_tokens):
        raise ExecutorError(
            f"codes of {num_tokens} tokens need {padded_tokens(num_tokens)} rows; there are {len(groups)}"
        )
    require("codes", groups.codes, (len(groups), packed_row_bytes(columns, "fp8")), "uint8")
    require("scale", groups.scale, (ceil_div(columns, BLOCK), len(groups)), "float32")


def group_defines(groups: QuantizedGroups) -> Defines:
    """Defines of a kernel that fills ``groups``."""
    return {"QUANTIZED": 1, "STATIC_SCALE": 0, "GROUPS": 1, "POWERS_OF_TWO": int(groups.powers_of_two)}


def quantize_groups(library: Library, x: Array, out: QuantizedGroups) -> None:
    """Fill ``out`` with the codes and scales of x ``[T, I]``; its rows beyond T become zeros.

    Raises:
        ExecutorError: ``out`` has other shapes.
    """
    num_tokens, columns = x.shape
    _fill(library, x, (num_tokens, columns), out, None)


def quantize_gated_groups(library: Library, x: Array, out: QuantizedGroups, name: ActivationName) -> None:
    """As `quantize_groups`, of ``f(gate) * up`` rounded to the type of x = [gate | up] ``[T, 2F]``."""
    num_tokens, columns = x.shape
    _fill(library, x, (num_tokens, columns // 2), out, name)


def _fill(
    library: Library, x: Array, shape: tuple[int, int], out: QuantizedGroups, activation: ActivationName | None
) -> None:
    num_tokens, columns = shape
    require("x", x, (num_tokens, columns * (1 if activation is None else 2)), x)
    require_groups(out, shape)
    width = next(width for width in (_WIDEST_LOAD, 2, 1) if columns % width == 0)
    defines: Defines = {"SCALAR": scalar_name(x), "COLUMNS": columns, "VEC": width, **group_defines(out)}
    gated: Defines = {"GATED": int(activation is not None), "ACTIVATION": activation or "silu"}
    kernel = library.function("quantize_groups", "quantize_groups", 0, **(defines | gated))
    grid = (ceil_div(len(out), _TOKENS), ceil_div(out.scale.shape[0], _EACH))
    kernel(grid, (_TOKENS * 32,), (x, out.codes, out.scale, np.int32(num_tokens), np.int32(len(out))))
