# SPDX-License-Identifier: Apache-2.0
"""Which GPU is here, asked of the driver itself: building an engine must not need CUDA's Python packages."""

from __future__ import annotations

import ctypes

__all__ = ["compute_capability"]

_MAJOR, _MINOR = 75, 76
"""``CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR`` and ``_MINOR`` of the CUDA driver API."""


def compute_capability(device: int = 0) -> str | None:
    """Compute capability of a visible GPU, e.g. ``8.9``; None without a driver or without that GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    handle = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(handle), device):
        return None
    return f"{_attribute(driver, handle, _MAJOR)}.{_attribute(driver, handle, _MINOR)}"


def _attribute(driver: ctypes.CDLL, handle: ctypes.c_int, attribute: int) -> int:
    value = ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle)
    return value.value
