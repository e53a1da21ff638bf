"""Inputs of packed weights on the device: what checkpoints/quantization/numbers.py says, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from phalanx.checkpoints.quantization.numbers import E4M3, dequantize, quantize_groups, quantize_rows, quantize_static
from phalanx.kernels.packed import gemv_packed, unpack_weight
from phalanx.kernels.quantize import CodeRule
from phalanx.kernels.round_inputs import InputRule, round_inputs

from .devices import DTYPES, KernelDevice
from .test_packed import Case


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("columns", "group"), [(256, 128), (688, 128), (240, 16), (1000, 0)])
@pytest.mark.parametrize(("has_factors", "powers"), [(False, False), (True, False), (True, True)])
def test_inputs_are_multiplied_and_rounded_in_groups(
    device: KernelDevice,
    random_normal: Any,
    dtype: np.dtype[Any],
    columns: int,
    group: int,
    has_factors: bool,
    powers: bool,
) -> None:
    x = random_normal(dtype, 3, columns, scale=3.0)
    x[1, : columns // 2] = 0  # groups of zeros have the smallest scale
    factors = np.random.default_rng(1).uniform(0.2, 5.0, columns).astype(np.float32)
    out = device.poisoned(x.shape, dtype)
    given = device.put(factors) if has_factors else None
    rule = InputRule(CodeRule("fp8"), group, powers) if group else None
    round_inputs(device.library, device.put(x), out, rule, given)
    scaled = (x.astype(np.float32) * factors).astype(dtype) if has_factors else x
    expected = scaled.astype(np.float32)
    if group:
        expected = dequantize(quantize_groups(expected, group, powers_of_two=powers), group)
    np.testing.assert_array_equal(device.get(out), expected.astype(dtype))


RULES: dict[str, tuple[CodeRule, Any]] = {
    "fp8 by row": (CodeRule("fp8"), quantize_rows),
    "fp8 by row up to a bound": (CodeRule("fp8", 2.0), lambda x: quantize_rows(x, "fp8", 2.0)),
    "fp8 static": (CodeRule("fp8", 0.011, is_static=True), lambda x: quantize_static(x, 0.011)),
    "int8 by row": (CodeRule("int8"), lambda x: quantize_rows(x, "int8")),
    "int8 static": (CodeRule("int8", 0.03, is_static=True), lambda x: quantize_static(x, 0.03, "int8")),
}


@pytest.mark.parametrize("dtype", [DTYPES["bfloat16"], DTYPES["float32"]], ids=str)
@pytest.mark.parametrize("columns", [80, 2063])
@pytest.mark.parametrize("name", RULES)
def test_inputs_of_experts_are_what_codes_of_whole_rows_stand_for(
    device: KernelDevice, random_normal: Any, dtype: np.dtype[Any], columns: int, name: str
) -> None:
    rule, quantize = RULES[name]
    x = random_normal(dtype, 3, columns, scale=2.0)
    x[1] = 0
    out = device.poisoned(x.shape, dtype)
    round_inputs(device.library, device.put(x), out, InputRule(rule))
    expected = dequantize(quantize(x.astype(np.float32))).astype(dtype)
    np.testing.assert_array_equal(device.get(out), expected)


def test_a_group_that_is_not_finite_does_not_become_finite(device: KernelDevice) -> None:
    x = np.ones((2, 64), np.float32)
    x[1, 5] = np.nan
    out = device.poisoned(x.shape, np.dtype(np.float32))
    round_inputs(device.library, device.put(x), out, InputRule(CodeRule("fp8"), 32))
    found = device.get(out)
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1, :32]).all()
    assert np.isfinite(found[1, 32:]).all()


@pytest.mark.parametrize("dtype", [DTYPES["bfloat16"], DTYPES["float16"]], ids=str)
def test_products_of_fp8_blocks_are_near_the_sum_over_blocks_of_code_products(
    device: KernelDevice, random_normal: Any, dtype: np.dtype[Any]
) -> None:
    """``sum over blocks of (sum q_x q_w) s_x s_w`` in float64; here ``q_x s_x`` is rounded once, and for many tokens ``q_w s_w``, too."""
    case, x = Case(24, 688, "fp8", 128, False), random_normal(dtype, 5, 688, scale=2.0)
    wide = x.astype(np.float64)
    exact = np.zeros((5, 24))
    size = np.zeros((5, 24))
    for block in range(6):
        part, columns = wide[:, 128 * block : 128 * (block + 1)], np.s_[128 * block : 128 * (block + 1)]
        step = np.abs(part).max(1, keepdims=True) / 448
        codes = (part / step).astype(np.float32).astype(E4M3).astype(np.float64)
        weight = case.codes[:, columns].view(E4M3).astype(np.float64)
        exact += (codes @ weight.T) * step * case.scale[:, block]
        size += (codes**2 @ (weight**2).T) * (step * case.scale[:, block]) ** 2
    rounding = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype.name]
    bound = rounding * np.abs(exact) + 4 * rounding * np.sqrt(size)
    given, rounded, out = device.put(x), device.poisoned(x.shape, dtype), device.poisoned((5, 24), dtype)
    round_inputs(device.library, given, rounded, InputRule(CodeRule("fp8"), 128))
    gemv_packed(device.library, rounded, case.packed(device), out)
    assert (np.abs(device.get(out).astype(np.float64) - exact) <= bound).all()
    values = device.poisoned((24, 688), dtype)
    unpack_weight(device.library, case.packed(device), values)
    unpacked = device.get(rounded).astype(np.float64) @ device.get(values).astype(np.float64).T
    assert (np.abs(unpacked - exact) <= bound).all()
    plain = wide @ case.values.T
    assert np.abs(plain - exact).max() > bound.max(), "codes of inputs matter more than that"
