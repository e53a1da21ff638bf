"""The definitions of quantised numbers, against literal values and against exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.checkpoints.quantization.numbers import (
    E4M3,
    Codes,
    dequantize,
    quantize_groups,
    quantize_rows,
    quantize_static,
    to_codes,
)

ONE = np.float32(1)


def e4m3_values() -> dict[int, Fraction]:
    """Code to value by the format's own definition: bias 7, subnormals in steps of 2^-9, 0x7f and 0xff NaN."""
    values = {}
    for code in range(256):
        sign, exponent, mantissa = -1 if code >> 7 else 1, code >> 3 & 15, code & 7
        if code & 0x7F != 0x7F:
            magnitude = (
                Fraction(8 + mantissa, 8) * Fraction(2) ** (exponent - 7) if exponent else Fraction(mantissa, 512)
            )
            values[code] = sign * magnitude
    return values


@pytest.mark.parametrize(
    ("value", "code"),
    [(0.0, 0x00), (2.0**-9, 0x01), (2.0**-10, 0x00), (3 * 2.0**-10, 0x02), (2.0**-6, 0x08), (1.0, 0x38), (-1.5, 0xBC),
     (1.0625, 0x38), (1.1875, 0x3A), (448.0, 0x7E), (463.0, 0x7E), (1e30, 0x7E), (-np.inf, 0xFE), (np.nan, 0x7F)],
)  # fmt: skip
def test_e4m3_rounds_to_nearest_even_and_saturates(value: float, code: int) -> None:
    assert to_codes(np.array([value], np.float32), ONE, "fp8").view(np.uint8)[0] == code


@given(st.floats(-500, 500, width=32))
def test_e4m3_is_the_nearest_code(value: float) -> None:
    codes = e4m3_values()
    chosen = int(to_codes(np.array([value], np.float32), ONE, "fp8").view(np.uint8)[0])
    exact = Fraction(max(-448.0, min(448.0, value)))
    nearest = min(abs(exact - other) for other in codes.values())
    assert abs(exact - codes[chosen]) == nearest
    ties = [code for code, other in codes.items() if abs(exact - other) == nearest and other]
    assert len({code & 0x7F for code in ties}) < 2 or chosen % 2 == 0


@pytest.mark.parametrize(
    ("largest", "scale"),
    [(448.0, 1.0), (448.0001, 2.0), (300.0, 1.0), (0.0, 2.0**-17), (2.0**100, 2.0**92), (np.inf, np.inf), (np.nan, np.nan)],
)  # fmt: skip
def test_scales_by_powers_of_two_are_rounded_up(largest: float, scale: float) -> None:
    """``2 ** ceil(log2(amax / 448))``, and the power above the smallest scale where all is zero."""
    codes = quantize_groups(np.array([[1.0, largest]], np.float32)[:, 1:], 0, powers_of_two=True)
    np.testing.assert_array_equal(codes.scale, np.float32(scale).reshape(1, 1))


def test_rows_scale_their_largest_magnitude_to_the_largest_code() -> None:
    x = np.array([[1.0, -3.5, 0.25], [0.0, 0.0, 0.0]], np.float32)
    fp8, int8 = quantize_rows(x), quantize_rows(x, "int8")
    np.testing.assert_array_equal(fp8.scale[:, 0], np.float32([3.5 / 448, 1 / (448 * 512)]))
    assert fp8.codes.view(np.uint8).tolist() == [[0x70, 0xFE, 0x60], [0, 0, 0]]
    np.testing.assert_array_equal(int8.scale[:, 0], [np.float32(3.5) / np.float32(127), 2.0**-40])
    assert int8.codes.tolist() == [[36, -127, 9], [0, 0, 0]]


def test_a_ceiling_bounds_the_scale_and_saturates_beyond() -> None:
    codes = quantize_rows(np.array([[1200.0, 2400.0]], np.float32), ceiling=1200.0)
    assert dequantize(codes).tolist() == [[1200.0, 1200.0]]


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("columns", [344, 688, 128])
def test_groups_may_end_short(group: int, columns: int) -> None:
    x = np.random.default_rng(1).standard_normal((3, columns)).astype(np.float32)
    codes = quantize_groups(x, group)
    assert codes.scale.shape == (3, -(-columns // group))
    values = dequantize(codes, group)
    for first in range(0, columns, group):
        alone = quantize_rows(x[:, first : first + group])
        np.testing.assert_array_equal(values[:, first : first + group], dequantize(alone))


def test_static_scales_saturate() -> None:
    codes = quantize_static(np.array([[100.0, 1.0, -9.0]], np.float32), 0.01)
    assert dequantize(codes)[0] == pytest.approx([4.48, 0.96, -4.48])


def test_a_row_with_a_nan_stays_one() -> None:
    codes = quantize_rows(np.array([[1.0, np.nan], [1.0, 2.0]], np.float32))
    assert np.isnan(dequantize(codes)[0]).all()
    assert dequantize(codes)[1].tolist() == [1.0, 2.0]


def test_codes_hold_what_they_are_given() -> None:
    codes = Codes(np.array([[0x38]], np.uint8).view(E4M3), np.array([[2.0]], np.float32))
    assert dequantize(codes).tolist() == [[2.0]]
