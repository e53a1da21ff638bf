"""Tiles of codes on Hopper: the epilogues against kernels that follow each other, bit for bit, and sums against float64.

What the tuner may choose is compared in test_fp8.py and test_quantized_products.py, too.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from phalanx.checkpoints.quantization.numbers import quantize_rows
from phalanx.kernels.activation import gated_activation
from phalanx.kernels.gemm8_tiles import TILE_SHAPES, TileShape, gemm8_tiles
from phalanx.kernels.quantize import CodeKind, QuantizedRows
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
    made = quantize_rows(values, kind)
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


def test_more_tiles_than_blocks_and_every_order_of_them_give_the_same(device: CudaDevice) -> None:
    x, weight = (codes(device, rows, 256, "int8", seed)[1] for rows, seed in ((5000, 5), (4104, 6)))
    outs = []
    for band in (1, 3, 8, 64):
        out = device.poisoned((5000, 4104), BFLOAT16)
        gemm8_tiles(device.library, x, weight, out, shape=TileShape(band))
        outs.append(device.get(out))
    for out in outs[1:]:
        np.testing.assert_array_equal(out, outs[0])


def test_products_one_after_the_other_do_not_disturb_each_other(device: CudaDevice) -> None:
    """Each may start while the one before it drains."""
    x, first, second = (codes(device, rows, 512, "int8", seed)[1] for rows, seed in ((700, 7), (1024, 8), (512, 9)))
    hidden, out = device.poisoned((700, 1024), BFLOAT16), device.poisoned((700, 512), BFLOAT16)
    results = []
    for _ in range(20):
        gemm8_tiles(device.library, x, first, hidden)
        gemm8_tiles(device.library, x, second, out)
        results.append((device.get(hidden), device.get(out)))
    for pair in results[1:]:
        for got, expected in zip(pair, results[0], strict=True):
            np.testing.assert_array_equal(got, expected)
