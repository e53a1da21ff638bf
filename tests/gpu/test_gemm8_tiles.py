"""Tiles of codes on Hopper: the epilogues against kernels that follow each other, bit for bit, and sums against float64.

What the tuner may choose is compared in test_fp8.py and test_quantized_products.py, too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from phalanx.checkpoints.quantization.numbers import quantize_rows as codes_of
from phalanx.kernels.activation import gated_activation
from phalanx.kernels.gemm8_tiles import TILE_SHAPES, TileShape, gemm8_tiles
from phalanx.kernels.quantize import CodeKind, QuantizedRows, quantize_rows
from tests.gpu.test_fp8 import put_codes
from tests.kernels.devices import CudaDevice, has_gpu
from tests.kernels.fp8_sums import sum_bound

cupy = pytest.importorskip("cupy")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_gpu(), reason="needs an NVIDIA GPU")]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHAPES = [(33, 16, 16), (128, 256, 128), (257, 528, 688), (300, 2064, 4096), (1000, 1040, 144)]


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    device = CudaDevice()
    if device.library.architecture != "sm_90a":
        pytest.skip("needs a GPU of the Hopper generation")
    return device


def codes(device: CudaDevice, rows: int, columns: int, kind: CodeKind, seed: int) -> tuple[Any, QuantizedRows]:
    steps = np.linspace(1, 9, rows, dtype=np.float32)[:, None]  # a scale of its own for each row shows mix-ups
    values = steps * np.random.default_rng(seed).standard_normal((rows, columns), np.float32)
    made = codes_of(values, kind)
    return made, put_codes(device, made, kind)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp8_sums_equal_float64(device: CudaDevice, shape: tuple[int, int, int]) -> None:
    num_tokens, out_features, in_features = shape
    (x, x_rows), (weight, weight_rows) = (
        codes(device, rows, in_features, "fp8", seed) for rows, seed in ((num_tokens, 1), (out_features, 2))
    )
    left, right = x.codes.astype(np.float64), weight.codes.astype(np.float64)
    scales = x.scale.astype(np.float64) * weight.scale.T
    expected = (left @ right.T) * scales
    limit = 1.02 * 2.0**-8 * np.abs(expected) + 1.01 * sum_bound(left, right) * scales
    for tiles in TILE_SHAPES:
        out = device.poisoned((num_tokens, out_features), BFLOAT16)
        gemm8_tiles(device.library, x_rows, weight_rows, out, shape=tiles)
        assert np.all(np.abs(device.get(out).astype(np.float64) - expected) <= limit)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("silu", BFLOAT16), ("gelu_tanh", BFLOAT16), ("gelu_erf", BFLOAT16), ("silu", np.dtype(np.float16))],
    ids=str,
)
@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gated_activation_is_that_of_the_rounded_product(
    device: CudaDevice, shape: tuple[int, int, int], kind: CodeKind, name: Any, dtype: np.dtype[Any]
) -> None:
    num_tokens, out_features, in_features = shape
    x, weight = (codes(device, rows, in_features, kind, seed)[1] for rows, seed in ((num_tokens, 3), (out_features, 4)))
    both = device.poisoned((num_tokens, out_features), dtype)
    expected, out = (device.poisoned((num_tokens, out_features // 2), dtype) for _ in range(2))
    gemm8_tiles(device.library, x, weight, both)
    gated_activation(device.library, both, expected, name)
    gemm8_tiles(device.library, x, weight, out, gated=name)
    np.testing.assert_array_equal(device.get(out).view(np.uint16), device.get(expected).view(np.uint16))


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_epilogues_of_several_tiles_a_block_follow_each_other(device: CudaDevice, kind: CodeKind) -> None:
    """Staging, scales and the ring go on from tile to tile; products with a tile or two a block tell what is right."""
    x, weight = (codes(device, rows, 384, kind, seed)[1] for rows, seed in ((2000, 10), (8208, 11)))
    bias = device.put(np.random.default_rng(12).standard_normal(8208).astype(BFLOAT16))
    both, plain = (device.poisoned((2000, 8208), BFLOAT16) for _ in range(2))
    gated, expected = (device.poisoned((2000, 4104), BFLOAT16) for _ in range(2))
    gemm8_tiles(device.library, x, weight, both, bias=bias)
    gemm8_tiles(device.library, x, weight, gated, gated="silu")
    gemm8_tiles(device.library, x, weight, plain)
    gated_activation(device.library, plain, expected, "silu")
    np.testing.assert_array_equal(device.get(gated), device.get(expected))
    for first in range(0, 2000, 250):
        part = QuantizedRows(x.codes[first : first + 250], x.scale[first : first + 250], kind)
        out = device.poisoned((250, 8208), BFLOAT16)
        gemm8_tiles(device.library, part, weight, out, bias=bias)
        np.testing.assert_array_equal(device.get(both)[first : first + 250], device.get(out))


def test_more_tiles_than_blocks_and_every_order_of_them_give_the_same(device: CudaDevice) -> None:
    x, weight = (codes(device, rows, 256, "int8", seed)[1] for rows, seed in ((5000, 5), (4104, 6)))
    outs = []
    for band in (1, 3, 8, 64):
        out = device.poisoned((5000, 4104), BFLOAT16)
        gemm8_tiles(device.library, x, weight, out, shape=TileShape(band))
        outs.append(device.get(out))
    for out in outs[1:]:
        np.testing.assert_array_equal(out, outs[0])


def test_kernels_that_start_early_read_what_the_one_before_them_writes(device: CudaDevice) -> None:
    (_, x), (_, first), (_, second) = (
        codes(device, rows, columns, "int8", seed)
        for rows, columns, seed in ((700, 512, 7), (1024, 512, 8), (512, 1024, 9))
    )
    hidden, out = device.poisoned((700, 1024), BFLOAT16), device.poisoned((700, 512), BFLOAT16)
    between, again = (
        QuantizedRows(cupy.empty((700, columns), np.uint8), cupy.empty(700, np.float32), "int8")
        for columns in (1024, 512)
    )

    def chain(waits: bool) -> np.ndarray:
        rows = x
        for _ in range(3):
            for product in (
                partial(gemm8_tiles, device.library, rows, first, hidden),
                partial(quantize_rows, device.library, hidden, between),
                partial(gemm8_tiles, device.library, between, second, out),
                partial(quantize_rows, device.library, out, again),
            ):
                product()
                if waits:
                    cupy.cuda.runtime.deviceSynchronize()
            rows = again
        return device.get(out)

    expected = chain(waits=True)
    assert np.isfinite(expected.astype(np.float32)).all()
    for _ in range(10):
        np.testing.assert_array_equal(chain(waits=False), expected)
