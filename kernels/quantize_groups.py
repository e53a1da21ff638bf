# SPDX-License-Identifier: Apache-2.0
"""Inputs of products of fp8 blocks as codes with a scale for each group of columns. Enqueues on the current stream and does not wait."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from phalanx.kernels.arrays import Array, ceil_div, require, scalar_name
from phalanx.kernels.library import Library
from phalanx.kernels.product_sizes import BLOCK, packed_row_bytes, padded_tokens
from phalanx.parallel.errors import ExecutorError

__all__ = ["QuantizedGroups", "quantize_groups"]

_TOKENS, _EACH = 8, 4
_WIDEST_LOAD = 4


@dataclass(frozen=True, slots=True)
class QuantizedGroups:
    """``value[t, i] = codes[t, place of i] * scale[i // 128, t]``, in the layouts that cuBLASLt takes.

    Attributes:
        codes: ``[T, packed_row_bytes]`` e4m3 as uint8, T a multiple of 4, columns in the order of `PackedWeight.codes`; zeros beyond I.
        scale: ``[ceil(I / 128), T]`` float32.
    """

    codes: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """``[T, packed_row_bytes]``."""
        return self.codes.shape

    def __len__(self) -> int:
        return self.codes.shape[0]


def quantize_groups(library: Library, x: Array, out: QuantizedGroups, powers_of_two: bool = False) -> None:
    """Fill ``out`` with the codes and scales of x ``[T, I]``; its rows beyond T become zeros.

    ``powers_of_two``: scales are rounded up to one.

    Raises:
        ExecutorError: ``out`` has other shapes.
    """
    num_tokens, columns = x.shape
    require("x", x, (num_tokens, columns), x)
    if len(out) != padded_tokens(num_tokens):
        raise ExecutorError(f"codes of {num_tokens} tokens need {padded_tokens(num_tokens)} rows; there are {len(out)}")
    require("codes", out.codes, (len(out), packed_row_bytes(columns, "fp8")), "uint8")
    require("scale", out.scale, (ceil_div(columns, BLOCK), len(out)), "float32")
    kernel = library.function(
        "quantize_groups", "quantize_groups", SCALAR=scalar_name(x), COLUMNS=columns,
        VEC=next(width for width in (_WIDEST_LOAD, 2, 1) if columns % width == 0), POWERS_OF_TWO=int(powers_of_two), CODES=1, QUANTIZED=1,
        STATIC_SCALE=0,
    )  # fmt: skip
    grid = (ceil_div(len(out), _TOKENS), ceil_div(out.scale.shape[0], _EACH))
    kernel(grid, (_TOKENS * 32,), (x, out.codes, out.scale, np.int32(num_tokens), np.int32(len(out))))
