# SPDX-License-Identifier: Apache-2.0
"""Weights with groups in any order of columns to plain values. Enqueues on the current stream; does not wait."""

from __future__ import annotations

import numpy as np

from phalanx.kernels.arrays import Array, Defines, ceil_div, require, scalar_name
from phalanx.kernels.library import Library
from phalanx.parallel.errors import ExecutorError

__all__ = ["unpack_ordered"]

_NUM_THREADS = 256


def unpack_ordered(
    library: Library, codes: Array, group_index: Array, scale: Array, zero: Array | None, out: Array
) -> None:
    """``out[o, i] = (codes[o, i] - zero[o, g]) * scale[o, g]`` with ``g = group_index[o // (O / N), i]``, rounded once.

    codes [O, I] int8; group_index [N, I] int32, N a divisor of O; scale [O, G] float32; zero [O, G] int8; out [O, I].
    """
    (rows, columns), groups = codes.shape, scale.shape[1]
    require("codes", codes, (rows, columns), "int8")
    num_indices = group_index.shape[0]
    require("group_index", group_index, (num_indices, columns), "int32")
    if rows % num_indices:
        raise ExecutorError(
            f"{num_indices} rows of group_index cannot be shared by {rows} rows of codes; pass a divisor"
        )
    require("scale", scale, (rows, groups), "float32")
    require("out", out, (rows, columns), out)
    if zero is not None:
        require("zero", zero, (rows, groups), "int8")
    defines: Defines = {"SCALAR": scalar_name(out), "HAS_ZERO": int(zero is not None), "NUM_THREADS": _NUM_THREADS}
    kernel = library.function("unpack_ordered", "unpack_ordered", 0, **defines)
    arguments = (
        codes,
        group_index,
        scale,
        zero,
        out,
        np.int32(columns),
        np.int32(groups),
        np.int32(rows // num_indices),
    )
    kernel((rows, ceil_div(columns, _NUM_THREADS)), (_NUM_THREADS,), arguments)
