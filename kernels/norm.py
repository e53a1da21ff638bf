# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and LayerNorm with the residual add. Enqueues on the current stream and does not wait."""

from __future__ import annotations

import numpy as np

from phalanx.kernels.arrays import Array, ceil_div, num_threads_for, require, scalar_name, vector_width
from phalanx.kernels.library import Library
from phalanx.kernels.product_sizes import packed_row_bytes
from phalanx.kernels.quantize import QuantizedRows, quantized_defines, require_codes
from phalanx.kernels.quantize_groups import QuantizedGroups, group_defines, require_groups
from phalanx.parallel.errors import ExecutorError

__all__ = ["layer_norm", "norm_takes_groups", "rms_norm"]

_LARGEST_HIDDEN_SIZE = 32768


def rms_norm(
    library: Library,
    x: Array,
    weight: Array,
    out: Array | QuantizedRows | QuantizedGroups,
    *,
    epsilon: float,
    weight_offset: float = 0.0,
    residual: Array | None = None,
) -> None:
    """``out = h / sqrt(mean(h**2) + epsilon) * (weight_offset + weight)`` with ``h = x + residual``.

    x, out [T, D] (out may be x); weight [D]. ``residual`` [T, D] receives h, rounded to its dtype, and the norm is
    taken of that. `QuantizedRows` and `QuantizedGroups` for ``out`` receive the codes of what would have been stored, groups of rows that
    `norm_takes_groups`.
    """
    _norm(library, x, weight, out, epsilon, weight_offset, residual, None, is_layer_norm=False)


def layer_norm(
    library: Library,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    out: Array | QuantizedRows | QuantizedGroups,
    *,
    epsilon: float,
    weight_offset: float = 0.0,
    residual: Array | None = None,
) -> None:
    """``out = (h - mean(h)) / sqrt(var(h) + epsilon) * (weight_offset + weight) + bias`` with ``h = x + residual``.

    Shapes and the treatment of ``residual`` as in ``rms_norm``; bias [D]. Without a weight, factors are 1.
    """
    _norm(library, x, weight, out, epsilon, weight_offset, residual, bias, is_layer_norm=True)


def _norm(
    library: Library,
    x: Array,
    weight: Array | None,
    out: Array | QuantizedRows | QuantizedGroups,
    epsilon: float,
    weight_offset: float,
    residual: Array | None,
    bias: Array | None,
    *,
    is_layer_norm: bool,
) -> None:
    num_tokens, hidden_size = x.shape
    if hidden_size > _LARGEST_HIDDEN_SIZE:
        raise ExecutorError(
            f"hidden_size={hidden_size} is above {_LARGEST_HIDDEN_SIZE}, what the norm keeps in registers"
        )
    codes = out if isinstance(out, QuantizedRows | QuantizedGroups) else None
    if isinstance(codes, QuantizedRows):
        require_codes(codes, (num_tokens, hidden_size))
    elif isinstance(codes, QuantizedGroups):
        require_groups(codes, (num_tokens, hidden_size))
    dense = None if isinstance(out, QuantizedRows | QuantizedGroups) else out
    for name, rows in (("x", x), ("out", dense), ("residual", residual)):
        if rows is not None:
            require(name, rows, (num_tokens, hidden_size), x)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            require(name, vector, (hidden_size,), x)
    width = vector_width(x, hidden_size)
    num_threads = _block_size(hidden_size // width)
    kernel = library.function(
        "norm",
        "residual_norm",
        SCALAR=scalar_name(x),
        HIDDEN_SIZE=hidden_size,
        VEC=width,
        NUM_THREADS=num_threads,
        LAYER_NORM=int(is_layer_norm),
        HAS_RESIDUAL=int(residual is not None),
        HAS_WEIGHT=int(weight is not None),
        HAS_BIAS=int(bias is not None),
        **(group_defines(codes) if isinstance(codes, QuantizedGroups) else quantized_defines(codes) | {"GROUPS": 0}),
    )
    written = (dense, codes.codes if codes else None, codes.scale if codes else None)
    arguments = (x, residual, weight, bias, *written, np.float32(epsilon), np.float32(weight_offset))
    bound = codes.bound if isinstance(codes, QuantizedRows) else np.float32(0)
    num_blocks = len(codes) if isinstance(codes, QuantizedGroups) else num_tokens
    kernel((num_blocks,), (num_threads,), (*arguments, bound, np.int32(num_tokens)))


def norm_takes_groups(hidden_size: int) -> bool:
    """Whether a norm of rows ``[T, D]`` can write `QuantizedGroups`: rows of codes are not padded."""
    return packed_row_bytes(hidden_size, "fp8") == hidden_size


def _block_size(num_vectors: int) -> int:
    """Two vectors a thread: enough loads in flight without a long reduction over many warps."""
    return num_threads_for(ceil_div(num_vectors, 2))
