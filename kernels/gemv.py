# SPDX-License-Identifier: Apache-2.0
"""Matrix products of at most 16 tokens by the weight-streaming kernel. Enqueues on the current stream; does not wait."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from phalanx.kernels.activation_names import ActivationName
from phalanx.kernels.arrays import Array, ceil_div, require, scalar_name
from phalanx.kernels.library import KernelFunction, Library
from phalanx.parallel.errors import ExecutorError

__all__ = [
    "CODES_SHAPE",
    "GEMV_SHAPES",
    "MAX_GEMV_TOKENS",
    "TOKENS_PER_CODES_TILE",
    "GemvShape",
    "fits_block",
    "fitted",
    "gated_gemv",
    "gemv",
    "gemv_takes",
]

MAX_GEMV_TOKENS = 16
_CHUNK = 32
_ROWS_PER_TILE = 8
TOKENS_PER_CODES_TILE = 8
"""Tokens of one tile of the kernels that stream codes (`gemv8`, `gemv_packed`), which has 16 outputs."""
_MOST_SUMS = 96
"""Accumulator tiles of a block's warps, 512 bytes each, that fit its shared memory."""


@dataclass(frozen=True, slots=True)
class GemvShape:
    """How a block is cut: warps that share the k range, tiles of 8 outputs, chunks of 32 k in flight a warp.

    In the kernels that stream codes tiles have 16 outputs, and chunks more k: 64 of `gemv8`, `codes_per_chunk` of `gemv_packed`.
    ``prefetch_bytes`` of each weight row are brought into the second-level cache while the previous kernel ends.
    """

    num_warps: int = 16
    row_blocks: int = 1
    unroll: int = 2
    prefetch_bytes: int = 0


GEMV_SHAPES = tuple(
    GemvShape(num_warps, row_blocks, unroll, prefetch_bytes)
    for num_warps, row_blocks, unroll in ((8, 1, 4), (8, 2, 2), (16, 1, 2), (16, 1, 4))
    for prefetch_bytes in (0, 4096)
)
"""What the tuner tries."""


CODES_SHAPE = GemvShape(num_warps=8, row_blocks=1, unroll=4)
"""Of the kernels that stream codes, where none was measured."""


def fits_block(shape: GemvShape, num_tokens: int) -> bool:
    """Whether the sums of so many tokens fit a block's shared memory, in the kernels that stream codes."""
    return shape.num_warps * shape.row_blocks * ceil_div(num_tokens, TOKENS_PER_CODES_TILE) <= _MOST_SUMS


def fitted(shape: GemvShape, num_tokens: int, fewest_row_blocks: int = 1) -> GemvShape:
    """``shape`` with so many row blocks at least; where its sums do not fit a block with no more than these, and then with fewer warps."""
    fitting = replace(shape, row_blocks=max(shape.row_blocks, fewest_row_blocks))
    if not fits_block(fitting, num_tokens):
        fitting = replace(shape, row_blocks=fewest_row_blocks)
    while not fits_block(fitting, num_tokens):
        fitting = replace(fitting, num_warps=fitting.num_warps // 2)
    return fitting


def gemv_takes(num_tokens: int, in_features: int, dtype: str) -> bool:
    """Whether the kernel computes such a product at all."""
    return num_tokens <= MAX_GEMV_TOKENS and in_features % _CHUNK == 0 and dtype in ("float16", "bfloat16")


def gemv(
    library: Library,
    x: Array,
    weight: Array,
    out: Array,
    *,
    bias: Array | None = None,
    shape: GemvShape | None = None,
) -> None:
    """``out = x @ weight.T + bias``. x [T, I]; weight [O, I]; bias [O]; out [T, O].

    T at most ``MAX_GEMV_TOKENS``, I a multiple of 32, float16 or bfloat16.
    """
    num_tokens, out_features = out.shape
    _check(x, out, num_tokens, out_features)
    require("weight", weight, (out_features, x.shape[1]), x)
    if bias is not None:
        require("bias", bias, (out_features,), x)
    shape = shape or GemvShape()
    kernel = _kernel(library, x, shape, has_bias=bias is not None)
    _launch(kernel, shape, shape.row_blocks * _ROWS_PER_TILE, (x, weight, bias, out))


def gated_gemv(
    library: Library, x: Array, weight: Array, out: Array, activation: ActivationName, *, shape: GemvShape | None = None
) -> None:
    """``out = f(x @ gate.T) * (x @ up.T)`` for weight = [gate; up]. x [T, I]; weight [2F, I]; out [T, F].

    The two products are rounded to storage first, as if they had been written and read back. Limits as in ``gemv``.
    """
    num_tokens, out_features = out.shape
    _check(x, out, num_tokens, out_features)
    require("weight", weight, (2 * out_features, x.shape[1]), x)
    chosen = shape or GemvShape()
    shape = replace(chosen, row_blocks=2)
    kernel = _kernel(library, x, shape, activation=activation)
    _launch(kernel, shape, _ROWS_PER_TILE, (x, weight, None, out))


def _check(x: Array, out: Array, num_tokens: int, out_features: int) -> None:
    in_features = x.shape[1]
    require("x", x, (num_tokens, in_features), x)
    require("out", out, (num_tokens, out_features), x)
    if not gemv_takes(num_tokens, in_features, x.dtype.name):
        raise ExecutorError(
            f"gemv takes at most {MAX_GEMV_TOKENS} tokens, in_features in multiples of {_CHUNK}, float16 or bfloat16; "
            f"this is {x.dtype.name}[{num_tokens}, {in_features}]"
        )


def _kernel(
    library: Library,
    x: Array,
    shape: GemvShape,
    activation: ActivationName | None = None,
    has_bias: bool = False,
) -> KernelFunction:
    return library.function(
        "gemv",
        "gemv",
        SCALAR=scalar_name(x),
        NUM_WARPS=shape.num_warps,
        ROW_BLOCKS=shape.row_blocks,
        UNROLL=shape.unroll,
        PREFETCH_BYTES=shape.prefetch_bytes,
        MANY=int(x.shape[0] > 8),
        GATED=int(activation is not None),
        ACTIVATION=activation or "silu",
        HAS_BIAS=int(has_bias),
    )


def _launch(
    kernel: KernelFunction, shape: GemvShape, rows_per_block: int, arrays: tuple[Array, Array, Array | None, Array]
) -> None:
    (num_tokens, in_features), out_features = arrays[0].shape, arrays[3].shape[1]
    sizes = (np.int32(num_tokens), np.int32(out_features), np.int32(in_features))
    kernel((ceil_div(out_features, rows_per_block),), (shape.num_warps * 32,), (*arrays, *sizes))
