"""int8 products of the NumPy engine and of the CUDA kernels: equal bit for bit, whatever the batch and the cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from phalanx.checkpoints.quantization.numbers import quantize_rows
from phalanx.checkpoints.quantization.row_codes import INT8_ROWS, RowCodes
from phalanx.kernels.gemv8 import gemv8
from phalanx.kernels.scale_sums import scale_sums
from phalanx.runtime.executors.numpy.product import product
from phalanx.runtime.executors.numpy.threads import Threads

from .devices import KernelDevice
from .test_gemv8 import put_codes

THREADS = Threads(1)
COLUMNS = 2112
"""More than two exact sums' worth."""


def engine_product(x: Any, components: Any, chosen: RowCodes = INT8_ROWS) -> Any:
    return chosen.product(x, chosen.operand(components), lambda left, right: product(left, right, THREADS))


@pytest.fixture
def operands(random_normal: Any) -> tuple[Any, Any]:
    x = random_normal(np.float32, 40, COLUMNS) * np.linspace(0.1, 9, 40, dtype=np.float32)[:, None]
    x[5], x[6] = 0, 3  # a row of zeros, and the largest sum that codes can have
    weight = random_normal(np.float32, 48, COLUMNS)
    weight[7] = -2
    return x, weight


@pytest.mark.parametrize("num_tokens", [1, 7, 32])
def test_the_small_batch_kernel_equals_the_numpy_engine(
    device: KernelDevice, operands: tuple[Any, Any], num_tokens: int
) -> None:
    x, components = operands[0][:num_tokens], INT8_ROWS.quantize(operands[1])
    out = device.poisoned((num_tokens, 48), np.dtype(np.float32))
    codes = put_codes(device, quantize_rows(x, "int8"), "int8")
    gemv8(device.library, codes, put_codes(device, quantize_rows(operands[1], "int8"), "int8"), out)
    assert device.get(out).tobytes() == engine_product(x, components).tobytes()


def test_scaled_sums_of_large_batches_equal_the_numpy_engine(device: KernelDevice, operands: tuple[Any, Any]) -> None:
    inputs, weight = (quantize_rows(one, "int8") for one in operands)
    sums = inputs.codes.astype(np.int64) @ weight.codes.astype(np.int64).T
    out = device.poisoned((40, 48), np.dtype(np.float32))
    scales = (device.put(one.scale[:, 0].copy()) for one in (inputs, weight))
    scale_sums(device.library, device.put(sums.astype(np.int32)), *scales, None, out, 0)
    assert device.get(out).tobytes() == engine_product(operands[0], INT8_ROWS.quantize(operands[1])).tobytes()


def test_rows_and_outputs_do_not_depend_on_what_is_computed_with_them(operands: tuple[Any, Any]) -> None:
    x, weight = operands
    whole = engine_product(x, INT8_ROWS.quantize(weight))
    for tokens in (slice(0, 1), slice(3, 20), slice(39, 40)):
        assert engine_product(x[tokens], INT8_ROWS.quantize(weight)).tobytes() == whole[tokens].tobytes()
    for tp_size in (2, 4):
        shares = [engine_product(x, INT8_ROWS.quantize(share)) for share in np.split(weight, tp_size)]
        assert np.concatenate(shares, axis=1).tobytes() == whole.tobytes()


def test_a_static_scale_of_inputs_is_the_largest_of_the_parts(operands: tuple[Any, Any]) -> None:
    x, weight = operands
    components = {**INT8_ROWS.quantize(weight), "input_scale": np.array([0.01, 0.07], np.float32)}
    codes = np.clip(np.rint(x * (np.float32(1) / np.float32(0.07))), -128, 127).astype(np.int64)
    sums = (codes @ components["codes"].astype(np.int64).T).astype(np.float32)
    expected = (sums * np.float32(0.07)) * components["scale"]
    found = engine_product(x, components, RowCodes("int8", input="static"))
    assert found.tobytes() == expected.tobytes()
