"""Products of few rows equal the float64 product, however they are cut."""

from __future__ import annotations

import os

import numpy as np
import pytest

from phalanx.runtime.executors.numpy import product as numpy_product
from phalanx.runtime.executors.numpy.product import product
from phalanx.runtime.executors.numpy.threads import Threads, thread_count


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (300, 40), (128, 768), (257, 3072), (1000, 96)])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 8, 31, 32, 33])
def test_product(num_threads: int, shape: tuple[int, int], num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numpy_product, "MIN_SHARE", 64)
    random = np.random.default_rng(num_rows)
    weight = random.normal(size=shape).astype(np.float32)
    x = random.normal(size=(num_rows, shape[1])).astype(np.float32)
    result = product(x, weight, Threads(num_threads))
    assert result.shape == (num_rows, shape[0])
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    np.testing.assert_allclose(result, exact, rtol=0, atol=1e-6 * shape[1])


def test_an_error_in_any_thread_reaches_the_caller() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Threads(2).run([lambda: None, fail, lambda: None])


@pytest.mark.parametrize(
    ("openmp", "openblas", "expected"),
    [("3", None, 3), (None, "2", 2), ("4", "1", 1), ("many", "0", None), (None, None, None)],
)
def test_thread_count_is_the_fewest_that_was_asked_for(
    openmp: str | None, openblas: str | None, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("OMP_NUM_THREADS", openmp), ("OPENBLAS_NUM_THREADS", openblas)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert thread_count() == (expected or len(os.sched_getaffinity(0)))
