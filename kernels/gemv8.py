# SPDX-License-Identifier: Apache-2.0
"""Products of 8-bit codes for at most 32 tokens, streaming the weight. Enqueues on the current stream; does not wait."""

from __future__ import annotations

import numpy as np

from phalanx.kernels.arrays import Array, ceil_div, scalar_name
from phalanx.kernels.gemv import CODES_SHAPE, TOKENS_PER_CODES_TILE, GemvShape, fitted
from phalanx.kernels.library import Library
from phalanx.kernels.quantize import QUANTIZED_DEFINES, QuantizedRows, require_product_of_codes
from phalanx.parallel.errors import ExecutorError

__all__ = ["GEMV8_SHAPES", "MAX_GEMV8_TOKENS", "gemv8", "gemv8_takes"]

MAX_GEMV8_TOKENS = 32
_CHUNK = 64
_ROWS_PER_TILE = 16

GEMV8_SHAPES = tuple(
    GemvShape(num_warps, row_blocks, unroll, prefetch_bytes)
    for num_warps, row_blocks, unroll in ((4, 1, 4), (8, 1, 2), (8, 1, 4), (8, 2, 2), (16, 1, 2))
    for prefetch_bytes in (0, 4096)
)
"""What the tuner tries, as far as a block's sums fit (`fits_block`)."""


def gemv8_takes(num_tokens: int, in_features: int) -> bool:
    """Whether the kernel computes such a product at all."""
    return num_tokens <= MAX_GEMV8_TOKENS and in_features % _CHUNK == 0


def gemv8(
    library: Library,
    x: QuantizedRows,
    weight: QuantizedRows,
    out: Array,
    *,
    bias: Array | None = None,
    shape: GemvShape | None = None,
) -> None:
    """``out = (x.codes @ weight.codes.T) * x.scale * weight.scale + bias``. x [T, I]; weight [O, I]; bias [O]; out [T, O].

    T at most ``MAX_GEMV8_TOKENS``, I a multiple of 64, both operands fp8 or both int8.
    """
    (num_tokens, in_features), out_features = x.shape, weight.shape[0]
    if not gemv8_takes(num_tokens, in_features) or x.kind != weight.kind:
        raise ExecutorError(
            f"gemv8 takes at most {MAX_GEMV8_TOKENS} tokens, in_features in multiples of {_CHUNK} and codes of one kind; "
            f"this is {x.kind}[{num_tokens}, {in_features}] by {weight.kind}"
        )
    require_product_of_codes(x, weight, out, bias, out_features)
    shape = fitted(shape or CODES_SHAPE, num_tokens)
    kernel = library.function(
        "gemv8",
        "gemv8",
        SCALAR=scalar_name(out),
        NUM_WARPS=shape.num_warps,
        ROW_BLOCKS=shape.row_blocks,
        UNROLL=shape.unroll,
        TOKEN_TILES=ceil_div(num_tokens, TOKENS_PER_CODES_TILE),
        WHOLE_ROUNDS=int(in_features % (shape.num_warps * shape.unroll * _CHUNK) == 0),
        HAS_BIAS=int(bias is not None),
        QUANTIZED=QUANTIZED_DEFINES[x.kind],
    )
    sizes = (np.int32(num_tokens), np.int32(out_features), np.int32(in_features), np.int32(shape.prefetch_bytes))
    arguments = (x.codes, x.scale, weight.codes, weight.scale, bias, out, *sizes)
    kernel((ceil_div(out_features, shape.row_blocks * _ROWS_PER_TILE),), (shape.num_warps * 32,), arguments)
