"""cuBLASLt's products of codes in NumPy, from device addresses and in the layouts that its documentation gives: those of blocks, and sums.

Row-major, as we hold them (cuBLAS 13, section "128-element 1D and 128x128 2D block scaling"): the first operand and its scales are the
weight's, codes ``[O, K]`` and scales ``[ceil(O / 128), L padded to a multiple of 4]``; the second's are those of x, codes ``[T, K]`` and scales
``[L, T]``; L = ceil(K / 128), and O and T are multiples of 4.
"""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np

from phalanx.kernels.cublaslt import Algorithm, GemmProblem
from phalanx.parallel.errors import ExecutorError

__all__ = ["FakeCublasLt"]

DTYPES = {
    "bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32, "fp8": ml_dtypes.float8_e4m3fn, "int8": np.int8,
    "int32": np.int32,
}  # fmt: skip
ALGORITHM = Algorithm((1, 2, 3, 4, 5, 6, 7, 8), 0)


class FakeCublasLt:
    """Products of fp8 blocks, and sums of codes without scales.

    Attributes:
        has_blocks: whether there are algorithms for them; others have one that cannot run.
        scales_rows: whether there are algorithms for scales of rows, which cannot run either; on Hopper alone.
        problems: what was computed.
    """

    version = 13_00_00

    def __init__(self, has_blocks: bool = True, scales_rows: bool = True) -> None:
        self.has_blocks, self.scales_rows = has_blocks, scales_rows
        self.problems: list[GemmProblem] = []

    def algorithms(self, problem: GemmProblem, count: int) -> list[Algorithm]:
        if problem.has_scales and not problem.has_blocks and not self.scales_rows:
            raise ExecutorError(f"cuBLASLt: no scales of rows for {problem.key}")
        if problem.has_blocks and not (self.has_blocks and problem.num_tokens % 4 == problem.out_features % 4 == 0):
            raise ExecutorError(f"cuBLASLt: not supported for {problem.key}")
        return [ALGORITHM]

    def accepts(self, problem: GemmProblem, algorithm: Algorithm) -> bool:
        return False

    def run(
        self, problem: GemmProblem, algorithm: Algorithm, x: int, weight: int, out: int, bias: int, stream: int,
        scales: tuple[int, int] = (0, 0),
    ) -> None:  # fmt: skip
        assert problem.has_blocks or problem.has_sums
        assert not problem.has_bias
        t, o, k = problem.num_tokens, problem.out_features, problem.in_features
        self.problems.append(problem)
        if problem.has_sums:
            left, right = (
                array_at(one, (rows, k), problem.dtype).astype(np.float64) for one, rows in ((x, t), (weight, o))
            )
            array_at(out, (t, o), problem.out_dtype)[...] = left @ right.T
            return
        length = -(-k // 128)
        x_scale = self.x_scale(scales[0], t, length)
        weight_scale = array_at(scales[1], (-(-o // 128), -(-length // 4) * 4), "float32")[:, :length]
        codes = [array_at(one, (rows, k), "fp8").astype(np.float64) for one, rows in ((x, t), (weight, o))]
        left = codes[0] * np.repeat(x_scale, 128, 1)[:, :k]
        right = codes[1] * np.repeat(np.repeat(weight_scale, 128, 0)[:o], 128, 1)[:, :k]
        with np.errstate(all="ignore"):  # padding rows of a step hold anything
            array_at(out, (t, o), problem.out_dtype)[...] = left @ right.T

    def x_scale(self, address: int, num_tokens: int, groups: int) -> Any:
        """``[T, L]``."""
        return array_at(address, (groups, num_tokens), "float32").T

    def close(self) -> None: ...


def array_at(address: int, shape: tuple[int, ...], dtype: str) -> Any:
    kind = np.dtype(DTYPES[dtype])
    size = int(np.prod(shape)) * kind.itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), np.uint8).view(kind).reshape(shape)
