"""How many GPUs there are, for tests and benchmarks of several."""

from __future__ import annotations

import pytest

__all__ = ["num_gpus", "skip_without_gpus"]


def num_gpus() -> int:
    """GPUs of this machine."""
    import cupy

    return int(cupy.cuda.runtime.getDeviceCount())


def skip_without_gpus(needed: int) -> None:
    """Skip the running test on a machine with fewer."""
    if needed > num_gpus():
        pytest.skip(f"needs {needed} GPUs")
