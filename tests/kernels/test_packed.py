"""Packed weights: the layout and the way back bit for bit, products against float64, whatever codes, groups and block shapes."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from phalanx.checkpoints.quantization import held
from phalanx.checkpoints.quantization.numbers import E4M3
from phalanx.kernels.activation import gated_activation
from phalanx.kernels.gemv import CODES_SHAPE, GemvShape, fits_block, fitted
from phalanx.kernels.gemv8 import GEMV8_SHAPES
from phalanx.kernels.packed import (
    GEMV_PACKED_SHAPES,
    MAX_PACKED_TOKENS,
    SMALLEST_GROUP,
    PackedKind,
    PackedWeight,
    gemv_packed,
    pack_weight,
    unpack_weight,
)
from phalanx.kernels.product_sizes import BLOCK, CODE_ALIGNMENT, packed_row_bytes
from phalanx.parallel.errors import ExecutorError

from .devices import DTYPES, KernelDevice
from .tolerance import assert_close

BFLOAT16, FLOAT16 = DTYPES["bfloat16"], DTYPES["float16"]


class Case:
    """Random codes in canonical form, and the values that they stand for in float64."""

    def __init__(self, rows: int, columns: int, kind: PackedKind, group: int, has_zero: bool) -> None:
        random = np.random.default_rng(rows + columns + group)
        self.kind, self.group = kind, group
        low, high = {"int4": (-8, 8), "int8": (-128, 128), "fp8": (0, 256)}[kind]
        codes = random.integers(low, high, (rows, columns))
        if kind == "fp8":
            codes[codes & 0x7F == 0x7F] = 0  # NaN
        self.codes = codes.astype(np.uint8 if kind == "fp8" else np.int8)
        groups = -(-columns // group) if group else 1
        self.scale = random.uniform(0.5, 2, (rows, groups)).astype(np.float32)
        self.zero = random.integers(low, high, (rows, groups)).astype(np.int8) if has_zero else None
        wide = [np.repeat(one, group or columns, 1)[:, :columns] for one in (self.scale, self.zero) if one is not None]
        plain = self.codes.view(E4M3) if kind == "fp8" else self.codes
        self.values = (plain.astype(np.float64) - (wide[1] if has_zero else 0)) * wide[0]

    def packed(self, device: KernelDevice) -> PackedWeight:
        rows, columns = self.codes.shape
        out = device.poisoned((rows, packed_row_bytes(columns, self.kind)), np.uint8)
        pack_weight(device.library, device.put(self.codes), out, self.kind)
        zero = None if self.zero is None else device.put(np.ascontiguousarray(self.zero.T))
        return PackedWeight(out, device.put(np.ascontiguousarray(self.scale.T)), zero, self.kind, columns, self.group)


KINDS = [("int4", 128, False), ("int4", 32, True), ("int4", 64, True), ("int4", 0, True), ("int8", 0, False),
         ("int8", 128, True), ("int8", 32, True), ("fp8", 0, False), ("fp8", 128, False)]  # fmt: skip


EACH_TYPE = [*((*kind, BFLOAT16) for kind in KINDS), *((*kind, FLOAT16) for kind in KINDS[::2])]


@pytest.mark.parametrize(
    ("kind", "group", "has_zero", "dtype"),
    [*((*kind, BFLOAT16) for kind in KINDS[1:6]), ("int4", 48, True, FLOAT16), ("fp8", 8, False, DTYPES["float32"])], ids=str,
)  # fmt: skip
def test_unpacked_values_are_the_formats_own(
    device: KernelDevice, kind: PackedKind, group: int, has_zero: bool, dtype: np.dtype[Any]
) -> None:
    case = Case(5, 344, kind, group, has_zero)
    out = device.poisoned((5, 344), dtype)
    unpack_weight(device.library, case.packed(device), out)
    np.testing.assert_array_equal(device.get(out), case.values.astype(np.float32).astype(dtype))


def test_rows_of_any_length_are_unpacked(device: KernelDevice) -> None:
    for columns in (1, 31, 172, 257):
        case = Case(3, columns, "int4", 32, True)
        out = device.poisoned((3, columns), BFLOAT16)
        unpack_weight(device.library, case.packed(device), out)
        np.testing.assert_array_equal(device.get(out), case.values.astype(np.float32).astype(BFLOAT16))


@pytest.mark.parametrize(("kind", "group", "has_zero", "dtype"), EACH_TYPE, ids=str)
def test_products_of_every_code_and_group_equal_float64(
    device: KernelDevice, random_normal: Any, kind: PackedKind, group: int, has_zero: bool, dtype: np.dtype[Any]
) -> None:
    check(device, random_normal(dtype, 3, 344), Case(21, 344, kind, group, has_zero))


@pytest.mark.parametrize(
    ("num_tokens", "shape"),
    [*((1, shape) for shape in GEMV_PACKED_SHAPES[::6]), *((n, GemvShape(4, 2, 2)) for n in (8, 9, 64))], ids=str,
)  # fmt: skip
def test_products_of_every_block_shape_equal_float64(
    device: KernelDevice, random_normal: Any, num_tokens: int, shape: GemvShape
) -> None:
    check(device, random_normal(BFLOAT16, num_tokens, 2064), Case(37, 2064, "int4", 128, True), shape=shape)


@pytest.mark.parametrize("group", [0, 64])
def test_the_bias_is_added_once(device: KernelDevice, random_normal: Any, group: int) -> None:
    check(device, random_normal(BFLOAT16, 2, 688), Case(9, 688, "int4", group, False), bias=random_normal(BFLOAT16, 9))


def check(
    device: KernelDevice, x: np.ndarray, case: Case, bias: np.ndarray | None = None, shape: GemvShape | None = None
) -> None:
    out = device.poisoned((len(x), len(case.values)), x.dtype)
    gemv_packed(
        device.library, device.put(x), case.packed(device), out, shape=shape,
        bias=None if bias is None else device.put(bias),
    )  # fmt: skip
    expected = x.astype(np.float64) @ case.values.T + (0 if bias is None else bias.astype(np.float64))
    magnitude = float((np.abs(x.astype(np.float64)) @ np.abs(case.values).T).max())
    assert_close(device.get(out), expected, magnitude)


@pytest.mark.parametrize(
    ("name", "num_tokens", "shape"),
    [("silu", 3, GemvShape(4, 2, 2)), ("gelu_tanh", 3, GemvShape(4, 4, 2)), ("silu", 64, CODES_SHAPE)], ids=str,
)  # fmt: skip
def test_gated_products_round_both_halves_first(
    device: KernelDevice, random_normal: Any, name: Any, num_tokens: int, shape: GemvShape
) -> None:
    case, x = Case(2 * 19, 256, "int4", 128, False), random_normal(BFLOAT16, num_tokens, 256, scale=0.05)
    weight, halves = case.packed(device), device.poisoned((num_tokens, 38), BFLOAT16)
    gemv_packed(device.library, device.put(x), weight, halves, shape=fitted(shape, num_tokens, 2))
    expected, out = device.poisoned((num_tokens, 19), BFLOAT16), device.poisoned((num_tokens, 19), BFLOAT16)
    gated_activation(device.library, halves, expected, name)
    gemv_packed(device.library, device.put(x), weight, out, gated=name, shape=shape)
    np.testing.assert_array_equal(device.get(out), device.get(expected))


def test_sums_of_any_number_of_tokens_fit_a_block_of_every_shape() -> None:
    for shape in (CODES_SHAPE, *GEMV_PACKED_SHAPES, *GEMV8_SHAPES):
        for num_tokens, fewest in product(range(1, MAX_PACKED_TOKENS + 1), (1, 2)):
            chosen = fitted(shape, num_tokens, fewest)
            assert fits_block(chosen, num_tokens)
            assert chosen.num_warps >= 4
            assert chosen.row_blocks >= fewest


def test_what_gemv_packed_does_not_take_is_refused(device: KernelDevice, random_normal: Any) -> None:
    for num_tokens, columns, group in ((65, 64, 32), (1, 60, 32), (1, 96, 48)):
        case, x = Case(4, columns, "int4", group, False), random_normal(BFLOAT16, num_tokens, columns)
        with pytest.raises(ExecutorError, match="gemv_packed takes at most 64 tokens"):
            gemv_packed(device.library, device.put(x), case.packed(device), device.poisoned((num_tokens, 4), BFLOAT16))


def test_formats_and_kernels_mean_the_same_sizes() -> None:
    """`checkpoints` and `kernels` import nothing of each other."""
    assert (held.BLOCK, held.EXPERT_COLUMNS, held.CODE_ALIGNMENT) == (BLOCK, SMALLEST_GROUP, CODE_ALIGNMENT)
