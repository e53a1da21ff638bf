# SPDX-License-Identifier: Apache-2.0
"""Whether cuBLASLt multiplies fp8 blocks on this device, found out by one small product."""

from __future__ import annotations

import numpy as np

from phalanx.kernels.cublaslt import CublasLt, GemmProblem
from phalanx.kernels.product_sizes import BLOCK, block_scale_shape
from phalanx.parallel.errors import ExecutorError

__all__ = ["multiplies_blocks"]

_TOKENS, _BLOCKS, _GROUPS = 68, 3, 5
_ONE = 0x38
"""1 as e4m3."""


def multiplies_blocks(cublaslt: CublasLt) -> bool:
    """Whether there is an algorithm, and scales count where its documentation says. Waits for the device.

    All codes are 1 and all scales powers of two, so that the result is exact; every scale has another neighbour on each side, so that
    scales in any other layout give another one.
    """
    import cupy

    rows, columns = BLOCK * _BLOCKS, BLOCK * _GROUPS
    problem = GemmProblem(_TOKENS, rows, columns, "fp8", "float32", has_blocks=True)
    x, weight = (cupy.asarray(np.full((extent, columns), _ONE, np.uint8)) for extent in (_TOKENS, rows))
    of_x = _powers(_TOKENS, _GROUPS, 7)
    blocks = np.zeros(block_scale_shape(rows, columns), np.float32)
    blocks[:, :_GROUPS] = _powers(_BLOCKS, _GROUPS, 5)
    scales, out = (cupy.asarray(one) for one in (of_x.T.copy(), blocks)), cupy.zeros((_TOKENS, rows), np.float32)
    x_scale, weight_scale = scales
    try:
        cublaslt.run(
            problem, cublaslt.algorithms(problem, 1)[0], x.data.ptr, weight.data.ptr, out.data.ptr, 0,
            cupy.cuda.get_current_stream().ptr, (x_scale.data.ptr, weight_scale.data.ptr),
        )  # fmt: skip
    except ExecutorError:
        return False
    expected = np.repeat(BLOCK * (of_x @ blocks[:, :_GROUPS].T), BLOCK, axis=1)
    return bool(np.array_equal(cupy.asnumpy(out), expected))


def _powers(rows: int, columns: int, count: int) -> np.ndarray:
    """``[rows, columns]`` powers of two in a pattern that is not its own transpose."""
    exponents = (np.arange(rows)[:, None] + 2 * np.arange(columns)) % count
    return np.exp2(-exponents.astype(np.float32))
