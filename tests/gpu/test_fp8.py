"""fp8 on a GPU: every product that the tuner may choose, attention over fp8 pages, the executor against the NumPy engine.

Codes of the quantising kernels are tested on the GPU by tests/kernels/test_quantize.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from phalanx.checkpoints.quantization.numbers import Codes, dequantize, quantize_rows
from phalanx.kernels.cublaslt import CublasLt
from phalanx.kernels.gemm import WORKSPACE_BYTES, Gemm
from phalanx.kernels.gemm_operands import Operands, problem_of
from phalanx.kernels.gemm_tuner import GemmTuner
from phalanx.kernels.gemv8 import GEMV8_SHAPES
from phalanx.kernels.library import KernelLibrary
from phalanx.kernels.product_sizes import SUM_BYTES
from phalanx.kernels.quantize import CodeKind, QuantizedRows
from phalanx.kernels.tuning import GemmChoice, GemmTimings
from phalanx.runtime.llm import LLM
from phalanx.runtime.request import SamplingParams
from tests.gpu.test_attention_shapes import mixed
from tests.gpu.test_executor import CASES, prompts
from tests.kernels.attention_case import check, shape_of
from tests.kernels.devices import CudaDevice, has_gpu
from tests.kernels.fp8_sums import sum_bound
from tests.support.checkpoints import CheckpointCase, write_checkpoint

cupy = pytest.importorskip("cupy")
pytest.importorskip("nvmath")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_gpu(), reason="needs an NVIDIA GPU")]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHAPES = [(1, 256, 128), (7, 512, 2048), (17, 320, 1024), (32, 4096, 4096), (130, 1008, 640), (257, 96, 14336)]


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    return CudaDevice()


@pytest.fixture(scope="module")
def gemm() -> Any:
    gemm = Gemm(KernelLibrary(), CublasLt(cupy.empty(WORKSPACE_BYTES, np.uint8)), GemmTimings(None))
    yield gemm
    cupy.cuda.runtime.deviceSynchronize()
    gemm.close()


def put_codes(device: CudaDevice, codes: Codes, kind: CodeKind) -> QuantizedRows:
    return QuantizedRows(device.put(codes.codes.view(np.uint8)), device.put(codes.scale[:, 0].copy()), kind)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scales_rows", [True, False])
def test_every_fp8_candidate_equals_float64(
    gemm: Gemm, device: CudaDevice, shape: tuple[int, int, int], has_bias: bool, scales_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Without scales of rows, as on Ada and Blackwell, cuBLASLt makes sums."""
    monkeypatch.setattr(gemm, "_scales_rows", gemm._scales_rows and scales_rows)
    gemm.refresh()
    num_tokens, out_features, in_features = shape
    random = np.random.default_rng(3)
    x = quantize_rows(random.standard_normal((num_tokens, in_features), np.float32))
    steps = np.linspace(1, 30, out_features, dtype=np.float32)[:, None]  # a scale of its own for each row shows mix-ups
    weight = quantize_rows(random.standard_normal((out_features, in_features), np.float32) * steps)
    bias = random.standard_normal(out_features).astype(BFLOAT16)
    left, right = (dequantize(codes).astype(np.float64) for codes in (x, weight))
    expected = left @ right.T + (bias.astype(np.float64) if has_bias else 0.0)
    # The result, and where a bias is added separately the product, too, are rounded to bfloat16; sums have 13 bits.
    sums = sum_bound(x.codes.astype(np.float64), weight.codes.astype(np.float64)) * x.scale * weight.scale.T
    limit = (
        1.02 * 2.0**-8 * np.abs(expected)
        + (2.0**-8 * np.abs(bias).astype(np.float64) if has_bias else 0.0)
        + 1.01 * sums
    )
    operands = Operands(
        put_codes(device, x, "fp8"), put_codes(device, weight, "fp8"),
        device.poisoned((num_tokens, out_features), BFLOAT16), device.put(bias) if has_bias else None,
        cupy.empty(SUM_BYTES, np.uint8),
    )  # fmt: skip

    def assert_close(kernel: object) -> None:
        error = np.abs(device.get(operands.out).astype(np.float64) - expected)
        assert np.all(error <= limit), (kernel, float((error / limit).max()))

    gemm(operands.x, operands.weight, operands.out, operands.bias, scratch=operands.scratch)
    assert_close("chosen")
    problem = problem_of(operands)
    candidates = gemm.candidates(problem)
    assert len(candidates) >= (len(GEMV8_SHAPES) if num_tokens <= 32 else 1)
    for candidate in candidates:
        operands.out.view(np.uint8).fill(0xFF)
        gemm.run(problem, GemmChoice(candidate), operands)
        assert_close(candidate)


def test_the_tuner_times_fp8_products(gemm: Gemm, device: CudaDevice) -> None:
    weight = quantize_rows(np.random.default_rng(4).standard_normal((4096, 4096), np.float32))
    x = quantize_rows(np.random.default_rng(5).standard_normal((4, 4096), np.float32))
    operands = Operands(
        put_codes(device, x, "fp8"), put_codes(device, weight, "fp8"), device.poisoned((4, 4096), BFLOAT16)
    )
    (choice,) = GemmTuner(gemm, GemmTimings(None)).tune([problem_of(operands)]).values()
    assert 0 < choice.microseconds <= choice.first_microseconds


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize(
    "heads", [(8, 2, 64), (8, 2, 80), (32, 8, 128), (8, 1, 256), (5, 1, 128), (16, 16, 256), (30, 1, 32)]
)
def test_attention_over_fp8_pages(device: CudaDevice, heads: tuple[int, int, int], block_size: int, dtype: str) -> None:
    check(mixed(shape_of(*heads, dtype=dtype, block_size=block_size, has_fp8_pages=True)), device)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_over_fp8_pages_with_window_cap_and_slopes(device: CudaDevice, head_dim: int) -> None:
    shape = shape_of(8, 2, head_dim, window=50, soft_cap=5.0, has_fp8_pages=True)
    check(mixed(shape, has_alibi=True), device)


@pytest.mark.parametrize(
    "options", [{"quantize": "fp8"}, {"kv_cache_dtype": "fp8"}, {"quantize": "fp8", "kv_cache_dtype": "fp8"}], ids=str
)
@pytest.mark.parametrize("name", ["llama", "llama-128", "gemma"])
def test_log_probabilities_follow_the_numpy_engine(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    follow_the_numpy_engine(name, 192, options, tmp_path)


@pytest.mark.parametrize("quantize", ["fp8", "int8"])
@pytest.mark.parametrize("inner", [172, 344, 1000])
def test_matrices_that_no_product_of_codes_takes_follow_the_numpy_engine(
    inner: int, quantize: str, tmp_path: Path
) -> None:
    follow_the_numpy_engine("llama", inner, {"quantize": quantize}, tmp_path)


def follow_the_numpy_engine(name: str, inner: int, options: dict[str, Any], tmp_path: Path) -> None:
    """Nearer to the quantised NumPy engine than that is to the float one: bfloat16 moves some codes to their neighbours."""
    config = {**CASES[name], "intermediate_size": inner, "torch_dtype": "bfloat16"}
    directory = write_checkpoint(CheckpointCase(name, config, "bfloat16"), tmp_path)
    requests = prompts(CASES[name]["vocab_size"])
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, prompt_logprobs=0)

    def logprobs(engine: str, **options: Any) -> np.ndarray:
        sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 256, "num_kv_blocks": 200, "block_size": 16}
        with LLM(directory, engine=engine, **{**sizes, **options}) as llm:
            outputs = llm.generate(requests, params)
        return np.array([one.logprob for output in outputs for one in output.prompt_logprobs or () if one is not None])

    exact, expected, computed = logprobs("numpy"), logprobs("numpy", **options), logprobs("cuda", **options)
    assert np.isfinite(computed).all()
    rms = lambda difference: float(np.sqrt((difference**2).mean()))  # noqa: E731
    assert rms(computed - expected) < 1.0 * rms(exact - expected)
