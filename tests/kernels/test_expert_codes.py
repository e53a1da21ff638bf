"""Grouped products of experts that are held as codes, against float64: every kind of codes and groups, in each of the three kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from phalanx.kernels.experts import Routing, grouped_product
from phalanx.kernels.packed import PackedKind
from phalanx.parallel.errors import ExecutorError

from .devices import DTYPES, KernelDevice
from .test_experts import assert_mixture, expected_mixture, mixture, routed
from .test_packed import Case

BFLOAT16, FLOAT16, FLOAT32 = DTYPES["bfloat16"], DTYPES["float16"], DTYPES["float32"]
Format = tuple[PackedKind, int, bool]
FEW, MANY, MOST = 20, 60, 150
"""Tokens whose rows are streamed, more and less than 8 an expert, and cut into tiles of 64 and of 128 rows, by the routings below."""


def codes(rows: int, columns: int, scheme: Format) -> Case:
    """Random codes of values with a deviation of about ``columns ** -0.5``."""
    case = Case(rows, columns, *scheme)
    factor = 2.0 ** np.round(np.log2(columns**-0.5 / case.values.std()))
    case.scale *= np.float32(factor)
    case.values *= factor
    return case


def layer(features: int, inner: int, num_experts: int, scheme: Format) -> tuple[Case, Case]:
    """Gates with ups and downs of the experts."""
    return codes(num_experts * 2 * inner, features, scheme), codes(num_experts * features, inner, scheme)


def check(
    device: KernelDevice, random_normal: Any, dtype: np.dtype[Any], tokens: int, features: int, inner: int, routing: Routing, scheme: Format
) -> None:  # fmt: skip
    gate_up, down = layer(features, inner, len(routing.experts), scheme)
    x, router = random_normal(dtype, tokens, features), random_normal(dtype, routing.num_experts, features)
    result = mixture(device, x, router, gate_up.packed(device), down.packed(device), routing)
    assert_mixture(result, expected_mixture(x, router, gate_up.values, down.values, routing), dtype)


SCHEMES: list[tuple[Format, np.dtype[Any]]] = [
    (("fp8", 0, False), BFLOAT16), (("fp8", 128, False), FLOAT16), (("int8", 0, False), BFLOAT16), (("int8", 32, True), FLOAT16),
    (("int4", 128, True), BFLOAT16), (("int4", 32, False), BFLOAT16), (("int4", 0, True), FLOAT16),
]  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "num_experts", "top_k", "scheme", "dtype"),
    [*((FEW, 5, 2, *one) for one in SCHEMES), *((MANY, 3, 1, *one) for one in SCHEMES[::2]), *((MOST, 2, 1, *one) for one in SCHEMES[1::2])],
    ids=str,
)  # fmt: skip
def test_mixtures_of_every_code_and_group_equal_float64(
    device: KernelDevice, random_normal: Any, tokens: int, num_experts: int, top_k: int, scheme: Format, dtype: np.dtype[Any]
) -> None:  # fmt: skip
    """264 and 88 columns: no whole chunks, 8.25 and 2.75 groups of 32."""
    check(device, random_normal, dtype, tokens, 264, 88, Routing(num_experts, top_k, True, range(num_experts)), scheme)


@pytest.mark.parametrize(
    ("scheme", "dtype", "features", "inner"),
    [(("int8", 8, True), FLOAT32, 40, 24), (("int4", 32, True), FLOAT32, 264, 88), (("int4", 32, True), BFLOAT16, 300, 44)],
    ids=str,
)  # fmt: skip
def test_mixtures_without_tensor_cores_equal_float64(
    device: KernelDevice, random_normal: Any, scheme: Format, dtype: np.dtype[Any], features: int, inner: int
) -> None:
    """float32, and rows that are no multiples of 16 bytes."""
    check(device, random_normal, dtype, 7, features, inner, Routing(5, 2, True, range(5)), scheme)


def test_a_rank_multiplies_by_the_experts_that_it_owns(device: KernelDevice, random_normal: Any) -> None:
    check(device, random_normal, BFLOAT16, FEW, 72, 40, Routing(5, 1, True, range(2, 5)), ("int4", 32, True))


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_a_tokens_result_does_not_depend_on_the_others(device: KernelDevice, random_normal: Any, tokens: int) -> None:
    routing = Routing(3, 1, True, range(3))
    gate_up, down = (one.packed(device) for one in layer(136, 40, 3, ("int4", 32, True)))
    x, router = random_normal(BFLOAT16, tokens, 136), random_normal(BFLOAT16, 3, 136)
    alone = mixture(device, x, router, gate_up, down, routing)
    order = np.random.default_rng(1).permutation(tokens)
    np.testing.assert_array_equal(mixture(device, x[order], router, gate_up, down, routing), alone[order])


def test_groups_that_tensor_cores_do_not_take_are_refused(device: KernelDevice, random_normal: Any) -> None:
    routing, (gate_up, _) = Routing(2, 1, True, range(2)), layer(96, 8, 2, ("int4", 48, False))
    x, router = random_normal(BFLOAT16, 3, 96), random_normal(BFLOAT16, 2, 96)
    weight, rows, out = gate_up.packed(device), routed(device, x, router, routing), device.poisoned((3, 8), BFLOAT16)
    arguments: dict[str, Any] = {"gathers": True, "activation": "silu"}
    with pytest.raises(ExecutorError, match="groups of 48 columns of experts are not multiples of 32"):
        grouped_product(device.library, device.put(x), weight, out, routing, rows, **arguments)
    with pytest.raises(ExecutorError, match="a packed weight has 95 columns; this call needs 96"):
        grouped_product(device.library, device.put(x), replace(weight, columns=95), out, routing, rows, **arguments)
