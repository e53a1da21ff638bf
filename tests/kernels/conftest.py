"""Every kernel test runs on the emulator; where a GPU is present, on it too (marked ``gpu``)."""

from __future__ import annotations

import shutil

import pytest

from .devices import CudaDevice, EmulatedDevice, KernelDevice, has_gpu

BACKENDS = ["emulator", *([pytest.param("cuda", marks=pytest.mark.gpu)] if has_gpu() else [])]


@pytest.fixture(scope="session", params=BACKENDS)
def device(request: pytest.FixtureRequest) -> KernelDevice:
    if request.param == "cuda":
        return CudaDevice()
    if shutil.which("g++") is None:
        pytest.skip("the emulator needs g++")
    return EmulatedDevice(request.config.cache.mkdir("emulated-kernels"))


@pytest.fixture(scope="session")
def clustered_device(device: KernelDevice, request: pytest.FixtureRequest) -> KernelDevice:
    """A device on which few rows are shared by clusters of blocks: 8 for up to 4 rows, 2 for up to 16 on the emulator."""
    if isinstance(device, CudaDevice):
        return device
    return EmulatedDevice(request.config.cache.mkdir("emulated-kernels"), num_multiprocessors=16, has_clusters=True)


@pytest.fixture
def random_normal():
    """Seeded normal arrays, rounded to a dtype: ``random_normal(dtype, *shape)``."""
    import numpy as np

    generator = np.random.default_rng(20261120)

    def draw(dtype, *shape, scale=1.0):
        return (scale * generator.standard_normal(shape)).astype(dtype)

    return draw
