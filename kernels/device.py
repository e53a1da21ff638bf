"""Whether and which GPU is there, asked without failing where CUDA is not installed."""

from __future__ import annotations

__all__ = ["gpu_is_available"]


def gpu_is_available() -> bool:
    """Whether CuPy is installed and sees at least one GPU."""
    try:
        import cupy

        return bool(cupy.cuda.runtime.getDeviceCount())
    except Exception:  # no CuPy, no driver, no device: each raises its own type
        return False
