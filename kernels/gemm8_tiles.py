# SPDX-License-Identifier: Apache-2.0
"""Products of 8-bit codes for many tokens on Hopper, with what follows. Enqueues on the current stream; does not wait."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from phalanx.kernels.activation_names import ActivationName
from phalanx.kernels.arrays import Array, ceil_div, scalar_name
from phalanx.kernels.library import Library
from phalanx.kernels.product_sizes import CODE_ALIGNMENT
from phalanx.kernels.quantize import QUANTIZED_DEFINES, QuantizedRows, require_product_of_codes
from phalanx.kernels.tensor_map import tensor_map
from phalanx.parallel.errors import ExecutorError

__all__ = ["TILE_SHAPES", "TileShape", "gemm8_tiles", "gemm8_tiles_takes", "tiles_fill_device"]

_ARCHITECTURE = "sm_90a"
_CLUSTER = 2
_TOKENS = 256  # of a cluster
_WEIGHT_ROWS = 256
_COPIED_ROWS, _STORED_ROWS = 128, 64
_SHARED_BYTES = 232448
_THREADS = 384
_OUT_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class TileShape:
    """In which order the tiles of a product run.

    Attributes:
        band: how many clusters' tokens meet the same weight rows one after the other.
    """

    band: int = 8


TILE_SHAPES = tuple(TileShape(band) for band in (4, 8, 16))
"""What the tuner tries."""


def gemm8_tiles_takes(architecture: str, out_columns: int, in_features: int) -> bool:
    """Whether the kernel computes such products at all; ``out_columns`` are those of its result."""
    return architecture == _ARCHITECTURE and in_features % CODE_ALIGNMENT == 0 and out_columns % _OUT_ALIGNMENT == 0


def tiles_fill_device(library: Library, num_tokens: int, out_features: int) -> bool:
    """Whether a product has tiles for at least half of the device's clusters."""
    return 2 * _num_tiles(num_tokens, out_features) >= library.num_multiprocessors // _CLUSTER


def _num_tiles(num_tokens: int, out_features: int) -> int:
    return ceil_div(num_tokens, _TOKENS) * ceil_div(out_features, _WEIGHT_ROWS)


def gemm8_tiles(
    library: Library,
    x: QuantizedRows,
    weight: QuantizedRows,
    out: Array,
    *,
    bias: Array | None = None,
    gated: ActivationName | None = None,
    shape: TileShape | None = None,
) -> None:
    """``out = (x.codes @ weight.codes.T) * x.scale * weight.scale + bias``. x [T, I]; weight [O, I]; bias [O]; out [T, O] of 16 bits.

    With ``gated``, for weight = [gate; up] and without a bias: out [T, O / 2] = f(gate product) * up product, both rounded first.
    Both operands are fp8 or both int8; I is a multiple of 16 and the columns of out of 8.
    """
    (num_tokens, in_features), out_features = x.shape, weight.shape[0]
    out_columns = out_features // 2 if gated else out_features
    takes = gemm8_tiles_takes(library.architecture, out_columns, in_features)
    if not takes or x.kind != weight.kind or out.dtype.itemsize != 2 or (gated and bias is not None):
        raise ExecutorError(
            f"gemm8_tiles takes codes of one kind on {_ARCHITECTURE}, in_features in multiples of {CODE_ALIGNMENT}, columns of a 16-bit out of "
            f"{_OUT_ALIGNMENT} and a bias or a gate; this is {x.kind}[{num_tokens}, {in_features}] by {weight.kind}, {out_columns} columns of "
            f"{out.dtype.name}, on {library.architecture}"
        )
    require_product_of_codes(x, weight, out, bias, out_columns)
    kernel = library.function(
        "gemm8_tiles",
        "gemm8_tiles",
        _SHARED_BYTES,
        SCALAR=scalar_name(out),
        QUANTIZED=QUANTIZED_DEFINES[x.kind],
        GATED=int(gated is not None),
        ACTIVATION=gated or "relu",
        HAS_BIAS=int(bias is not None),
        CLUSTER=_CLUSTER,
        SHARED_BYTES=_SHARED_BYTES,
    )
    clusters = min(_num_tiles(num_tokens, out_features), library.num_multiprocessors // _CLUSTER)
    maps = (tensor_map(x.codes, _COPIED_ROWS), tensor_map(weight.codes, _COPIED_ROWS), tensor_map(out, _STORED_ROWS))
    sizes = tuple(np.int32(size) for size in (num_tokens, out_columns, in_features, (shape or TileShape()).band))
    kernel((clusters * _CLUSTER,), (_THREADS,), (*maps, x.scale, weight.scale, bias, *sizes), _SHARED_BYTES)
