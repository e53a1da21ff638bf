"""8-bit codes on the device: those of checkpoints/quantization/numbers.py, bit for bit, fused or not."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from phalanx.checkpoints.quantization.numbers import E4M3, quantize_static
from phalanx.checkpoints.quantization.numbers import quantize_rows as reference_rows
from phalanx.kernels.activation import gated_activation
from phalanx.kernels.norm import layer_norm, rms_norm
from phalanx.kernels.quantize import CodeKind, CodeRule, QuantizedRows, quantize_rows, row_threads
from phalanx.parallel.errors import ExecutorError

from .devices import DTYPES, KernelDevice

BFLOAT16 = DTYPES["bfloat16"]


def empty_rows(device: KernelDevice, num_rows: int, columns: int, kind: CodeKind) -> QuantizedRows:
    return QuantizedRows(device.poisoned((num_rows, columns), np.uint8), device.poisoned((num_rows,), np.float32), kind)


def assert_same_codes(device: KernelDevice, rows: QuantizedRows, values: np.ndarray) -> None:
    expected = reference_rows(values.astype(np.float32), rows.kind)
    np.testing.assert_array_equal(device.get(rows.scale), expected.scale[:, 0])
    np.testing.assert_array_equal(device.get(rows.codes), expected.codes.view(np.uint8))


def every_magnitude(dtype: Any) -> np.ndarray:
    """Rows over the whole range of ``dtype``, ties of e4m3 and of integers among them."""
    ties = np.arange(-260, 260).astype(np.float32) / 2
    codes = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
    halves = np.float32(0.5) * (np.sort(codes[np.isfinite(codes)])[1:] + np.sort(codes[np.isfinite(codes)])[:-1])
    small = np.float32(2.0) ** -np.arange(520, dtype=np.float32) % 40
    row = [np.resize(np.append(np.float32(448), part), 520) for part in (codes[np.isfinite(codes)], halves)]
    return np.stack([ties, small, *row, np.zeros(520, np.float32)]).astype(dtype)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_codes_of_ties_and_extremes(device: KernelDevice, dtype: np.dtype[Any], kind: CodeKind) -> None:
    x = every_magnitude(dtype)
    rows = empty_rows(device, *x.shape, kind)
    quantize_rows(device.library, device.put(x), rows)
    assert_same_codes(device, rows, x)


@pytest.mark.parametrize("columns", [344, 688, 1023, 4096])
def test_codes_of_random_rows(device: KernelDevice, random_normal: Any, columns: int) -> None:
    x = random_normal(BFLOAT16, 5, columns, scale=3.0)
    rows = empty_rows(device, 5, columns, "fp8")
    quantize_rows(device.library, device.put(x), rows)
    assert_same_codes(device, rows, x)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_does_not_become_finite(device: KernelDevice, bad: float) -> None:
    x = np.ones((2, 64), BFLOAT16)
    x[1, 5] = bad
    rows = empty_rows(device, 2, 64, "fp8")
    quantize_rows(device.library, device.put(x), rows)
    scale, codes = device.get(rows.scale), device.get(rows.codes).view(E4M3).astype(np.float32)
    assert np.isfinite(scale[0] * codes[0]).all()
    with np.errstate(invalid="ignore"):
        assert not np.isfinite(scale[1] * codes[1, 5])


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_rms_norm_writes_the_codes_of_what_it_would_have_stored(
    device: KernelDevice, random_normal: Any, kind: CodeKind
) -> None:
    x, residual = random_normal(BFLOAT16, 3, 1600), random_normal(BFLOAT16, 3, 1600)
    weight = device.put(random_normal(BFLOAT16, 1600))
    dense, rows = device.poisoned(x.shape, BFLOAT16), empty_rows(device, *x.shape, kind)
    carried = [device.put(residual), device.put(residual)]
    for out, own in zip((dense, rows), carried, strict=True):
        rms_norm(device.library, device.put(x), weight, out, epsilon=1e-5, weight_offset=1.0, residual=own)
    np.testing.assert_array_equal(device.get(carried[0]), device.get(carried[1]))
    assert_same_codes(device, rows, device.get(dense))


def test_layer_norm_writes_the_codes_of_what_it_would_have_stored(device: KernelDevice, random_normal: Any) -> None:
    x = random_normal(BFLOAT16, 2, 344)
    weight, bias = device.put(random_normal(BFLOAT16, 344)), device.put(random_normal(BFLOAT16, 344))
    dense, rows = device.poisoned(x.shape, BFLOAT16), empty_rows(device, *x.shape, "fp8")
    for out in (dense, rows):
        layer_norm(device.library, device.put(x), weight, bias, out, epsilon=1e-5)
    assert_same_codes(device, rows, device.get(dense))


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize(("features", "name"), [(688, "silu"), (4096, "gelu_tanh"), (33, "relu")])
def test_gated_activation_writes_the_codes_of_what_it_would_have_stored(
    device: KernelDevice, random_normal: Any, features: int, name: Any, kind: CodeKind
) -> None:
    x = device.put(random_normal(BFLOAT16, 3, 2 * features, scale=2.0))
    dense, rows = device.poisoned((3, features), BFLOAT16), empty_rows(device, 3, features, kind)
    for out in (dense, rows):
        gated_activation(device.library, x, out, name)
    assert_same_codes(device, rows, device.get(dense))


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("columns", [1, 2, 6, 4100])
def test_codes_of_rows_that_narrow_loads_read(
    device: KernelDevice, random_normal: Any, columns: int, dtype: np.dtype[Any], kind: CodeKind
) -> None:
    x = random_normal(dtype, 2, columns, scale=3.0)
    rows = empty_rows(device, 2, columns, kind)
    quantize_rows(device.library, device.put(x), rows)
    assert_same_codes(device, rows, x)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("features", [1, 2, 1030])
def test_gated_codes_of_rows_that_narrow_loads_read(
    device: KernelDevice, random_normal: Any, features: int, dtype: np.dtype[Any]
) -> None:
    x = device.put(random_normal(dtype, 3, 2 * features, scale=2.0))
    dense, rows = device.poisoned((3, features), dtype), empty_rows(device, 3, features, "fp8")
    for out in (dense, rows):
        gated_activation(device.library, x, out, "silu")
    assert_same_codes(device, rows, device.get(dense))


@pytest.mark.parametrize("columns", [1023, 4096, 9000])
def test_a_row_has_the_same_codes_among_few_rows_and_among_many(
    device: KernelDevice, random_normal: Any, columns: int
) -> None:
    many = 2 * device.library.num_multiprocessors + 1
    x = random_normal(BFLOAT16, many, 2 * columns, scale=3.0)
    assert row_threads(device.library, 2, 512) > row_threads(device.library, many, 512)

    def codes_of(num_rows: int) -> list[np.ndarray]:
        rows, gated = (empty_rows(device, num_rows, columns, "fp8") for _ in range(2))
        quantize_rows(device.library, device.put(np.ascontiguousarray(x[:num_rows, :columns])), rows)
        gated_activation(device.library, device.put(x[:num_rows]), gated, "silu")
        return [device.get(array)[:2] for out in (rows, gated) for array in (out.scale, out.codes)]

    for few, among_many in zip(codes_of(2), codes_of(many), strict=True):
        np.testing.assert_array_equal(few, among_many)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.nan])
def test_gated_rows_that_are_not_finite_have_scales_that_are_not(
    device: KernelDevice, dtype: np.dtype[Any], bad: float
) -> None:
    x = np.ones((2, 128), dtype)
    x[1, 9] = bad
    rows = empty_rows(device, 2, 64, "fp8")
    gated_activation(device.library, device.put(x), rows, "silu")
    scale = device.get(rows.scale)
    assert np.isfinite(scale[0])
    np.testing.assert_array_equal(scale[1], np.float32(abs(bad)))


RULES = [CodeRule("fp8", 0.005, is_static=True), CodeRule("fp8", 1.5), CodeRule("int8", 1.5)]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_static_scales_and_bounds_give_the_reference_codes_fused_or_not(
    device: KernelDevice, random_normal: Any, rule: CodeRule
) -> None:
    x, gated = random_normal(BFLOAT16, 3, 688), random_normal(BFLOAT16, 3, 1376, scale=2.0)
    weight = device.put(random_normal(BFLOAT16, 688))
    runs: list[Any] = [
        lambda out: quantize_rows(device.library, device.put(x), out) if isinstance(out, QuantizedRows) else None,
        lambda out: rms_norm(device.library, device.put(x), weight, out, epsilon=1e-5),
        lambda out: gated_activation(device.library, device.put(gated), out, "silu"),
    ]
    for run in runs:
        dense, rows = device.put(x), empty_rows(device, 3, 688, rule.kind)
        rows = QuantizedRows(rows.codes, rows.scale, rule.kind, rule)
        run(dense)
        run(rows)
        values = device.get(dense).astype(np.float32)
        assert (np.abs(values) > (448 * rule.bound if rule.is_static else rule.bound)).any(), "some saturate"
        expected = (
            quantize_static(values, rule.bound) if rule.is_static else reference_rows(values, rule.kind, rule.bound)
        )
        np.testing.assert_array_equal(device.get(rows.scale), expected.scale[:, 0])
        np.testing.assert_array_equal(device.get(rows.codes), expected.codes.view(np.uint8))


def test_rows_that_do_not_fit_registers_are_refused(device: KernelDevice) -> None:
    x = np.broadcast_to(np.zeros(1, ml_dtypes.bfloat16), (1, 65537))
    with pytest.raises(ExecutorError, match="65537 columns"):
        quantize_rows(device.library, x, QuantizedRows(x, x, "fp8"))
