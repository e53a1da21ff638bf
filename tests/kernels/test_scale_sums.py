"""Products of codes on cuBLASLt: sums of slabs of outputs, then the scales, bit for bit as numbers.py defines them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from phalanx.kernels.gemm import sum_slabs
from phalanx.kernels.product_sizes import SUM_BYTES
from phalanx.kernels.scale_sums import scale_sums

from .devices import DTYPES, KernelDevice

BFLOAT16 = DTYPES["bfloat16"]


@pytest.mark.parametrize(
    ("dtype", "rows", "has_bias", "sum_dtype"),
    [
        ("bfloat16", 48, False, np.int32),
        ("float16", 18, True, np.int32),
        ("float32", 7, True, np.int32),
        ("bfloat16", 6, True, np.float32),
    ],
)
def test_scaled_sums_are_the_definitions_own(
    device: KernelDevice, random_normal: Any, dtype: str, rows: int, has_bias: bool, sum_dtype: Any
) -> None:
    random = np.random.default_rng(5)
    sums = random.integers(-(1 << 30), 1 << 30, (3, 2 * rows)).astype(sum_dtype)
    x_scale, weight_scale = (random.uniform(1e-12, 1e-8, count).astype(np.float32) for count in (3, 2 * rows))
    bias = random_normal(DTYPES[dtype], 2 * rows)
    out = device.poisoned((3, 2 * rows), DTYPES[dtype])
    for first in (0, rows):
        scale_sums(
            device.library, device.put(np.ascontiguousarray(sums[:, first : first + rows])), device.put(x_scale),
            device.put(weight_scale), device.put(bias) if has_bias else None, out, first,
        )  # fmt: skip
    expected = (sums.astype(np.float32) * x_scale[:, None]) * weight_scale
    expected = expected + bias.astype(np.float32) if has_bias else expected
    np.testing.assert_array_equal(device.get(out), expected.astype(DTYPES[dtype]))


def test_sums_of_more_tokens_than_other_extents_of_a_grid_have_blocks_are_scaled(device: KernelDevice) -> None:
    sums = np.arange(65_537, dtype=np.int32)[:, None]
    ones, out = np.ones(65_537, np.float32), device.poisoned(sums.shape, DTYPES["float32"])
    scale_sums(device.library, device.put(sums), device.put(ones), device.put(ones[:1]), None, out, 0)
    np.testing.assert_array_equal(device.get(out), sums.astype(np.float32))


@pytest.mark.parametrize("num_tokens", [1, 33, 1024, 2048, 16384])
@pytest.mark.parametrize("out_features", [16, 688, 6144, 28672, 32768])
def test_slabs_cover_the_outputs_and_their_sums_fit(num_tokens: int, out_features: int) -> None:
    slabs = sum_slabs(num_tokens, out_features)
    assert [output for slab in slabs for output in slab] == list(range(out_features))
    assert all(len(slab) % 16 == 0 for slab in slabs)
    assert 4 * num_tokens * len(slabs[0]) <= SUM_BYTES
    assert len({len(slab) for slab in slabs[:-1]}) <= 1
