"""Matrix products on the GPU against float64, through every kernel that the tuner may choose."""

import ml_dtypes
import numpy as np
import pytest

from phalanx.kernels.cublaslt import CublasLt, GemmProblem
from phalanx.kernels.gemm import WORKSPACE_BYTES, Gemm
from phalanx.kernels.gemm_operands import Operands, problem_of
from phalanx.kernels.gemm_tuner import GemmTuner
from phalanx.kernels.gemv import GemvShape
from phalanx.kernels.library import KernelLibrary
from phalanx.kernels.tuning import GemmChoice, GemmTimings

cupy = pytest.importorskip("cupy")
pytest.importorskip("nvmath")
pytestmark = pytest.mark.gpu

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
RTOL = {"float32": 2.0**-19, "float16": 1.02 * 2.0**-11, "bfloat16": 1.02 * 2.0**-8}
ATOL = 2.0**-19
"""Of the largest sum of absolute products: what float32 accumulation in any order may lose."""


@pytest.fixture(scope="module")
def gemm():
    gemm = Gemm(KernelLibrary(), CublasLt(cupy.empty(WORKSPACE_BYTES, np.uint8)), GemmTimings(None))
    yield gemm
    cupy.cuda.runtime.deviceSynchronize()
    gemm.close()


def put(array):
    memory = cupy.cuda.alloc(array.nbytes)
    memory.copy_from_host(np.ascontiguousarray(array).ctypes.data, array.nbytes)
    return cupy.ndarray(array.shape, dtype=array.dtype, memptr=memory)


def get(array):
    cupy.cuda.runtime.deviceSynchronize()
    result = np.empty(array.shape, array.dtype)
    array.data.copy_to_host(result.ctypes.data, result.nbytes)
    return result.astype(np.float64)


def random(dtype, *shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(DTYPES[dtype])


def check(out, expected, x, weight, dtype):
    products = np.abs(x.astype(np.float64)) @ np.abs(weight.astype(np.float64)).T
    limit = RTOL[dtype] * np.abs(expected) + ATOL * products.max()
    assert np.all(np.abs(get(out) - expected) <= limit), float(np.abs(get(out) - expected).max())


SHAPES = [(1, 256, 128), (3, 512, 2048), (17, 320, 1024), (130, 1000, 640), (257, 96, 4096)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_every_candidate_equals_float64(gemm, dtype, shape, has_bias):
    num_tokens, out_features, in_features = shape
    x, weight = random(dtype, num_tokens, in_features), random(dtype, out_features, in_features)
    bias = random(dtype, out_features)
    expected = x.astype(np.float64) @ weight.astype(np.float64).T
    expected = expected + bias.astype(np.float64) if has_bias else expected
    problem = None
    on_device = (put(x), put(weight))
    candidates = [None]
    while candidates:
        start = put(np.full((num_tokens, out_features), np.nan).astype(x.dtype))
        operands = Operands(*on_device, start, put(bias) if has_bias else None)
        if problem is None:
            problem = problem_of(operands)
            candidates = gemm.candidates(problem)
            assert candidates
        gemm.run(problem, GemmChoice(candidates.pop()), operands)
        check(start, expected, x, weight, dtype)


def test_bfloat16_products_can_be_written_as_float32(gemm):
    x, weight = random("bfloat16", 5, 512), random("bfloat16", 300, 512)
    out = put(np.full((5, 300), np.nan, np.float32))
    gemm(put(x), put(weight), out)
    check(out, x.astype(np.float64) @ weight.astype(np.float64).T, x, weight, "float32")


def test_a_captured_product_equals_an_eager_one(gemm):
    x, weight = put(random("bfloat16", 33, 1024)), put(random("bfloat16", 512, 1024))
    eager, captured = put(np.zeros((33, 512), DTYPES["bfloat16"])), put(np.ones((33, 512), DTYPES["bfloat16"]))
    gemm(x, weight, eager)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.runtime.deviceSynchronize()
    with stream:
        stream.begin_capture()
        gemm(x, weight, captured)
        graph = stream.end_capture()
        graph.launch(stream)
    stream.synchronize()
    np.testing.assert_array_equal(get(eager), get(captured))


def test_the_tuner_keeps_a_choice_that_is_not_slower_and_finds_it_again(gemm, tmp_path):
    path = tmp_path / "timings.json"
    timings = GemmTimings(path)
    tuner = GemmTuner(gemm, timings)
    out = put(np.zeros((4, 4096), DTYPES["bfloat16"]))
    problem = problem_of(Operands(put(random("bfloat16", 4, 4096)), put(random("bfloat16", 4096, 4096)), out))
    (choice,) = tuner.tune([problem]).values()
    assert 0 < choice.microseconds <= choice.first_microseconds
    assert tuner.tune([problem]) == {}
    again = GemmTimings(path).find(problem)
    assert again is not None
    assert again.kernel == choice.kernel


def test_a_small_problem_borrows_the_choice_of_the_next_larger_one(gemm):
    def problem(num_tokens):
        return GemmProblem(num_tokens, 512, 1024, "bfloat16", "bfloat16")

    timings = GemmTimings(None)
    timings.add({problem(n): GemmChoice(gemm.cublaslt.algorithms(problem(n), 4)[-1]) for n in (64, 128, 512)})
    borrowing = Gemm(KernelLibrary(), gemm.cublaslt, timings)
    assert borrowing.choice(problem(40)) == timings.find(problem(64))
    assert borrowing.choice(problem(100)) == timings.find(problem(128))
    assert borrowing.choice(problem(300)).kernel == gemm.cublaslt.algorithms(problem(300), 1)[0]


def test_without_timings_one_token_takes_the_streaming_kernel(gemm):
    assert gemm.choice(GemmProblem(1, 512, 1024, "bfloat16", "bfloat16")).kernel == GemvShape()
    assert gemm.choice(GemmProblem(1, 512, 1000, "bfloat16", "bfloat16")).kernel != GemvShape()
    assert gemm.choice(GemmProblem(2, 512, 1024, "bfloat16", "bfloat16")).kernel != GemvShape()
