# SPDX-License-Identifier: Apache-2.0
"""Checks of this rank's GPUs and of what computes on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phalanx.launch.diagnosis.check import Check, Status, attempt
from phalanx.parallel.launcher import LaunchInfo

if TYPE_CHECKING:
    from phalanx.kernels.device import Gpu

__all__ = ["gpu_checks", "tensorrt_check"]

OLDEST_COMPUTE_CAPABILITY = 80
_WITHOUT_GPU = "80"
"""What the compiler is tried for where there is no GPU."""


def gpu_checks(info: LaunchInfo) -> tuple[list[Check], Gpu | None]:
    """Checks of the host's GPUs by way of the one that this rank would use, and that one."""
    from phalanx.kernels.device import driver_is_installed, visible_gpus

    if not driver_is_installed():
        found = Check("GPUs", "off", "no NVIDIA driver (libcuda.so.1) on this host")
        return [found, _compiler(_WITHOUT_GPU, otherwise="off")], None
    gpus: list[Gpu] = []

    def look() -> str:
        gpus.extend(visible_gpus())
        names = sorted({f"{gpu.name} ({gpu.memory_bytes / 2**30:.0f} GiB)" for gpu in gpus})
        return f"{len(gpus)} visible: {', '.join(names)}"

    found = attempt("GPUs", look)
    if not gpus:
        return [found], None
    own = gpus[info.local_rank % len(gpus)]
    return [found, *_own_checks(own, tuple(gpus))], own


def _own_checks(own: Gpu, gpus: tuple[Gpu, ...]) -> list[Check]:
    return [
        _capability(own.compute_capability),
        _quantisation(own.compute_capability),
        attempt("peer access", lambda: _peer_access(gpus), otherwise="warn"),
        _compiler(own.compute_capability),
        attempt("kernels", lambda: _runs(own.index), fix="look at nvidia-smi and dmesg for faults of this GPU"),
        attempt(
            "cuBLASLt",
            lambda: _cublaslt(own.index),
            fix="pip install -e '.[cuda13]' or '.[cuda12]' in Phalanx's checkout",
        ),
        attempt("NCCL", _nccl),
    ]


def tensorrt_check() -> Check:
    """Which TensorRT is installed and what it can do here."""
    return attempt("TensorRT", _tensorrt, otherwise="off")


def _capability(number: str) -> Check:
    text = f"{int(number) / 10:.1f}"
    if int(number) >= OLDEST_COMPUTE_CAPABILITY:
        return Check("compute capability", "ok", text)
    return Check(
        "compute capability", "fail", f"{text} is below 8.0", "use an Ampere or later GPU, or --engine numpy"
    )  # fmt: skip


def _quantisation(number: str) -> Check:
    """Which quantised weights and caches kernels of this GPU compute."""
    from phalanx.kernels.compiler import FIRST_WITH_FP8

    everywhere = "int8 products, packed weights of 4 and 8 bits, fp8 caches"
    if int(number) < OLDEST_COMPUTE_CAPABILITY:
        return Check("quantisation", "off", "see compute capability")
    if int(number) >= FIRST_WITH_FP8:
        return Check("quantisation", "ok", f"fp8 and {everywhere}")
    return Check("quantisation", "ok", f"{everywhere}; fp8 products need compute capability {FIRST_WITH_FP8 / 10:.1f}")


def _peer_access(gpus: tuple[Gpu, ...]) -> str | Check:
    from phalanx.kernels.device import peers_out_of_reach

    if len(gpus) == 1:
        return "one GPU, no peer"
    blocked = peers_out_of_reach(gpus)
    if not blocked:
        return f"every GPU reaches every other one ({len(gpus)})"
    pairs = ", ".join(f"{one}-{other}" for one, other in blocked[:4]) + (", ..." if len(blocked) > 4 else "")
    return Check(
        "peer access", "warn", f"{len(blocked)} pair(s) without direct access: {pairs}",
        "slower all-reduce; look at nvidia-smi topo -m, and switch the IOMMU (ACS) off on bare metal",
    )  # fmt: skip


def _compiler(compute_capability: str, otherwise: Status = "fail") -> Check:
    def probe() -> str:
        from phalanx.kernels.probe import probe_compiler

        return f"NVRTC compiles for {probe_compiler(compute_capability)}"

    return attempt("kernel compiler", probe, otherwise)


def _runs(device: int) -> str:
    from phalanx.kernels.probe import probe_kernel

    probe_kernel(device)
    return "a kernel computes what it should"


def _cublaslt(device: int) -> str:
    from phalanx.kernels.probe import probe_cublaslt

    version, has_blocks = probe_cublaslt(device)
    blocks = "codes" if has_blocks else "values (as codes on compute capability 9.0, from version 120900 on)"
    return f"version {version}; fp8 blocks are multiplied as {blocks}"


def _nccl() -> str:
    from phalanx.parallel.nccl_comm import nccl_version

    return f"version {nccl_version()}"


def _tensorrt() -> str | Check:
    from phalanx.runtime.executors.tensorrt.device import compute_capability
    from phalanx.runtime.executors.tensorrt.installed import load_tensorrt

    library = load_tensorrt()
    here = compute_capability()
    if here is None:
        builds = ", ".join(library.targets) or "nothing without a GPU"
        return Check("TensorRT", "off", f"{library.name}: builds engines for {builds}; none can run here (no GPU)")
    library.check_target(here)
    return f"{library.name}: builds and runs engines for {', '.join(library.targets) or here} (this GPU: {here})"
