"""How many GPUs there are, for tests and benchmarks of several."""

from __future__ import annotations

import pytest

__all__ = ["GPU_TOLERANCE", "num_gpus", "skip_without_gpus"]

GPU_TOLERANCE = 2e-4
"""Of the logits' range, in float32: a GPU sums in another order than the processor, and its functions are coarser."""


def num_gpus() -> int:
    """GPUs of this machine."""
    import cupy

    return int(cupy.cuda.runtime.getDeviceCount())


def skip_without_gpus(needed: int) -> None:
    """Skip the running test on a machine with fewer."""
    if needed > num_gpus():
        pytest.skip(f"needs {needed} GPUs")
