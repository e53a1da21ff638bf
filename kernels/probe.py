# SPDX-License-Identifier: Apache-2.0
"""Small programs that show whether a GPU, its compiler and its libraries work; for diagnosis only."""

from __future__ import annotations

import numpy as np

from phalanx.kernels.add import add
from phalanx.kernels.block_probe import multiplies_blocks
from phalanx.kernels.compiler import KernelSpec, architecture_name, compile_cubin
from phalanx.kernels.cublaslt import CublasLt
from phalanx.kernels.gemm import WORKSPACE_BYTES
from phalanx.kernels.library import KernelLibrary
from phalanx.kernels.peer_memory import open_peer_memory
from phalanx.parallel.communicator import Communicator
from phalanx.parallel.errors import ExecutorError
from phalanx.parallel.nccl_comm import NcclCommunicator, wait_for

__all__ = ["probe_all_reduce", "probe_compiler", "probe_cublaslt", "probe_kernel", "probe_peer_memory"]

_COUNT = 1 << 20
_WAIT_SECONDS = 30.0


def probe_compiler(compute_capability: str) -> str:
    """Compile one kernel (no GPU needed); the architecture that it was compiled for.

    Raises:
        ConfigError: NVRTC or CUDA's headers are missing, or the GPU is too old.
        ExecutorError: the kernel does not compile.
    """
    architecture = architecture_name(compute_capability)
    compile_cubin(KernelSpec.of("add", {"SCALAR": "float", "VEC": 4, "NUM_THREADS": 256}), architecture)
    return architecture


def probe_kernel(device: int) -> None:
    """Run one kernel on ``device`` and compare; waits for it.

    Raises:
        ExecutorError: the sum is wrong.
    """
    import cupy

    with cupy.cuda.Device(device), cupy.cuda.Stream(non_blocking=True):
        x = cupy.arange(_COUNT, dtype=cupy.float32).reshape(1024, -1)
        add(KernelLibrary(), x, x, x)
        _compare("a kernel", x.ravel().get(), 2 * np.arange(_COUNT, dtype=np.float32))


def probe_cublaslt(device: int) -> tuple[int, bool]:
    """Open cuBLASLt on ``device``; its version number, and whether it multiplies fp8 blocks.

    Raises:
        ConfigError: nvmath-python or cuBLASLt is missing.
    """
    import cupy

    with cupy.cuda.Device(device):
        library = CublasLt(cupy.empty(WORKSPACE_BYTES, cupy.uint8))
        try:
            return library.version, multiplies_blocks(library)
        finally:
            library.close()


def probe_all_reduce(host: Communicator, device: int) -> None:
    """Sum over the group on ``device`` and compare. *Collective.* Waits, at most 30 s.

    Raises:
        ConfigError: NCCL cannot be loaded.
        ExecutorError: the sum is wrong.
        CommunicatorError: the ranks cannot reach each other, or it does not finish.
    """
    import cupy

    with cupy.cuda.Device(device), cupy.cuda.Stream(non_blocking=True):
        group = NcclCommunicator(host)
        x = cupy.full(_COUNT, group.rank + 1, cupy.float32)
        group.all_reduce(x)
        event = cupy.cuda.Event()
        event.record()
        wait_for(event, [group], _WAIT_SECONDS)
        total = group.size * (group.size + 1) // 2
        _compare("NCCL's all-reduce", x.get(), np.full(_COUNT, total, np.float32))
        group.close()


def probe_peer_memory(host: Communicator, device: int) -> str:
    """Why the group's GPUs do not write into each other's memory; empty where they do. *Collective.*"""
    import cupy

    with cupy.cuda.Device(device):
        memory = open_peer_memory(host, 1, 0)
        if isinstance(memory, str):
            return memory
        memory.close()
        return ""


def _compare(what: str, got: np.ndarray, expected: np.ndarray) -> None:
    if not np.array_equal(got, expected):
        wrong = int((got != expected).sum())
        raise ExecutorError(f"{what} gave {wrong} wrong values of {expected.size}; the GPU or its driver is faulty")
