# SPDX-License-Identifier: Apache-2.0
"""Results of products of codes from their sums. Enqueues on the current stream; does not wait."""

from __future__ import annotations

import numpy as np

from phalanx.kernels.arrays import Array, ceil_div, num_threads_for, require, scalar_name
from phalanx.kernels.library import Library

__all__ = ["scale_sums"]

_MOST_THREADS = 256


def scale_sums(
    library: Library, sums: Array, x_scale: Array, weight_scale: Array, bias: Array | None, out: Array, first: int
) -> None:
    """``out[:, first:first + R] = (sums * x_scale) * weight_scale + bias``, rounded once.

    sums [T, R] int32 (of int8 codes) or float32 (of fp8); x_scale [T] and weight_scale [O] float32; bias [O]; out [T, O].
    """
    (num_tokens, rows), out_features = sums.shape, out.shape[1]
    require("sums", sums, (num_tokens, rows), "float32" if sums.dtype == np.float32 else "int32")
    require("x_scale", x_scale, (num_tokens,), "float32")
    require("weight_scale", weight_scale, (out_features,), "float32")
    require("out", out, (num_tokens, out_features), out)
    if bias is not None:
        require("bias", bias, (out_features,), out)
    width = next(width for width in (4, 2, 1) if not any(extent % width for extent in (rows, first, out_features)))
    num_threads = num_threads_for(ceil_div(rows, width), _MOST_THREADS)
    kernel = library.function(
        "scale_sums",
        "scale_sums",
        SUM="float" if sums.dtype == np.float32 else "int",
        SCALAR=scalar_name(out),
        VEC=width,
        NUM_THREADS=num_threads,
        HAS_BIAS=int(bias is not None),
    )
    sizes = (np.int32(rows), np.int32(first), np.int32(out_features))
    blocks = num_tokens * ceil_div(rows, width * num_threads)
    kernel((blocks,), (num_threads,), (sums, x_scale, weight_scale, bias, out, *sizes))
