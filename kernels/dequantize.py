# SPDX-License-Identifier: Apache-2.0
"""Codes of a weight as plain values, for formats that no product takes as they are. Enqueues; does not wait."""

from __future__ import annotations

import numpy as np

from phalanx.kernels.arrays import Array, ceil_div, require, scalar_name
from phalanx.kernels.library import Library

__all__ = ["dequantize"]

_NUM_THREADS = 256


def dequantize(library: Library, codes: Array, scale: Array, zero: Array | None, out: Array, *, group: int) -> None:
    """``out = (codes - zero) * scale`` in the compute type, rounded once.

    codes [O, I]: int8, or e4m3 as uint8; scale [O, G] float32 and zero [O, G] int8 for ``group`` columns each; out [O, I].
    """
    rows, columns = out.shape
    groups = ceil_div(columns, group)
    is_fp8 = codes.dtype == np.uint8
    require("codes", codes, (rows, columns), "uint8" if is_fp8 else "int8")
    require("scale", scale, (rows, groups), "float32")
    if zero is not None:
        require("zero", zero, (rows, groups), "int8")
    require("out", out, (rows, columns), out)
    kernel = library.function(
        "dequantize",
        "dequantize",
        SCALAR=scalar_name(out),
        FP8=int(is_fp8),
        HAS_ZERO=int(zero is not None),
        NUM_THREADS=_NUM_THREADS,
    )
    sizes = (np.int32(columns), np.int32(groups), np.int32(group))
    kernel((ceil_div(columns, _NUM_THREADS), rows), (_NUM_THREADS,), (codes, scale, zero, out, *sizes))
