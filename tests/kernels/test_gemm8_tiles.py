"""What the tiles of codes take, without the GPU that runs them (tests/gpu/test_gemm8_tiles.py has that)."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from phalanx.kernels.gemm8_tiles import gemm8_tiles, gemm8_tiles_takes
from phalanx.kernels.quantize import QuantizedRows
from phalanx.parallel.errors import ExecutorError

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
    with pytest.raises(ExecutorError, match=r"in multiples of 16.*this is fp8\[40, 24\] by fp8, 16 columns, on sm_"):
        gemm8_tiles(device.library, x, weight, device.put(random_normal(BFLOAT16, 40, 16)))
