"""The GPU as the driver describes it."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from phalanx.runtime.executors.tensorrt import device as trt_device


class _Driver:
    """A driver with one GPU of compute capability 8.9, unless ``initialised`` says that it fails."""

    def __init__(self, status: int = 0) -> None:
        self._status = status

    def cuInit(self, flags: int) -> int:
        return self._status

    def cuDeviceGet(self, handle: Any, ordinal: int) -> int:
        return 0 if ordinal == 0 else 101

    def cuDeviceGetAttribute(self, value: Any, attribute: int, handle: Any) -> int:
        value._obj.value = {75: 8, 76: 9}[attribute]
        return 0


def test_compute_capability_is_the_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: _Driver())
    assert trt_device.compute_capability() == "8.9"
    assert trt_device.compute_capability(1) is None


def test_no_driver_or_no_gpu_is_no_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: _Driver(status=100))
    assert trt_device.compute_capability() is None

    def no_library(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    assert trt_device.compute_capability() is None
