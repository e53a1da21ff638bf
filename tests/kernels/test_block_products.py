"""Products of fp8 blocks through cuBLASLt, but for the library: operands in the layouts that it documents, and which products it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.checkpoints.quantization.numbers import E4M3, quantize_rows
from phalanx.checkpoints.quantization.numbers import quantize_groups as reference
from phalanx.kernels import gemm as gemm_module
from phalanx.kernels import product_sizes
from phalanx.kernels.block_probe import multiplies_blocks
from phalanx.kernels.cublaslt import GemmProblem
from phalanx.kernels.gemm import Gemm
from phalanx.kernels.packed import PackedWeight
from phalanx.kernels.product_sizes import BLOCK
from phalanx.kernels.quantize import QuantizedRows
from phalanx.kernels.quantize_groups import QuantizedGroups, quantize_groups
from phalanx.kernels.tuning import GemmChoice, GemmTimings
from phalanx.parallel.errors import ExecutorError
from phalanx.runtime.executors.cuda.weights import block_scales
from tests.support.fake_cublaslt import ALGORITHM, FakeCublasLt
from tests.support.fake_cupy import install_fake_cupy

from .block_case import BlockCase
from .devices import DTYPES, EmulatedDevice
from .fp8_sums import simulated_sum
from .test_quantize_groups import empty_groups

BFLOAT16 = DTYPES["bfloat16"]


class AddressedDevice(EmulatedDevice):
    """The emulator with arrays that have addresses, as CuPy's."""

    def __init__(self, cache: Path, cupy: Any) -> None:
        super().__init__(cache)
        self._cupy = cupy

    def put(self, array: np.ndarray) -> Any:
        return self._cupy.asarray(array)

    def poisoned(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self.put(super().poisoned(shape, dtype))


@pytest.fixture
def addressed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AddressedDevice:
    cupy = install_fake_cupy(monkeypatch)
    return AddressedDevice(request.config.cache.mkdir("emulated-kernels"), cupy)


def gemm_of(device: AddressedDevice, lt: FakeCublasLt, timings: GemmTimings | None = None) -> Gemm:
    known = GemmTimings(None) if timings is None else timings
    return Gemm(device.library, lt, known, multiplies_blocks=True)  # type: ignore[arg-type]


def groups_of(device: AddressedDevice, x: np.ndarray) -> QuantizedGroups:
    groups = empty_groups(device, *x.shape)
    quantize_groups(device.library, device.put(x), groups)
    return groups


@pytest.mark.parametrize(
    ("architecture", "version"), [("sm_89", 13_00_00), ("sm_100a", 13_00_00), ("sm_90a", 12_08_04)]
)
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_sums_are_scaled_afterwards_where_cublaslt_has_no_scales_of_rows(
    addressed: AddressedDevice, monkeypatch: pytest.MonkeyPatch, kind: Any, architecture: str, version: int
) -> None:
    """Before 12.9 it has none on Hopper either."""
    num_tokens, rows, columns = 40, 96, 64
    random = np.random.default_rng(2)
    x, weight = (
        quantize_rows(random.standard_normal((count, columns), np.float32), kind) for count in (num_tokens, rows)
    )
    bias = random.standard_normal(rows).astype(np.float32)
    monkeypatch.setattr(addressed.library, "architecture", architecture)
    monkeypatch.setattr(product_sizes, "SUM_BYTES", 4 * num_tokens * 32)
    monkeypatch.setattr(gemm_module, "SUM_BYTES", 4 * num_tokens * 32)  # three slabs
    lt = FakeCublasLt(scales_rows=False)
    lt.version = version
    out = addressed.poisoned((num_tokens, rows), np.float32)
    operands = [
        QuantizedRows(addressed.put(one.codes.view(np.uint8)), addressed.put(one.scale[:, 0].copy()), kind)
        for one in (x, weight)
    ]
    scratch = addressed.put(np.zeros(product_sizes.SUM_BYTES, np.uint8))
    gemm_of(addressed, lt)(*operands, out, addressed.put(bias), scratch=scratch)
    sums = (x.codes.astype(np.float64) @ weight.codes.astype(np.float64).T).astype(np.float32)
    np.testing.assert_array_equal(addressed.get(out), sums * x.scale * weight.scale.T + bias)
    assert [problem.out_features for problem in lt.problems] == [32, 32, 32]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("num_tokens", "rows", "columns"), [(65, 384, 640), (6, 80, 688), (4, 1024, 128)])
def test_products_are_the_sum_over_blocks_of_code_products(
    addressed: AddressedDevice, num_tokens: int, rows: int, columns: int, has_bias: bool
) -> None:
    case = BlockCase(rows, columns)
    x = case.inputs(num_tokens, BFLOAT16)
    groups, weight = groups_of(addressed, x), case.packed(addressed)
    bias = np.random.default_rng(1).standard_normal(rows).astype(np.float32)
    out = addressed.poisoned((len(groups), rows), np.float32)
    lt = FakeCublasLt()
    gemm_of(addressed, lt)(groups, weight, out, addressed.put(bias) if has_bias else None)
    expected = case.product(x).expected + (bias if has_bias else 0)
    np.testing.assert_allclose(
        out[:num_tokens], expected, rtol=1e-6, atol=1e-5 * np.abs(expected).max() if has_bias else 0
    )
    assert np.all(out[num_tokens:] == (bias if has_bias else 0)), "rows that were added"
    assert lt.problems == [GemmProblem(len(groups), rows, groups.shape[1], "fp8", "float32", has_blocks=True)]


def test_a_first_product_shows_whether_scales_count_where_they_should(addressed: AddressedDevice) -> None:
    class Transposed(FakeCublasLt):
        """Reads scales of inputs row by row, as they are not given."""

        def x_scale(self, address: int, num_tokens: int, groups: int) -> Any:
            return super().x_scale(address, groups, num_tokens).T

    assert multiplies_blocks(FakeCublasLt())  # type: ignore[arg-type]
    assert not multiplies_blocks(FakeCublasLt(has_blocks=False))  # type: ignore[arg-type]
    assert not multiplies_blocks(Transposed())  # type: ignore[arg-type]


def test_scales_of_blocks_are_read_from_those_of_rows(addressed: AddressedDevice) -> None:
    case = BlockCase(300, 688)
    of_rows = np.repeat(case.blocks, 128, 0)[:300]
    np.testing.assert_array_equal(block_scales(addressed.put(of_rows), 688), case.packed(addressed).blocks)


def weight_of(device: AddressedDevice, rows: int = 384, columns: int = 640) -> PackedWeight:
    return BlockCase(rows, columns).packed(device)


def test_inputs_are_codes_for_more_tokens_than_kernels_stream_the_weight_for(addressed: AddressedDevice) -> None:
    gemm, weight = gemm_of(addressed, FakeCublasLt()), weight_of(addressed)
    assert not gemm.takes_groups(64, weight, "bfloat16", False)
    assert gemm.takes_groups(65, weight, "bfloat16", False)


def test_inputs_are_values_where_cublaslt_has_no_algorithm_for_blocks(addressed: AddressedDevice) -> None:
    lt = FakeCublasLt(has_blocks=False)
    gemm, weight = gemm_of(addressed, lt), weight_of(addressed)
    assert not gemm.takes_groups(128, weight, "bfloat16", False)
    lt.has_blocks = True
    assert not gemm.takes_groups(128, weight, "bfloat16", False), "it is asked once"
    assert not any(problem.has_blocks for problem in gemm.problems), "nothing that a tuner would try"


def test_inputs_are_values_on_a_device_that_multiplies_no_blocks(addressed: AddressedDevice) -> None:
    gemm = Gemm(addressed.library, FakeCublasLt(), GemmTimings(None))  # type: ignore[arg-type]
    assert not gemm.takes_groups(128, weight_of(addressed), "bfloat16", False)
    assert not gemm.problems


def test_inputs_are_values_where_rows_are_no_multiple_of_what_it_takes(addressed: AddressedDevice) -> None:
    assert not gemm_of(addressed, FakeCublasLt()).takes_groups(128, weight_of(addressed, rows=200), "bfloat16", False)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("of_codes", "of_values"), [(20.0, 30.0), (30.0, 20.0), (20.0, 0.0)])
def test_the_faster_product_is_taken_where_both_were_timed(
    addressed: AddressedDevice, of_codes: float, of_values: float, has_bias: bool
) -> None:
    timings = GemmTimings(None)
    blocks = GemmProblem(132, 384, 640, "fp8", "bfloat16", has_blocks=True)
    values = GemmProblem(130, 384, 640, "bfloat16", "bfloat16", has_bias, "fp8/128")
    for problem, microseconds in ((blocks, of_codes), (values, of_values)):
        if microseconds:
            timings.add({problem: GemmChoice(ALGORITHM, microseconds, microseconds)})
    gemm = gemm_of(addressed, FakeCublasLt(), timings)
    takes = gemm.takes_groups(130, weight_of(addressed), "bfloat16", has_bias)
    assert takes == (of_codes < of_values or not of_values)
    assert set(gemm.problems) == {blocks, values}, "what the tuner times"


@pytest.mark.parametrize(
    ("num_tokens", "takes"),
    [(128, True), (129, False), (320, False), (330, False), (331, True), (600, True), (2048, True)],
)
def test_numbers_of_tokens_that_were_not_timed_go_by_the_next_ones_for_which_both_products_were(
    addressed: AddressedDevice, num_tokens: int, takes: bool
) -> None:
    """As a start with 330 sequences and 1,000 tokens would time them, but for values of 512. Where nothing was timed, codes are taken."""
    timings = GemmTimings(None)
    for size, of_codes, of_values in ((128, 20.0, 30.0), (330, 50.0, 40.0), (512, 90.0, 0.0), (1000, 100.0, 150.0)):
        blocks = GemmProblem(-(-size // 4) * 4, 384, 640, "fp8", "bfloat16", has_blocks=True)
        values = GemmProblem(size, 384, 640, "bfloat16", "bfloat16", packed="fp8/128")
        timings.add({blocks: GemmChoice(ALGORITHM, of_codes, of_codes)})
        if of_values:
            timings.add({values: GemmChoice(ALGORITHM, of_values, of_values)})
    gemm = gemm_of(addressed, FakeCublasLt(), timings)
    assert gemm.takes_groups(num_tokens, weight_of(addressed), "bfloat16", False) == takes


def test_new_timings_count_once_choices_are_refreshed(addressed: AddressedDevice) -> None:
    timings, weight = GemmTimings(None), weight_of(addressed)
    gemm = gemm_of(addressed, FakeCublasLt(), timings)
    assert gemm.takes_groups(128, weight, "bfloat16", False)
    blocks, values = gemm.problems
    timings.add({blocks: GemmChoice(ALGORITHM, 30.0, 30.0), values: GemmChoice(ALGORITHM, 20.0, 20.0)})
    gemm.refresh()
    assert not gemm.takes_groups(128, weight, "bfloat16", False)


def test_codes_that_do_not_fit_the_weight_are_refused(addressed: AddressedDevice) -> None:
    gemm, weight = gemm_of(addressed, FakeCublasLt()), weight_of(addressed)
    groups = groups_of(addressed, np.ones((8, 512), BFLOAT16))
    with pytest.raises(ExecutorError, match="codes of x"):
        gemm(groups, weight, addressed.poisoned((8, 384), BFLOAT16))


def test_the_bound_of_products_on_a_gpu_holds_for_tensor_cores_and_for_no_other_layout_of_scales() -> None:
    """Scales of inputs, or of a square weight, that are read as if they were transposed give other sums."""
    case = BlockCase(512, 512)
    x = case.inputs(4, BFLOAT16)
    product, inputs = case.product(x), reference(x.astype(np.float32), BLOCK)

    def sums(x_scale: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        total = np.zeros((4, 512))
        for block in range(4):
            columns = np.s_[block * BLOCK : (block + 1) * BLOCK]
            codes = (one[:, columns].view(E4M3).astype(np.float64) for one in (inputs.codes, case.codes))
            total += simulated_sum(*codes) * x_scale[:, block, None] * np.repeat(blocks[:, block], BLOCK)
        return total

    def excess(found: np.ndarray) -> np.ndarray:
        return np.asarray(np.abs(found - product.expected) / product.sum_error)

    right = excess(sums(inputs.scale, case.blocks))
    assert right.max() < 1
    assert right.max() > 0.02
    for wrong in (sums(inputs.scale.T, case.blocks), sums(inputs.scale, case.blocks.T)):
        assert np.median(excess(wrong)) > 10
