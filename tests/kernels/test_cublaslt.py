"""cuBLASLt's handles, on bindings that record what is asked of them."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest

from phalanx.kernels.cublaslt import CublasLt, GemmProblem
from phalanx.parallel.errors import ExecutorError

PROBLEM = GemmProblem(64, 128, 128, "fp8", "bfloat16")


class LtError(Exception):
    """The bindings' own."""


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    lt = MagicMock()
    lt.cuBLASLtError = LtError
    lt.matmul_heuristic_result_dtype = np.dtype([("workspace_size", np.uint64), ("state", np.int32)])
    package = SimpleNamespace(cublasLt=lt, cublas=MagicMock())
    monkeypatch.setitem(sys.modules, "nvmath", SimpleNamespace(bindings=package))
    monkeypatch.setitem(sys.modules, "nvmath.bindings", package)
    return lt


def test_a_problem_without_algorithms_leaves_no_handle_behind(bindings: MagicMock) -> None:
    """Shapes of fp8 blocks are asked for until cuBLASLt says that it has none."""
    library = CublasLt(SimpleNamespace(size=1, data=SimpleNamespace(ptr=256)))
    bindings.matmul_algo_get_heuristic.side_effect = LtError("not supported")
    for _ in range(3):
        with pytest.raises(ExecutorError, match=r"cuBLASLt: not supported for 64x128x128:fp8>bfloat16"):
            library.algorithms(PROBLEM, 1)
    assert bindings.matmul_preference_destroy.call_count == bindings.matmul_preference_create.call_count == 3
    library.close()
    assert bindings.matmul_desc_destroy.call_count == bindings.matmul_desc_create.call_count == 1
    assert bindings.matrix_layout_destroy.call_count == bindings.matrix_layout_create.call_count == 3
