"""Products of fp8 blocks on a GPU: every algorithm of cuBLASLt's that the tuner may choose, against the definition in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from phalanx.kernels.block_probe import multiplies_blocks as shows_blocks
from phalanx.kernels.cublaslt import CublasLt, GemmProblem
from phalanx.kernels.gemm import WORKSPACE_BYTES, Gemm
from phalanx.kernels.gemm_operands import Operands, problem_of
from phalanx.kernels.gemm_tuner import GemmTuner
from phalanx.kernels.library import KernelLibrary
from phalanx.kernels.product_sizes import packed_row_bytes, padded_tokens
from phalanx.kernels.quantize_groups import QuantizedGroups, quantize_groups
from phalanx.kernels.tuning import GemmChoice, GemmTimings
from phalanx.runtime.executors.cuda.weights import block_scales
from tests.kernels.block_case import BlockCase
from tests.kernels.devices import CudaDevice, has_gpu
from tests.quantization import test_block_products as model

cupy = pytest.importorskip("cupy")
pytest.importorskip("nvmath")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_gpu(), reason="needs an NVIDIA GPU")]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
WHOLE = [(65, 256, 512), (128, 1024, 640), (1000, 384, 4096), (2048, 512, 2048), (70, 6144, 1024), (257, 128, 14336)]
CUT = [(130, 1008, 640), (130, 256, 688), (66, 80, 192)]
"""Rows or columns that are no whole blocks, of which cuBLASLt may take none."""


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    return CudaDevice()


@pytest.fixture(scope="module")
def gemm() -> Iterator[Gemm]:
    cublaslt = CublasLt(cupy.empty(WORKSPACE_BYTES, np.uint8))
    gemm = Gemm(KernelLibrary(), cublaslt, GemmTimings(None), shows_blocks(cublaslt))
    yield gemm
    cupy.cuda.runtime.deviceSynchronize()
    gemm.close()


def put_groups(device: CudaDevice, x: np.ndarray) -> QuantizedGroups:
    num_tokens, columns = x.shape
    rows = padded_tokens(num_tokens)
    codes = device.poisoned((rows, packed_row_bytes(columns, "fp8")), np.uint8)
    groups = QuantizedGroups(codes, device.poisoned((-(-columns // 128), rows), np.float32))
    quantize_groups(device.library, device.put(x), groups)
    return groups


def multiplies_blocks(gemm: Gemm) -> bool:
    """Whether this device and library are what cuBLASLt documents: Hopper, 12.9."""
    return int(cupy.cuda.Device().compute_capability) == 90 and gemm.cublaslt.version >= 120900


def test_the_first_product_shows_whether_there_are_others(gemm: Gemm) -> None:
    assert shows_blocks(gemm.cublaslt) == multiplies_blocks(gemm)


def assert_near(
    gemm: Gemm,
    device: CudaDevice,
    case: BlockCase,
    num_tokens: int,
    dtype: np.dtype[Any],
    algorithms: list[Any] | None = None,
) -> int:
    """Products by ``algorithms`` that cuBLASLt accepts for so many tokens, by default all that it offers, against the definition; their number."""
    x, weight = case.inputs(num_tokens, BFLOAT16), case.packed(device)
    product, groups = case.product(x), put_groups(device, x)
    rounding = 1.02 * 2.0**-8 if dtype == BFLOAT16 else 2.0**-23
    limit = rounding * np.abs(product.expected) + product.sum_error
    operands = Operands(groups, weight, device.poisoned((len(groups), len(weight)), dtype))
    problem = problem_of(operands)
    accepted = [one for one in algorithms or () if gemm.cublaslt.accepts(problem, one)]
    candidates = gemm.candidates(problem) if algorithms is None else accepted
    for candidate in candidates:
        operands.out.view(np.uint8).fill(0xFF)
        gemm.run(problem, GemmChoice(candidate), operands)
        found = device.get(operands.out)
        error = np.abs(found[:num_tokens].astype(np.float64) - product.expected)
        assert np.all(error <= limit), (candidate, float((error / limit).max()))
        assert not found[num_tokens:].any(), "rows that were added"
    return len(candidates)


@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize("shape", [*WHOLE, *CUT], ids=str)
def test_every_candidate_is_near_the_definition(
    gemm: Gemm, device: CudaDevice, shape: tuple[int, int, int], dtype: np.dtype[Any]
) -> None:
    """To the rounding of the result and what tensor cores lose in 128 columns, with scales a hundredfold apart."""
    num_tokens, out_features, in_features = shape
    case = BlockCase(out_features, in_features)
    if not gemm.takes_groups(num_tokens, case.packed(device), dtype.name, False):
        assert shape in CUT or not multiplies_blocks(gemm)
        pytest.skip(f"cuBLASLt {gemm.cublaslt.version} has no algorithm")
    assert assert_near(gemm, device, case, num_tokens, dtype)


def test_algorithms_of_more_tokens_compute_fewer_where_they_are_accepted(gemm: Gemm, device: CudaDevice) -> None:
    """As `Gemm.choice` borrows those that were timed for numbers of tokens that were not."""
    if not multiplies_blocks(gemm):
        pytest.skip("cuBLASLt multiplies blocks on Hopper, from 12.9 on")
    case = BlockCase(1024, 640)
    for timed, sizes in ((128, (65, 72, 104, 124)), (256, (132, 200))):
        algorithms = gemm.candidates(GemmProblem(timed, 1024, 640, "fp8", "bfloat16", has_blocks=True))
        print(timed, {size: assert_near(gemm, device, case, size, BFLOAT16, algorithms) for size in sizes})


def test_a_bias_is_added_once(gemm: Gemm, device: CudaDevice) -> None:
    if not multiplies_blocks(gemm):
        pytest.skip("cuBLASLt multiplies blocks on Hopper, from 12.9 on")
    case = BlockCase(384, 512)
    x, bias = case.inputs(68, BFLOAT16), np.random.default_rng(1).standard_normal(384).astype(BFLOAT16)
    out = device.poisoned((68, 384), BFLOAT16)
    gemm(put_groups(device, x), case.packed(device), out, device.put(bias))
    product, added = case.product(x), bias.astype(np.float64)
    error = np.abs(device.get(out).astype(np.float64) - (product.expected + added))
    limit = 1.02 * 2.0**-8 * (2 * np.abs(product.expected) + np.abs(added)) + product.sum_error
    assert np.all(error <= limit), float((error / limit).max())


def test_scales_of_blocks_are_read_from_those_of_rows(device: CudaDevice) -> None:
    case = BlockCase(300, 688)
    of_rows = device.put(np.repeat(case.blocks, 128, 0)[:300])
    expected = device.get(case.packed(device).blocks)
    np.testing.assert_array_equal(device.get(block_scales(of_rows, 688)), expected)


def test_the_tuner_times_them_against_products_of_values(gemm: Gemm, device: CudaDevice) -> None:
    if not multiplies_blocks(gemm):
        pytest.skip("cuBLASLt multiplies blocks on Hopper, from 12.9 on")
    weight = BlockCase(4096, 4096).packed(device)
    timings = GemmTimings(None)
    tuned = Gemm(device.library, gemm.cublaslt, timings, multiplies_blocks(gemm))
    assert tuned.takes_groups(2048, weight, "bfloat16", False)
    found = GemmTuner(tuned, timings).tune(tuned.problems)
    assert {problem.has_blocks for problem in found} == {True, False}
    for problem, choice in found.items():
        assert choice.microseconds > 0
        print(f"{problem.key}: {choice.microseconds:.1f} us")
    codes, values = (next(c for p, c in found.items() if p.has_blocks == has_blocks) for has_blocks in (True, False))
    assert tuned.takes_groups(2048, weight, "bfloat16", False) == (codes.microseconds <= values.microseconds)


@pytest.mark.parametrize("powers", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_model_follows_the_numpy_engine(
    dtype: str, powers: bool, gemm: Gemm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of 70 tokens at once; a last bit moves an input to the next code, and that all later ones."""
    computed: list[GemmProblem] = []
    run = CublasLt.run

    def recorded(self: CublasLt, problem: GemmProblem, *arguments: Any) -> None:
        computed.append(problem)
        run(self, problem, *arguments)

    monkeypatch.setattr(CublasLt, "run", recorded)
    quantised, twin = model.written(tmp_path, model.WIDE, powers)
    expected, plain = model.generate(quantised), model.generate(twin)
    output = model.generate(quantised, 1, "cuda", dtype)
    assert np.isfinite(output).all()
    assert np.abs(output - expected).mean() < 2 * np.abs(plain - expected).mean()
    of_blocks = {(one.out_features, one.in_features) for one in computed if one.has_blocks and one.num_tokens == 72}
    if multiplies_blocks(gemm):
        assert of_blocks == {(1024, 256), (256, 512), (768, 256), (256, 384)}
