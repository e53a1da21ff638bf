# SPDX-License-Identifier: Apache-2.0
"""Inputs of products of plain values as their scheme has them. Enqueues on the current stream and does not wait."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from phalanx.kernels.arrays import Array, ceil_div, num_threads_for, require, scalar_name
from phalanx.kernels.library import Library
from phalanx.kernels.quantize import LARGEST_ROW, QUANTIZED_DEFINES, CodeRule
from phalanx.parallel.errors import ExecutorError

__all__ = ["InputRule", "round_inputs"]

_SPAN = 1024
"""Columns of a block where no scale belongs to a group of them, or to a row."""
_FEWEST_THREADS, _COLUMNS_EACH = 128, 16


@dataclass(frozen=True, slots=True)
class InputRule:
    """Which codes inputs stand for.

    Attributes:
        codes: of which kind, and with which scales.
        group: columns that share a scale; 0 = the row.
        powers_of_two: scales are rounded up to one.
    """

    codes: CodeRule
    group: int = 0
    powers_of_two: bool = False


def round_inputs(library: Library, x: Array, out: Array, rule: InputRule | None, factors: Array | None = None) -> None:
    """``out = value_of_codes(x * factors)``, of the codes of ``rule``; None = no codes. Each step is rounded to the type of x.

    x, out [T, I]; factors [I] float32, or None.

    Raises:
        ExecutorError: rows with a scale are longer than the kernel keeps in registers.
    """
    num_rows, columns = x.shape
    require("out", out, (num_rows, columns), x)
    if factors is not None:
        require("factors", factors, (columns,), "float32")
    codes = None if rule is None else rule.codes
    span = _SPAN if rule is None or rule.codes.is_static else rule.group or columns
    if span > LARGEST_ROW:
        raise ExecutorError(f"rows of {span} columns are longer than {LARGEST_ROW}, what the kernel keeps in registers")
    num_threads = max(_FEWEST_THREADS, num_threads_for(ceil_div(span, _COLUMNS_EACH)))
    kernel = library.function(
        "round_inputs", "round_inputs", SCALAR=scalar_name(x), COLUMNS=columns, SPAN=span,
        QUANTIZED=QUANTIZED_DEFINES[None if codes is None else codes.kind],
        STATIC_SCALE=int(codes is not None and codes.is_static), POWERS_OF_TWO=int(rule is not None and rule.powers_of_two),
        HAS_FACTORS=int(factors is not None), NUM_THREADS=num_threads,
    )  # fmt: skip
    bound = np.float32(0.0 if codes is None else codes.bound)
    kernel((num_rows, ceil_div(columns, span)), (num_threads,), (x, factors, out, bound))
