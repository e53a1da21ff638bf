"""Inputs of fp8 blocks as cuBLASLt takes them: codes and scales of numbers.py bit for bit, in the order and layout that products read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from phalanx.checkpoints.quantization.numbers import E4M3
from phalanx.checkpoints.quantization.numbers import quantize_groups as reference
from phalanx.kernels.activation import gated_activation
from phalanx.kernels.norm import layer_norm, norm_takes_groups, rms_norm
from phalanx.kernels.product_sizes import packed_row_bytes
from phalanx.kernels.quantize_groups import QuantizedGroups, quantize_groups
from phalanx.parallel.errors import ExecutorError

from .devices import DTYPES, KernelDevice
from .test_packed import Case

BFLOAT16 = DTYPES["bfloat16"]


def empty_groups(device: KernelDevice, num_tokens: int, columns: int, powers: bool = False) -> QuantizedGroups:
    rows = -(-num_tokens // 4) * 4
    codes = device.poisoned((rows, packed_row_bytes(columns, "fp8")), np.uint8)
    return QuantizedGroups(codes, device.poisoned((-(-columns // 128), rows), np.float32), powers)


def in_packed_order(codes: np.ndarray) -> np.ndarray:
    """Rows of bytes in the order of packed.cuh: of 64 columns lane m has 8 from 8 m and 8 from 32 + 8 m on; zeros fill the last 64."""
    rows, columns = codes.shape
    padded = np.zeros((rows, -(-columns // 64) * 64), np.uint8)
    padded[:, :columns] = codes.view(np.uint8)
    return np.ascontiguousarray(padded.reshape(rows, -1, 2, 4, 8).swapaxes(2, 3)).reshape(rows, -1)


def assert_groups(device: KernelDevice, found: QuantizedGroups, x: np.ndarray) -> None:
    """The definition's, and rows of zeros after those of x."""
    expected = reference(x.astype(np.float32), 128, powers_of_two=found.powers_of_two)
    codes, scale = device.get(found.codes), device.get(found.scale)
    np.testing.assert_array_equal(scale[:, : len(x)], expected.scale.T)
    np.testing.assert_array_equal(codes[: len(x)], in_packed_order(expected.codes))
    assert not codes[len(x) :].any()
    assert np.isfinite(scale[:, len(x) :]).all()


@pytest.mark.parametrize(
    ("dtype", "num_tokens", "columns", "powers"),
    [("bfloat16", 9, 1376, False), ("bfloat16", 16, 128, True), ("bfloat16", 1, 642, False), ("float16", 5, 688, False),
     ("float32", 3, 97, True)],
)  # fmt: skip
def test_codes_and_scales_are_the_definitions_own(
    device: KernelDevice, random_normal: Any, dtype: str, num_tokens: int, columns: int, powers: bool
) -> None:
    x = random_normal(DTYPES[dtype], num_tokens, columns, scale=3.0)
    x[-1, : columns // 2] = 0  # groups of zeros have the smallest scale
    out = empty_groups(device, num_tokens, columns, powers)
    quantize_groups(device.library, device.put(x), out)
    assert_groups(device, out, x)


def test_scales_that_differ_between_neighbours_stay_apart(device: KernelDevice, random_normal: Any) -> None:
    x = random_normal(np.dtype(np.float32), 11, 640)
    x *= 100.0 ** ((np.arange(11)[:, None] + np.arange(640) // 128) % 3)
    x = x.astype(BFLOAT16)
    out = empty_groups(device, 11, 640)
    quantize_groups(device.library, device.put(x), out)
    assert_groups(device, out, x)


@pytest.mark.parametrize(("features", "name", "powers"), [(688, "silu", False), (97, "relu", True)])
def test_gated_activation_writes_the_groups_of_what_it_would_have_stored(
    device: KernelDevice, random_normal: Any, features: int, name: Any, powers: bool
) -> None:
    x = device.put(random_normal(BFLOAT16, 5, 2 * features, scale=2.0))
    dense, out = device.poisoned((5, features), BFLOAT16), empty_groups(device, 5, features, powers)
    gated_activation(device.library, x, dense, name)
    gated_activation(device.library, x, out, name)
    assert_groups(device, out, device.get(dense))


@pytest.mark.parametrize(
    ("dtype", "hidden_size", "powers"), [("bfloat16", 1600, False), ("float32", 320, True), ("bfloat16", 64, False)]
)
def test_norms_write_the_groups_of_what_they_would_have_stored(
    device: KernelDevice, random_normal: Any, dtype: str, hidden_size: int, powers: bool
) -> None:
    kind = DTYPES[dtype]
    x, residual = random_normal(kind, 6, hidden_size), random_normal(kind, 6, hidden_size)
    weight, bias = (device.put(random_normal(kind, hidden_size)) for _ in range(2))
    dense, out = device.poisoned(x.shape, kind), empty_groups(device, 6, hidden_size, powers)
    carried = [device.put(residual), device.put(residual)]
    for written, own in zip((dense, out), carried, strict=True):
        rms_norm(device.library, device.put(x), weight, written, epsilon=1e-5, weight_offset=1.0, residual=own)
    np.testing.assert_array_equal(device.get(carried[0]), device.get(carried[1]))
    assert_groups(device, out, device.get(dense))
    for written in (dense, out):
        layer_norm(device.library, device.put(x), weight, bias, written, epsilon=1e-5)
    assert_groups(device, out, device.get(dense))


def test_norms_of_rows_whose_codes_are_padded_are_quantised_apart() -> None:
    assert [size for size in (64, 688, 704, 4096, 5120) if norm_takes_groups(size)] == [64, 704, 4096, 5120]


def test_a_packed_weight_has_its_columns_in_the_same_order(device: KernelDevice) -> None:
    case = Case(7, 688, "fp8", 128, False)
    np.testing.assert_array_equal(device.get(case.packed(device).codes), in_packed_order(case.codes))


def test_a_group_that_is_not_finite_does_not_become_finite(device: KernelDevice) -> None:
    x = np.ones((4, 256), BFLOAT16)
    x[2, 130] = np.nan
    out = empty_groups(device, 4, 256)
    quantize_groups(device.library, device.put(x), out)
    scale, codes = device.get(out.scale), device.get(out.codes).view(E4M3).astype(np.float32)
    assert np.isnan(scale[1, 2])
    assert np.isfinite(np.delete(scale.ravel(), 6)).all()
    assert np.isfinite(codes[2, :128]).all()


def test_codes_without_room_for_the_rows_that_are_added_are_refused(device: KernelDevice) -> None:
    x = np.ones((5, 128), BFLOAT16)
    with pytest.raises(ExecutorError, match="codes of 5 tokens need 8 rows"):
        quantize_groups(device.library, device.put(x), empty_groups(device, 4, 128))
