"""What the tiles of codes take, and when they are chosen, without the GPU that runs them (tests/gpu/test_gemm8_tiles.py has that)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from phalanx.kernels.cublaslt import Algorithm, GemmProblem
from phalanx.kernels.gemm import Gemm
from phalanx.kernels.gemm8_tiles import TileShape, gemm8_tiles, gemm8_tiles_takes
from phalanx.kernels.gemv import CODES_SHAPE
from phalanx.kernels.quantize import QuantizedRows
from phalanx.kernels.tuning import GemmChoice, GemmTimings
from phalanx.parallel.errors import ExecutorError
from tests.support.fake_cublaslt import FakeCublasLt

from .devices import KernelDevice

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def test_hopper_takes_whole_pieces_of_sixteen_bytes() -> None:
    assert gemm8_tiles_takes("sm_90a", 8, 16)
    assert not gemm8_tiles_takes("sm_90a", 4, 16)
    assert not gemm8_tiles_takes("sm_90a", 8, 24)
    assert not gemm8_tiles_takes("sm_80", 8, 16)
    assert not gemm8_tiles_takes("sm_100a", 8, 16)


def test_what_does_not_fit_is_refused_by_name(device: KernelDevice, random_normal: Any) -> None:
    x, weight = (
        QuantizedRows(device.put(np.zeros((rows, 24), np.uint8)), device.put(np.ones(rows, np.float32)), "fp8")
        for rows in (40, 16)
    )
    with pytest.raises(
        ExecutorError, match=r"in multiples of 16.*this is fp8\[40, 24\] by fp8, 16 columns of bfloat16, on sm_"
    ):
        gemm8_tiles(device.library, x, weight, device.put(random_normal(BFLOAT16, 40, 16)))


class HopperLibrary:
    """Enough of a library to choose kernels, none of which runs."""

    architecture, num_multiprocessors, has_clusters = "sm_90a", 132, True

    def function(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("nothing runs")


def test_untimed_int8_products_that_fill_the_device_are_tiles() -> None:
    """Steps have more sizes than the tuner times."""
    gemm = Gemm(HopperLibrary(), FakeCublasLt(), GemmTimings(None))  # type: ignore[arg-type]

    def kernel(num_tokens: int, out_features: int, dtype: str = "int8", in_features: int = 4096) -> type:
        return type(gemm.choice(GemmProblem(num_tokens, out_features, in_features, dtype, "bfloat16")).kernel)

    assert kernel(768, 28672) is TileShape
    assert kernel(300, 28672) is TileShape
    assert kernel(512, 4096) is Algorithm  # 32 tiles for 66 clusters
    assert kernel(768, 28672, "fp8") is Algorithm
    assert kernel(768, 28668) is Algorithm
    assert kernel(768, 28672, in_features=4104) is Algorithm


def test_tiles_that_more_tokens_were_timed_with_are_not_for_a_few() -> None:
    timings = GemmTimings(None)
    gemm = Gemm(HopperLibrary(), FakeCublasLt(), timings)  # type: ignore[arg-type]
    problem = GemmProblem(64, 28672, 4096, "int8", "bfloat16")
    timings.add({problem: GemmChoice(TileShape(4), 1.0, 2.0)})
    assert gemm.choice(replace(problem, num_tokens=48)).kernel == TileShape(4)
    assert gemm.choice(replace(problem, num_tokens=8)).kernel == CODES_SHAPE
