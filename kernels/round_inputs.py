# SPDX-License-Identifier: Apache-2.0
"""Inputs of packed weights as their scheme has them. Enqueues on the current stream and does not wait."""

from __future__ import annotations

from phalanx.kernels.arrays import Array, ceil_div, require, scalar_name
from phalanx.kernels.library import Library

__all__ = ["round_inputs"]

_NUM_THREADS = 128
_SPAN = 1024
"""Columns of a block where no groups say how many."""


def round_inputs(
    library: Library, x: Array, out: Array, *, group: int = 0, powers_of_two: bool = False, factors: Array | None = None
) -> None:
    """``out = round_in_groups(x * factors)``: values of fp8 codes with one scale for each ``group`` columns; 0 = no codes.

    Scales are rounded up to ``powers_of_two``, if they are to be.

    x, out [T, I]; factors [I] float32, or None.
    """
    num_rows, columns = x.shape
    require("out", out, (num_rows, columns), x)
    if factors is not None:
        require("factors", factors, (columns,), "float32")
    span = group or _SPAN
    kernel = library.function(
        "round_inputs", "round_inputs", SCALAR=scalar_name(x), COLUMNS=columns, SPAN=span, GROUP=group,
        POWERS_OF_TWO=int(powers_of_two), HAS_FACTORS=int(factors is not None), NUM_THREADS=_NUM_THREADS,
    )  # fmt: skip
    kernel((num_rows, ceil_div(columns, span)), (_NUM_THREADS,), (x, factors, out))
