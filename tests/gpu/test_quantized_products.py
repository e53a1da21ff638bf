"""int8 and packed products on a GPU: every kernel that the tuner may choose, exact for int8 codes; executors with such weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from phalanx.checkpoints.quantization.numbers import quantize_rows
from phalanx.kernels.cublaslt import Algorithm, CublasLt
from phalanx.kernels.experts import Routing
from phalanx.kernels.gemm import WORKSPACE_BYTES, Gemm
from phalanx.kernels.gemm8_tiles import TileShape
from phalanx.kernels.gemm_operands import Operands, problem_of
from phalanx.kernels.gemm_tuner import GemmTuner
from phalanx.kernels.gemv import GemvShape
from phalanx.kernels.library import KernelLibrary
from phalanx.kernels.product_sizes import SUM_BYTES, unpacked_bytes
from phalanx.kernels.tuning import GemmChoice, GemmTimings
from tests.gpu.test_fp8 import put_codes
from tests.kernels import test_expert_codes
from tests.kernels.devices import CudaDevice, has_gpu
from tests.kernels.test_packed import KINDS, Case
from tests.quantization import test_checkpoints as checkpoints
from tests.quantization import writers
from tests.support.checkpoints import write_checkpoint

cupy = pytest.importorskip("cupy")
pytest.importorskip("nvmath")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_gpu(), reason="needs an NVIDIA GPU")]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHAPES = [(1, 256, 128), (7, 512, 2048), (17, 320, 1024), (33, 4096, 4096), (130, 1008, 688), (257, 96, 14336)]


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    return CudaDevice()


@pytest.fixture(scope="module")
def gemm() -> Iterator[Gemm]:
    gemm = Gemm(KernelLibrary(), CublasLt(cupy.empty(WORKSPACE_BYTES, np.uint8)), GemmTimings(None))
    yield gemm
    cupy.cuda.runtime.deviceSynchronize()
    gemm.close()


def results(gemm: Gemm, device: CudaDevice, operands: Operands, step: int = 1) -> Iterator[tuple[Any, np.ndarray]]:
    """What every ``step``-th candidate computes."""
    problem = problem_of(operands)
    for candidate in gemm.candidates(problem)[::step]:
        operands.out.view(np.uint8).fill(0xFF)
        gemm.run(problem, GemmChoice(candidate), operands)
        yield candidate, device.get(operands.out)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_int8_candidate_is_exact(
    gemm: Gemm, device: CudaDevice, shape: tuple[int, int, int], has_bias: bool
) -> None:
    num_tokens, out_features, in_features = shape
    random = np.random.default_rng(3)
    x = quantize_rows(random.standard_normal((num_tokens, in_features), np.float32), "int8")
    weight = quantize_rows(random.standard_normal((out_features, in_features), np.float32), "int8")
    bias = random.standard_normal(out_features).astype(BFLOAT16)
    sums = (x.codes.astype(np.float64) @ weight.codes.astype(np.float64).T).astype(np.int32)
    expected = (sums.astype(np.float32) * x.scale) * weight.scale.T
    expected = (expected + bias.astype(np.float32) if has_bias else expected).astype(BFLOAT16)
    operands = Operands(
        put_codes(device, x, "int8"), put_codes(device, weight, "int8"),
        device.poisoned((num_tokens, out_features), BFLOAT16), device.put(bias) if has_bias else None,
        cupy.empty(SUM_BYTES, np.uint8),
    )  # fmt: skip
    kinds = set()
    for candidate, out in results(gemm, device, operands):
        kinds.add(type(candidate))
        np.testing.assert_array_equal(out, expected, err_msg=str(candidate))
    expected_kinds: set[type] = {Algorithm}
    if num_tokens <= 32 and in_features % 64 == 0:
        expected_kinds.add(GemvShape)
    if num_tokens > 32 and device.library.architecture == "sm_90a":
        expected_kinds.add(TileShape)
    assert kinds == expected_kinds


def test_int8_products_of_several_slabs_are_exact(gemm: Gemm, device: CudaDevice) -> None:
    random = np.random.default_rng(4)
    x = quantize_rows(random.standard_normal((3000, 64), np.float32), "int8")
    weight = quantize_rows(random.standard_normal((6160, 64), np.float32), "int8")
    out = device.poisoned((3000, 6160), BFLOAT16)
    scratch = cupy.empty(SUM_BYTES, np.uint8)
    gemm(put_codes(device, x, "int8"), put_codes(device, weight, "int8"), out, scratch=scratch)
    sums = x.codes.astype(np.float32) @ weight.codes.astype(np.float32).T  # below 2 ** 24: exact
    np.testing.assert_array_equal(device.get(out), ((sums * x.scale) * weight.scale.T).astype(BFLOAT16))


@pytest.mark.parametrize(("kind", "group", "has_zero"), KINDS)
@pytest.mark.parametrize(
    "shape", [(1, 512, 4096), (5, 96, 688), (16, 256, 1376), (64, 320, 2048), (130, 1008, 688)], ids=str
)
def test_every_packed_candidate_equals_float64(
    gemm: Gemm, device: CudaDevice, shape: tuple[int, int, int], kind: Any, group: int, has_zero: bool
) -> None:
    num_tokens, out_features, in_features = shape
    case = Case(out_features, in_features, kind, group, has_zero)
    x = np.random.default_rng(6).standard_normal((num_tokens, in_features)).astype(BFLOAT16)
    wide = x.astype(np.float64)
    expected = wide @ case.values.T
    # One rounding of the result and float32 sums, those of parts of k among them. Unpacked values are rounded to bfloat16 besides: by up to
    # u = 2**-9 of themselves, whatever x is, so by Hoeffding's inequality the sum of x times that exceeds sqrt(50 / 2) * 2 u times the norm of
    # the products once in 10**21.
    rounding, norms = 1.02 * 2.0**-8 * np.abs(expected), np.sqrt(wide**2 @ (case.values**2).T)
    operands = Operands(
        device.put(x), case.packed(device), device.poisoned((num_tokens, out_features), BFLOAT16), None,
        cupy.empty(unpacked_bytes((out_features, in_features), 2), np.uint8),
    )  # fmt: skip
    found = 0
    step = 1 if kind == "int4" and group == 128 and num_tokens in (1, 16) else 6  # each is a compilation
    for candidate, out in results(gemm, device, operands, step):
        error = np.abs(out.astype(np.float64) - expected)
        limit = rounding + norms * (2.0**-14 if isinstance(candidate, GemvShape) else 10 * 2.0**-9)
        assert np.all(error <= limit), (candidate, float((error / limit).max()))
        found += isinstance(candidate, GemvShape)
    assert (found > 0) == (num_tokens <= 64)


@pytest.mark.parametrize("packed", [True, False])
def test_the_tuner_times_them(gemm: Gemm, device: CudaDevice, packed: bool) -> None:
    if packed:
        case = Case(4096, 4096, "int4", 128, False)
        x = device.put(np.random.default_rng(7).standard_normal((4, 4096)).astype(BFLOAT16))
        operands = Operands(x, case.packed(device), device.poisoned((4, 4096), BFLOAT16))
    else:
        codes = quantize_rows(np.random.default_rng(7).standard_normal((4096, 4096), np.float32), "int8")
        rows = put_codes(device, codes, "int8")
        operands = Operands(rows, rows, device.poisoned((4096, 4096), BFLOAT16))
    (choice,) = GemmTuner(gemm, GemmTimings(None)).tune([problem_of(operands)]).values()
    assert 0 < choice.microseconds <= choice.first_microseconds


@pytest.mark.parametrize("name", [*checkpoints.WEIGHT_ONLY, "ct-int8"])
def test_log_probabilities_follow_the_numpy_engine(name: str, tmp_path: Path) -> None:
    dense = write_checkpoint(checkpoints.CASE, tmp_path / "dense")
    module, section = checkpoints.ALL[name]
    writers.write(dense, tmp_path / "quantised", tmp_path / "twin", module, section)
    output = checkpoints.logprobs(checkpoints.generate(tmp_path / "quantised", engine="cuda", dtype="bfloat16"))
    expected, exact = (
        checkpoints.logprobs(checkpoints.generate(tmp_path / "quantised", dtype=dtype))
        for dtype in ("bfloat16", "float32")
    )
    # Two roundings to bfloat16 at different places; int8 codes of activations that are near a half turn over besides.
    assert np.abs(output - expected).max() < 2 * np.abs(expected - exact).max() + 0.05


def is_near(quantised: Path, twin: Path, **options: Any) -> bool:
    """Whether a GPU's log-probabilities differ from the NumPy engine's by at most twice what those differ from the float twin's.

    A last bit of an input moves its code to the neighbour, and that all later ones.
    """
    expected, plain = (checkpoints.logprobs(checkpoints.generate(path)) for path in (quantised, twin))
    found = checkpoints.logprobs(checkpoints.generate(quantised, engine="cuda", **options))
    return bool(np.isfinite(found).all() and np.abs(found - expected).mean() < 2 * np.abs(plain - expected).mean())


@pytest.mark.parametrize("name", [name for name in checkpoints.WITH_INPUTS if name != "ct-int8"])
def test_formats_with_quantised_inputs_follow_the_numpy_engine(name: str, tmp_path: Path) -> None:
    dense = write_checkpoint(checkpoints.CASE, tmp_path / "dense")
    module, section = checkpoints.WITH_INPUTS[name]
    writers.write(dense, tmp_path / "quantised", tmp_path / "twin", module, section)
    assert is_near(tmp_path / "quantised", tmp_path / "twin", dtype="float16")


@pytest.mark.parametrize(
    ("name", "has_router"),
    [("hf-fp8-blocks", False), ("hf-fp8-powers", False), ("ct-fp8-channel", False), ("ct-int8", False), ("ct-fp8-static", False),
     ("fbgemm", True), ("modelopt-smoothquant", False), ("hf-fp8-wide", False)],
)  # fmt: skip
def test_experts_of_every_kind_of_inputs_follow_the_numpy_engine(name: str, has_router: bool, tmp_path: Path) -> None:
    """In float32, where experts are chosen as there."""
    assert is_near(*checkpoints.written_experts(tmp_path, name, has_router), dtype="float32")


@pytest.mark.parametrize("name", ["ct-w4-g64-asymmetric", "awq-g64", "ct-w8-channel", "ct-fp8-weight-only"])
def test_weight_only_experts_follow_the_numpy_engine(name: str, tmp_path: Path) -> None:
    quantised, twin = checkpoints.written_experts(tmp_path, name, has_router=True)
    output = checkpoints.logprobs(checkpoints.generate(quantised, engine="cuda", dtype="float16"))
    np.testing.assert_allclose(output, checkpoints.logprobs(checkpoints.generate(twin)), atol=5e-2)


@pytest.mark.parametrize("tokens", [3, 40, 128])
@pytest.mark.parametrize(("scheme", "dtype"), test_expert_codes.SCHEMES, ids=str)
def test_mixtures_of_codes_at_wide_sizes_equal_float64(
    device: CudaDevice, scheme: Any, dtype: Any, tokens: int
) -> None:
    """Streamed, and in tiles of 64 and of 128 rows, over many blocks and stages."""
    random = np.random.default_rng(tokens)

    def normal(dtype: np.dtype[Any], *shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(dtype)

    routing = Routing(4, 2, True, range(4)) if tokens < 128 else Routing(2, 2, True, range(2))
    test_expert_codes.check(device, normal, dtype, tokens, 2048, 560, routing, scheme)
