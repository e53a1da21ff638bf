# SPDX-License-Identifier: Apache-2.0
"""Whether and which GPU is there, asked without failing where CUDA is not installed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from phalanx.parallel.errors import ConfigError

__all__ = ["Gpu", "driver_is_installed", "gpu_is_available", "peers_out_of_reach", "visible_gpus"]


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that this process can use.

    Attributes:
        index: CUDA's number of it in this process.
        bus_id: its place on the PCI bus, which is the same in every process of the host.
        compute_capability: such as ``"90"``, as `phalanx.kernels.compiler.architecture_name` takes it.
        memory_bytes: all of its memory.
    """

    index: int
    name: str
    bus_id: str
    compute_capability: str
    memory_bytes: int


def gpu_is_available() -> bool:
    """Whether CuPy is installed and sees at least one GPU."""
    try:
        import cupy

        return bool(cupy.cuda.runtime.getDeviceCount())
    except Exception:  # no CuPy, no driver, no device: each raises its own type
        return False


def driver_is_installed() -> bool:
    """Whether NVIDIA's driver library can be loaded."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def visible_gpus() -> tuple[Gpu, ...]:
    """The GPUs of this process, in CUDA's order; at least one.

    Raises:
        ConfigError: CuPy is missing, or CUDA finds no GPU.
    """
    try:
        import cupy

        runtime = cupy.cuda.runtime
        gpus = tuple(_describe(runtime, index) for index in range(runtime.getDeviceCount()))
    except Exception as error:
        raise ConfigError(
            f"no GPU can be used ({' '.join(str(error).split())}); pip install -e '.[cuda13]' (driver 580 or later) "
            "or '.[cuda12]' in Phalanx's checkout, and see that nvidia-smi lists a GPU"
        ) from error
    if not gpus:
        raise ConfigError("CUDA sees no GPU; look at CUDA_VISIBLE_DEVICES, or ask the scheduler for GPUs")
    return gpus


def peers_out_of_reach(gpus: tuple[Gpu, ...]) -> list[tuple[int, int]]:
    """Pairs of device numbers of which the first cannot read the second's memory directly."""
    import cupy

    reach = cupy.cuda.runtime.deviceCanAccessPeer
    return [
        (one.index, other.index)
        for one in gpus
        for other in gpus
        if one.index != other.index and not reach(one.index, other.index)
    ]


def _describe(runtime: object, index: int) -> Gpu:
    properties = runtime.getDeviceProperties(index)  # type: ignore[attr-defined]
    return Gpu(
        index=index,
        name=properties["name"].decode(),
        bus_id=runtime.deviceGetPCIBusId(index),  # type: ignore[attr-defined]
        compute_capability=f"{properties['major']}{properties['minor']}",
        memory_bytes=properties["totalGlobalMem"],
    )
