"""Products of codes: float64 for fp8, bit for bit for int8, whatever the shape of the block."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from phalanx.checkpoints.quantization.numbers import Codes, dequantize
from phalanx.checkpoints.quantization.numbers import quantize_rows as reference_rows
from phalanx.kernels.gemv import GemvShape
from phalanx.kernels.gemv8 import GEMV8_SHAPES, gemv8
from phalanx.kernels.quantize import CodeKind, QuantizedRows
from phalanx.parallel.errors import ExecutorError

from .devices import DTYPES, KernelDevice
from .tolerance import assert_close

BFLOAT16 = DTYPES["bfloat16"]


def put_codes(device: KernelDevice, codes: Codes, kind: CodeKind) -> QuantizedRows:
    return QuantizedRows(device.put(codes.codes.view(np.uint8)), device.put(codes.scale[:, 0].copy()), kind)


def operands(random_normal: Any, num_tokens: int, out: int, columns: int, kind: CodeKind) -> tuple[Codes, Codes]:
    x = random_normal(np.float32, num_tokens, columns) * np.linspace(0.1, 9, num_tokens, dtype=np.float32)[:, None]
    weight = random_normal(np.float32, out, columns) * np.linspace(1, 50, out, dtype=np.float32)[:, None]
    return reference_rows(x, kind), reference_rows(weight, kind)


@pytest.mark.parametrize(
    ("num_tokens", "shape"), [*((3, shape) for shape in GEMV8_SHAPES), *((n, GemvShape(8, 2, 2)) for n in (1, 8, 9, 17, 32)), (32, GemvShape(8, 4, 2))],
    ids=str,
)  # fmt: skip
def test_fp8_products_equal_float64(
    device: KernelDevice, random_normal: Any, num_tokens: int, shape: GemvShape
) -> None:
    x, weight = operands(random_normal, num_tokens, 45, 704, "fp8")
    out = device.poisoned((num_tokens, 45), BFLOAT16)
    gemv8(device.library, put_codes(device, x, "fp8"), put_codes(device, weight, "fp8"), out, shape=shape)
    left, right = (dequantize(codes).astype(np.float64) for codes in (x, weight))
    # The result is bfloat16; products are exact and sums float32.
    limit = 2.0**-9 * (np.linalg.norm(left, axis=1)[:, None] * np.linalg.norm(right, axis=1)).max()
    assert_close(device.get(out), left @ right.T, limit)


@pytest.mark.parametrize("columns", [64, 192, 1024, 1088])
def test_rows_of_whole_rounds_and_others_equal_float64(device: KernelDevice, random_normal: Any, columns: int) -> None:
    x, weight = operands(random_normal, 2, 33, columns, "fp8")
    out = device.poisoned((2, 33), DTYPES["float32"])
    for shape in (GemvShape(4, 1, 4), GemvShape(16, 1, 1, 4096)):
        gemv8(device.library, put_codes(device, x, "fp8"), put_codes(device, weight, "fp8"), out, shape=shape)
        left, right = (dequantize(codes).astype(np.float64) for codes in (x, weight))
        norms = np.linalg.norm(left, axis=1)[:, None] * np.linalg.norm(right, axis=1)
        assert_close(device.get(out), left @ right.T, norms.max())


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 12, 32])
def test_int8_products_are_exact(device: KernelDevice, random_normal: Any, num_tokens: int, has_bias: bool) -> None:
    x, weight = operands(random_normal, num_tokens, 17, 320, "int8")
    bias = random_normal(BFLOAT16, 17)
    out = device.poisoned((num_tokens, 17), BFLOAT16)
    gemv8(
        device.library, put_codes(device, x, "int8"), put_codes(device, weight, "int8"), out,
        bias=device.put(bias) if has_bias else None,
    )  # fmt: skip
    sums = x.codes.astype(np.int32) @ weight.codes.astype(np.int32).T
    expected = (sums.astype(np.float32) * x.scale) * weight.scale.T
    expected = expected + bias.astype(np.float32) if has_bias else expected
    np.testing.assert_array_equal(device.get(out), expected.astype(BFLOAT16))


def test_what_gemv8_does_not_take_is_refused(device: KernelDevice, random_normal: Any) -> None:
    for num_tokens, columns in ((33, 64), (1, 96)):
        x, weight = operands(random_normal, num_tokens, 8, columns, "int8")
        with pytest.raises(ExecutorError, match="gemv8 takes at most 32 tokens"):
            gemv8(
                device.library, put_codes(device, x, "int8"), put_codes(device, weight, "int8"),
                device.poisoned((num_tokens, 8), BFLOAT16),
            )  # fmt: skip
