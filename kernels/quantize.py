# SPDX-License-Identifier: Apache-2.0
"""Rows as 8-bit codes and scales, and the kernel that makes them. Enqueues on the current stream and does not wait."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from phalanx.kernels.arrays import Array, ceil_div, num_threads_for, require, scalar_name, vector_width
from phalanx.kernels.library import Library
from phalanx.parallel.errors import ExecutorError

__all__ = [
    "LARGEST_ROW",
    "QUANTIZED_DEFINES",
    "CodeKind",
    "CodeRule",
    "QuantizedRows",
    "quantize_rows",
    "quantized_defines",
    "require_codes",
    "require_product_of_codes",
    "row_threads",
]

CodeKind = Literal["fp8", "int8"]
QUANTIZED_DEFINES: dict[CodeKind | None, int] = {None: 0, "fp8": 1, "int8": 2}
LARGEST_ROW = 65536
"""Columns of the longest row that the kernels keep in registers."""
_MOST_VECTORS, _FEWEST_THREADS = 8, 128


@dataclass(frozen=True, slots=True)
class CodeRule:
    """How kernels make codes of rows.

    Attributes:
        bound: on the magnitudes that make a row's scale; with ``is_static`` the scale of all rows.
    """

    kind: CodeKind
    bound: float = math.inf
    is_static: bool = False


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """``value[t, i] = codes[t, i] * scale[t]``.

    Attributes:
        codes: ``[T, I]`` bytes on the device: e4m3 (fp8) or int8, as uint8.
        scale: ``[T]`` float32.
        rule: by which kernels are to fill them; None = with each row's own scale.
    """

    codes: Array
    scale: Array
    kind: CodeKind
    rule: CodeRule | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """``[T, I]``."""
        return self.codes.shape

    def __len__(self) -> int:
        return self.codes.shape[0]

    @property
    def bound(self) -> np.float32:
        """The rule's, as kernels take it."""
        return np.float32(math.inf if self.rule is None else self.rule.bound)


def quantized_defines(rows: QuantizedRows | None) -> dict[str, int]:
    """Defines of a kernel that fills ``rows``, or plain values."""
    is_static = rows is not None and rows.rule is not None and rows.rule.is_static
    return {"QUANTIZED": QUANTIZED_DEFINES[None if rows is None else rows.kind], "STATIC_SCALE": int(is_static)}


def require_codes(rows: QuantizedRows, shape: tuple[int, int]) -> None:
    """Raise ExecutorError unless codes and scales have this shape and are contiguous."""
    require("codes", rows.codes, shape, "uint8")
    require("scale", rows.scale, (shape[0],), "float32")


def require_product_of_codes(
    x: QuantizedRows, weight: QuantizedRows, out: Array, bias: Array | None, out_columns: int
) -> None:
    """Raise ExecutorError unless x [T, I], weight [O, I], out [T, ``out_columns``] and bias [O], of its type, are a product's operands."""
    (num_tokens, in_features), out_features = x.shape, weight.shape[0]
    require_codes(x, (num_tokens, in_features))
    require_codes(weight, (out_features, in_features))
    require("out", out, (num_tokens, out_columns), out)
    if bias is not None:
        require("bias", bias, (out_features,), out)


def row_threads(library: Library, num_rows: int, num_vectors: int) -> int:
    """Threads of a block that keeps a row of ``num_vectors`` loads in registers.

    Few rows, two blocks on each multiprocessor at most, get as many threads as a block may have, since they wait for one
    row. Of many rows several share a multiprocessor, so that one's loads overlap another's arithmetic and stores.
    """
    if num_rows <= 2 * library.num_multiprocessors:
        return num_threads_for(ceil_div(num_vectors, ceil_div(num_vectors, 1024)))
    return num_threads_for(min(num_vectors, max(_FEWEST_THREADS, ceil_div(num_vectors, _MOST_VECTORS))))


def quantize_rows(library: Library, x: Array, out: QuantizedRows) -> None:
    """Fill ``out`` with the codes and scales of x ``[T, I]``."""
    num_rows, columns = x.shape
    if columns > LARGEST_ROW:
        raise ExecutorError(
            f"rows of {columns} columns are longer than {LARGEST_ROW}, what the kernel keeps in registers"
        )
    require("x", x, (num_rows, columns), x)
    require_codes(out, (num_rows, columns))
    width = vector_width(x, columns)
    num_threads = row_threads(library, num_rows, columns // width)
    kernel = library.function(
        "quantize_rows",
        "quantize_rows",
        SCALAR=scalar_name(x),
        COLUMNS=columns,
        VEC=width,
        NUM_THREADS=num_threads,
        **quantized_defines(out),
    )
    kernel((num_rows,), (num_threads,), (x, out.codes, out.scale, out.bound))
